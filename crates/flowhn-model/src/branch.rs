//! One branch of a block: norm, mixer and, in the released block, a residual and an MLP of its own.

use flowhn_attn::{AttnContext, AttnInit, AttnMixer, Clock, KvCache};
use flowhn_nn::{Activations, Bias, Linear, Path, Residual, RmsNorm, SwiGluMlp};
use flowhn_ssm::{SsmMixer, SsmState};
use flowhn_torch::{Stream, record_stream, timeline};
use tch::Tensor;

use crate::{ModelConfig, Result, init, mixer};

/// `x + MLP(norm(x))`.
#[derive(Debug)]
pub(crate) struct MlpSublayer {
    norm: RmsNorm,
    mlp: SwiGluMlp,
}

impl MlpSublayer {
    /// Registers `norm.weight`, `gate_up_proj.weight` and `down_proj.weight`, with their biases where the configuration has them;
    /// there is none for a width of 0.
    pub fn new(path: &mut Path, config: &ModelConfig) -> Result<Option<Self>> {
        if config.d_ff == 0 {
            return Ok(None);
        }
        let (d_model, d_ff) = (config.d_model as i64, config.d_ff as i64);
        let norm = RmsNorm::new(path, "norm", d_model, config.rms_norm_eps)?;
        let (init_in, init_out) = (init::linear(config, d_model), init::linear(config, d_ff));
        let bias = Bias::zeros_if(config.options.mlp_bias);
        let mlp = SwiGluMlp::new(path, d_model, d_ff, init_in, init_out, &bias)?;
        Ok(Some(Self { norm, mlp }))
    }

    pub fn norm(&self) -> &RmsNorm {
        &self.norm
    }

    /// The projection that alone reads the normed tokens.
    pub fn in_proj(&self) -> &Linear {
        self.mlp.gate_up_proj()
    }

    /// The sublayer on tokens of which the norm is known.
    pub fn forward_normed(&self, x_bld: Tensor, normed_bld: impl Into<Activations>) -> Result<Residual> {
        Ok(Residual { x: x_bld, change: Some(self.mlp.forward(normed_bld)?) })
    }
}

/// What a branch reads of the block's input.
#[derive(Debug)]
pub(crate) enum BranchInput {
    /// Its tokens.
    Tokens(Tensor),
    /// Its tokens after its norm, where it needs them no other way.
    Normed(Activations),
    /// Both.
    Both { x_bnd: Tensor, normed_bnd: Activations },
}

impl BranchInput {
    /// The same, at the border between two parts of a [`timeline`]: `outside` and, from here on, `inside`.
    pub fn timed(&self, inside: &'static str, outside: &'static str) -> Result<Self> {
        let pass = |x: &Tensor| timeline::pass(x, inside, outside);
        Ok(match self {
            Self::Tokens(x_bnd) => Self::Tokens(pass(x_bnd)?),
            Self::Normed(normed_bnd) => Self::Normed(normed_bnd.pass(pass)?),
            Self::Both { x_bnd, normed_bnd } => {
                Self::Both { x_bnd: x_bnd.shallow_clone(), normed_bnd: normed_bnd.pass(pass)? }
            }
        })
    }

    /// The tokens, if the branch still adds them to its output, and the normed tokens.
    pub fn normed_by(&self, norm: &RmsNorm) -> Result<(Option<Tensor>, Activations)> {
        match self {
            Self::Normed(normed_bnd) => Ok((None, normed_bnd.into())),
            Self::Both { x_bnd, normed_bnd } => Ok((Some(x_bnd.shallow_clone()), normed_bnd.into())),
            Self::Tokens(x_bnd) => {
                let (x_bnd, normed_bnd) = norm.forward_residual(x_bnd, None)?;
                Ok((Some(x_bnd), normed_bnd.into()))
            }
        }
    }

    /// Keeps the memory of its tensors until `stream` is done with it.
    pub fn record_stream(&self, stream: Stream) -> Result<()> {
        let (tokens, normed) = match self {
            Self::Tokens(x_bnd) => (Some(x_bnd), None),
            Self::Normed(normed_bnd) => (None, Some(normed_bnd)),
            Self::Both { x_bnd, normed_bnd } => (Some(x_bnd), Some(normed_bnd)),
        };
        tokens.map_or(Ok(()), |x_bnd| record_stream(x_bnd, stream))?;
        normed.map_or(Ok(()), |normed_bnd| Ok(normed_bnd.record_stream(stream)?))
    }

    /// The tokens as they are, if they were kept.
    pub fn tokens(&self) -> Option<&Tensor> {
        match self {
            Self::Tokens(x_bnd) | Self::Both { x_bnd, .. } => Some(x_bnd),
            Self::Normed(_) => None,
        }
    }
}

/// What the released block does with a mixer's output: adds the branch's input and runs the branch's MLP.
/// In a flow block the output itself is the branch's change.
#[derive(Debug)]
pub(crate) struct BranchTail {
    mlp: Option<MlpSublayer>,
}

impl BranchTail {
    fn forward(&self, x_bnd: &Tensor, mixed_bnd: Tensor) -> Result<Residual> {
        match &self.mlp {
            Some(mlp) => {
                let (h_bnd, normed_bnd) = mlp.norm().forward_residual_for(mlp.in_proj(), x_bnd, Some(&mixed_bnd))?;
                mlp.forward_normed(h_bnd, normed_bnd)
            }
            None => Ok(Residual { x: x_bnd.shallow_clone(), change: Some(mixed_bnd) }),
        }
    }
}

