//! The state-space mixers: parameters and the way from `[batch, seq_len, d_model]` back to it.
// b batch, l seq_len, d d_model, e d_inner, n d_state, k d_conv, r dt_rank, h n_heads, p d_head, g n_groups

mod init;
mod mamba1;
mod mamba2;
mod state;

use flowhn_nn::{Activations, Linear, Path};
use flowhn_torch::{Error, Result, check};
use tch::Tensor;

use crate::args::Carry;

pub use init::SsmInit;
pub use mamba1::{Mamba1, Mamba1Config};
pub use mamba2::{GateNorm, GroupOrder, Mamba2, Mamba2Config};
pub use state::SsmState;

/// Which mixer, and its sizes.
#[derive(Clone, Debug, PartialEq)]
pub enum SsmConfig {
    /// Selective scan.
    Mamba1(Mamba1Config),
    /// SSD.
    Mamba2(Mamba2Config),
}

impl SsmConfig {
    /// Bytes of the state that decoding keeps for `batch` sequences.
    pub fn state_bytes(&self, batch: usize) -> u64 {
        let per_sequence: i64 = self.state_shapes().iter().map(|shape| shape.iter().product::<i64>()).sum();
        4 * batch as u64 * per_sequence as u64
    }

    /// Shapes of the conv and scan state of one sequence.
    fn state_shapes(&self) -> [Vec<i64>; 2] {
        match self {
            Self::Mamba1(c) => [vec![c.d_conv - 1, c.d_inner], vec![c.d_inner, c.d_state]],
            Self::Mamba2(c) => [vec![c.d_conv - 1, c.conv_channels()], vec![c.n_heads, c.d_head, c.d_state]],
        }
    }
}

/// A state-space mixer of either kind.
///
/// ```
/// use flowhn_nn::Params;
/// use flowhn_ssm::{Mamba1Config, SsmConfig, SsmInit, SsmMixer, SsmState};
/// use tch::{Device, Kind, Tensor};
///
/// let config = SsmConfig::Mamba1(Mamba1Config { inner_norm_eps: Some(1e-6), ..Mamba1Config::new(8, 16, 4, 4, 2) });
/// let mut params = Params::new(Device::Cpu, 0);
/// let mixer = SsmMixer::new(&mut params.root(), &config, SsmInit::Mamba)?;
///
/// let x_bld = Tensor::randn([2, 5, 8], (Kind::Float, Device::Cpu));
/// let whole = mixer.forward(&x_bld, None, None)?;
/// let mut state = SsmState::new(&config, 2, Device::Cpu);
/// let prompt = mixer.forward(x_bld.narrow(1, 0, 4), None, Some(&mut state))?;
/// let last = tch::no_grad(|| mixer.step(x_bld.narrow(1, 4, 1), &mut state))?;
/// let decoded = Tensor::cat(&[prompt, last], 1);
/// assert!((decoded - whole).abs().max().double_value(&[]) < 1e-5);
/// # Ok::<(), flowhn_ssm::Error>(())
/// ```
#[derive(Debug)]
pub enum SsmMixer {
    /// Selective scan.
    Mamba1(Mamba1),
    /// SSD.
    Mamba2(Mamba2),
}

impl SsmMixer {
    /// Registers the mixer's parameters under `path`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a size does not fit or a name is taken.
    pub fn new(path: &mut Path, config: &SsmConfig, init: SsmInit) -> Result<Self> {
        Ok(match config {
            SsmConfig::Mamba1(config) => Self::Mamba1(Mamba1::new(path, config, init)?),
            SsmConfig::Mamba2(config) => Self::Mamba2(Mamba2::new(path, config, init)?),
        })
    }

    /// Mixes `x_bld` `[batch, seq_len, d_model]` along the sequence; the result has its shape and dtype.
    ///
    /// `reset_bl` (bool `[batch, seq_len]`) is true at the first token of each packed document. With a `state`, the sequence
    /// goes on from it, and it holds the state after the last token when the call returns: feed the prompt, then token by
    /// token. It is given new tensors; those that it had keep their values. The state stays on the autograd tape where gradients are
    /// recorded; [`SsmState::detach`] cuts it off.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`], naming the argument at fault.
    pub fn forward(
        &self,
        x_bld: impl Into<Activations>,
        reset_bl: Option<&Tensor>,
        state: Option<&mut SsmState>,
    ) -> Result<Tensor> {
        self.run(x_bld.into(), reset_bl, state, Carry::Apart)
    }

    /// A step of decoding: mixes one token, `[batch, 1, d_model]`, and advances the state in its own tensors, without making new ones (but
    /// for the first step in f64, which turns the state into f64).
    ///
    /// The bits are those of [`SsmMixer::forward`]. No gradient is recorded, and whoever else holds these tensors sees the new state:
    /// [`SsmState::copy`] makes one that goes its own way. After an error the state may be that of neither token.
    ///
    /// # Errors
    /// As [`SsmMixer::forward`]; [`Error::Invalid`] for another number of tokens, a state that is not contiguous, or where gradients are
    /// recorded.
    pub fn step(&self, x_b1d: impl Into<Activations>, state: &mut SsmState) -> Result<Tensor> {
        const OP: &str = "SsmMixer::step";
        let x_b1d = x_b1d.into();
        let [_, seq_len, _] = check::dims(OP, "x_b1d", x_b1d.tensor(), "[batch, 1, d_model]")?;
        if seq_len != 1 {
            return Err(Error::invalid(OP, format!("x_b1d has {seq_len} tokens, a step takes one")));
        }
        self.run(x_b1d, None, Some(state), Carry::InPlace)
    }

    fn run(
        &self,
        x_bld: Activations,
        reset_bl: Option<&Tensor>,
        state: Option<&mut SsmState>,
        carry: Carry,
    ) -> Result<Tensor> {
        match self {
            Self::Mamba1(mixer) => mixer.run(x_bld, reset_bl, state, carry),
            Self::Mamba2(mixer) => mixer.run(x_bld, reset_bl, state, carry),
        }
    }

    /// The projection that alone reads `x_bld`.
    pub fn in_proj(&self) -> &Linear {
        match self {
            Self::Mamba1(mixer) => mixer.in_proj(),
            Self::Mamba2(mixer) => mixer.in_proj(),
        }
    }
}