/// Where attention's tokens stand, and what it remembers.
#[derive(Debug)]
pub(crate) enum Standing<'a> {
    /// Any tokens, at positions that the host knows.
    Tokens { ctx: AttnContext<'a>, cache: Option<&'a mut KvCache> },
    /// One token, at the clock's position, after those of the cache.
    Step { clock: &'a Clock, cache: &'a mut KvCache },
}

/// The attention branch.
#[derive(Debug)]
pub(crate) struct AttnBranch {
    norm: RmsNorm,
    mixer: AttnMixer,
    tail: Option<BranchTail>,
}

impl AttnBranch {
    /// The branch behind `shared_norm`, or behind one of its own.
    pub fn new(
        path: &mut Path,
        config: &ModelConfig,
        block_idx: usize,
        shared_norm: Option<&RmsNorm>,
        own_residual: bool,
    ) -> Result<Self> {
        let norm = opening(path, config, shared_norm)?;
        let (d_model, d_q) = (config.d_model as i64, config.attn.d_q() as i64);
        let init = AttnInit { qkv: init::linear(config, d_model), out: init::linear(config, d_q) };
        let mixer = AttnMixer::new(&mut path.push("mixer"), mixer::attn(config, block_idx), init)?;
        Ok(Self { norm, mixer, tail: tail(path, config, own_residual)? })
    }

    pub fn norm(&self) -> &RmsNorm {
        &self.norm
    }

    /// Whether the branch adds its input to what its mixer returns.
    pub fn has_tail(&self) -> bool {
        self.tail.is_some()
    }

    pub fn mixer(&self) -> &AttnMixer {
        &self.mixer
    }

    /// `x_bnd` are the window's tokens, needed if [`AttnBranch::has_tail`]; `normed_bnd` the same after the norm; `source_bld` all
    /// normed tokens, for a bridge.
    pub fn forward(
        &self,
        x_bnd: Option<&Tensor>,
        normed_bnd: impl Into<Activations>,
        source_bld: Option<&Tensor>,
        standing: Standing,
    ) -> Result<Residual> {
        let mixed_bnd = match standing {
            Standing::Tokens { ctx, cache } => self.mixer.forward(normed_bnd, source_bld, &ctx, cache)?,
            Standing::Step { clock, cache } => self.mixer.step(normed_bnd, source_bld, clock, cache)?,
        };
        match (&self.tail, x_bnd) {
            (Some(tail), Some(x_bnd)) => tail.forward(x_bnd, mixed_bnd),
            _ => Ok(Residual::of(mixed_bnd)),
        }
    }
}

/// What the state-space branch knows of the tokens before.
#[derive(Debug)]
pub(crate) enum Past<'a> {
    /// Of any tokens: which begin a document, and the state to go on from.
    Tokens { reset_bm: Option<&'a Tensor>, state: Option<&'a mut SsmState> },
    /// Of one token: the state, which is advanced where it lies.
    Step(&'a mut SsmState),
}

/// The state-space branch.
#[derive(Debug)]
pub(crate) struct SsmBranch {
    norm: RmsNorm,
    mixer: SsmMixer,
    tail: Option<BranchTail>,
}

impl SsmBranch {
    /// The branch behind `shared_norm`, or behind one of its own.
    pub fn new(
        path: &mut Path,
        config: &ModelConfig,
        shared_norm: Option<&RmsNorm>,
        own_residual: bool,
    ) -> Result<Self> {
        let norm = opening(path, config, shared_norm)?;
        let mixer = SsmMixer::new(&mut path.push("mixer"), &mixer::ssm(config), init::ssm(config))?;
        Ok(Self { norm, mixer, tail: tail(path, config, own_residual)? })
    }

    pub fn norm(&self) -> &RmsNorm {
        &self.norm
    }

    pub fn mixer(&self) -> &SsmMixer {
        &self.mixer
    }

    pub fn forward(&self, input: &BranchInput, past: Past) -> Result<Residual> {
        let (x_bnd, normed_bnd) = input.normed_by(&self.norm)?;
        let mixed_bnd = match past {
            Past::Tokens { reset_bm, state } => self.mixer.forward(&normed_bnd, reset_bm, state)?,
            Past::Step(state) => self.mixer.step(&normed_bnd, state)?,
        };
        match (&self.tail, x_bnd) {
            (Some(tail), Some(x_bnd)) => tail.forward(&x_bnd, mixed_bnd),
            _ => Ok(Residual::of(mixed_bnd)),
        }
    }
}

/// The norm that opens a block, or a branch of one.
pub(crate) fn opening(path: &mut Path, config: &ModelConfig, shared: Option<&RmsNorm>) -> Result<RmsNorm> {
    match shared {
        Some(norm) => Ok(norm.clone()),
        None => Ok(RmsNorm::new(path, "norm", config.d_model as i64, config.rms_norm_eps)?),
    }
}

fn tail(path: &mut Path, config: &ModelConfig, own_residual: bool) -> Result<Option<BranchTail>> {
    if !own_residual {
        return Ok(None);
    }
    Ok(Some(BranchTail { mlp: MlpSublayer::new(&mut path.push("mlp"), config)? }))
}
