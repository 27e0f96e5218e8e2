//! The mixer of Mamba-2.

use flowhn_nn::{Activations, Bias, Decay, Init, Linear, Path, RmsNorm, Weight};
use flowhn_torch::{Error, Result, check, split_features};
use tch::Tensor;

use super::init::SsmInit;
use super::state::SsmState;
use crate::args::{Carry, check_sizes, state_kind};
use crate::conv::{self, CausalConv1d};
use crate::ssd::{self, Ssd};

/// Sizes of a [`Mamba2`].
#[derive(Clone, Debug, PartialEq)]
pub struct Mamba2Config {
    /// Width of the model.
    pub d_model: i64,
    /// Heads; `n_heads * d_head` is the inner width, twice `d_model` in Mamba-2, but any width will do.
    pub n_heads: i64,
    /// Channels of a head, 64 in Mamba-2.
    pub d_head: i64,
    /// State elements of a channel, 128 in Mamba-2.
    pub d_state: i64,
    /// Groups of heads that share B and C; must divide `n_heads`.
    pub n_groups: i64,
    /// Taps of the convolution, 4 in Mamba-2.
    pub d_conv: i64,
    /// Tokens that SSD computes together, 256 in Mamba-2.
    pub chunk_len: usize,
    /// The norm before the output projection and its place beside the gate.
    pub gate_norm: GateNorm,
    /// Epsilon of that norm.
    pub norm_eps: f64,
    /// Equal groups of channels that it normalises apart: 1 as in Mamba-2 of `transformers`, `n_groups` as in `mamba_ssm`.
    pub norm_groups: i64,
    /// Whether the convolution has a bias, as in Mamba-2.
    pub conv_bias: bool,
    /// Whether the input projection has a bias, zero at first.
    pub in_bias: bool,
    /// Whether the output projection has a bias, zero at first.
    pub out_bias: bool,
    /// Which heads share a group.
    pub group_order: GroupOrder,
}

/// The RMSNorm of what SSD returns, `y`, and its gate `silu(z)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GateNorm {
    /// `norm(y silu(z))`, as in Mamba-2.
    #[default]
    AfterGate,
    /// `norm(y) silu(z)`.
    BeforeGate,
    /// `y silu(z)`: no norm.
    None,
}

/// Which group of B and C a head of Mamba-2 reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GroupOrder {
    /// Head `h` group `h / (n_heads / n_groups)`: neighbours share, as in `mamba_ssm`.
    #[default]
    Contiguous,
    /// Head `h` group `h % n_groups`, as the plain path of `transformers` 4.49 computes; it works on a copy of B and C for each
    /// head.
    Strided,
}

impl Mamba2Config {
    /// Channels inside the mixer.
    pub fn d_inner(&self) -> i64 {
        self.n_heads * self.d_head
    }

    /// Channels of the convolution: the input, B and C.
    pub fn conv_channels(&self) -> i64 {
        self.d_inner() + 2 * self.n_groups * self.d_state
    }
}

/// `out_proj(norm(ssd(silu(conv(x, B, C)), dt) silu(z)))` with `(z, x, B, C, dt) = in_proj(x)` (Dao and Gu, arXiv 2405.21060,
/// section 7); where the norm stands, or that there is none, says [`GateNorm`].
#[derive(Debug)]
pub struct Mamba2 {
    config: Mamba2Config,
    in_proj: Linear,
    conv_weight_ek: Weight,
    conv_bias_e: Option<Weight>,
    dt_bias_h: Weight,
    a_log_h: Weight,
    d_h: Weight,
    norm: Option<RmsNorm>,
    out_proj: Linear,
}

impl Mamba2 {
    /// Registers `in_proj.weight conv1d.{weight,bias} dt_bias A_log D norm.weight out_proj.weight` under `path`, biases and the
    /// norm where the config asks for them.
    ///
    /// # Errors
    /// [`Error::Invalid`] if a size is not positive, groups do not divide what they group, or a name is taken.
    pub fn new(path: &mut Path, config: &Mamba2Config, init: SsmInit) -> Result<Self> {
        let Mamba2Config { d_model, n_heads, d_head, d_state, n_groups, d_conv, norm_groups, .. } = *config;
        check_sizes(
            "Mamba2",
            &[
                ("d_model", d_model),
                ("n_heads", n_heads),
                ("d_head", d_head),
                ("d_state", d_state),
                ("n_groups", n_groups),
                ("d_conv", d_conv),
                ("chunk_len", config.chunk_len as i64),
                ("norm_groups", norm_groups),
            ],
        )?;
        let (d_inner, conv_channels) = (config.d_inner(), config.conv_channels());
        if n_heads % n_groups != 0 {
            return Err(Error::invalid("Mamba2", format!("n_groups {n_groups} does not divide n_heads {n_heads}")));
        }
        if d_inner % norm_groups != 0 {
            let message = format!("norm_groups {norm_groups} does not divide the inner width {d_inner}");
            return Err(Error::invalid("Mamba2", message));
        }
        let in_width = d_inner + conv_channels + n_heads;
        let in_bias = Bias::zeros_if(config.in_bias);
        let in_proj = Linear::new(path, "in_proj", d_model, in_width, init.linear(d_model), in_bias)?;
        let mut conv = path.push("conv1d");
        let conv_weight_ek = conv.weight("weight", &[conv_channels, d_conv], init.conv_weight(d_conv), Decay::Yes)?;
        let conv_bias_e = match config.conv_bias {
            true => Some(conv.weight("bias", &[conv_channels], init.conv_bias(d_conv), Decay::No)?),
            false => None,
        };
        let dt_bias = init.dt_bias(path, "dt_bias", n_heads)?;
        let a_log = (1..=n_heads).map(|h| (h as f32).ln()).collect();
        Ok(Self {
            config: config.clone(),
            in_proj,
            conv_weight_ek,
            conv_bias_e,
            dt_bias_h: path.weight("dt_bias", &[n_heads], dt_bias, Decay::No)?,
            a_log_h: path.weight("A_log", &[n_heads], Init::Values(a_log), Decay::No)?,
            d_h: path.weight("D", &[n_heads], Init::Ones, Decay::No)?,
            norm: match config.gate_norm {
                GateNorm::None => None,
                GateNorm::AfterGate | GateNorm::BeforeGate => {
                    Some(RmsNorm::new(path, "norm", d_inner, config.norm_eps)?)
                }
            },
            out_proj: {
                let out_bias = Bias::zeros_if(config.out_bias);
                Linear::new(path, "out_proj", d_inner, d_model, init.linear(d_inner), out_bias)?
            },
        })
    }

    /// The sizes.
    pub fn config(&self) -> &Mamba2Config {
        &self.config
    }

    pub(super) fn in_proj(&self) -> &Linear {
        &self.in_proj
    }

    /// [`SsmMixer::forward`](super::SsmMixer::forward) and, in place, [`SsmMixer::step`](super::SsmMixer::step).
    pub(super) fn run(
        &self,
        x_bld: Activations,
        reset_bl: Option<&Tensor>,
        mut state: Option<&mut SsmState>,
        carry: Carry,
    ) -> Result<Tensor> {
        let Mamba2Config { d_model, n_heads, d_head, d_state, n_groups, .. } = self.config;
        let x = x_bld.tensor();
        let [batch, seq_len, _] = check::dims("Mamba2", "x_bld", x, "[batch, seq_len, d_model]")?;
        check::shape("Mamba2", "x_bld", x, &[batch, seq_len, d_model])?;
        let (d_inner, conv_channels) = (self.config.d_inner(), self.config.conv_channels());
        let state_kind = state_kind(x.kind());

        let projected = self.in_proj.forward(x_bld)?;
        let pieces = split_features(&projected, &[&[d_inner], &[conv_channels], &[n_heads]])?;
        let [z_ble, xbc_ble, dt_blh] = &pieces[..] else { unreachable!("three pieces") };
        let window = state.as_ref().map(|state| state.conv_bje.to_kind(state_kind));
        let conv = conv::run(
            carry,
            &CausalConv1d {
                bias_e: self.conv_bias_e.as_ref().map(|bias| bias.to(state_kind)).as_ref(),
                initial_state_bje: window.as_ref(),
                reset_bl,
                ..CausalConv1d::new(xbc_ble, &self.conv_weight_ek.to(state_kind))
            },
        )?;

        let group = [n_groups, d_state];
        let mut pieces = split_features(&conv.y_ble, &[&[n_heads, d_head], &group, &group])?;
        if self.config.group_order == GroupOrder::Strided && n_groups > 1 {
            for piece in &mut pieces[1..] {
                *piece = piece.repeat([1, 1, n_heads / n_groups, 1]);
            }
        }
        let [x_blhp, b_blgn, c_blgn] = &pieces[..] else { unreachable!("three pieces") };
        let before = state.as_ref().map(|state| state.scan.to_kind(state_kind));
        let out = ssd::run(
            carry,
            &Ssd {
                d_h: Some(&self.d_h.to(state_kind)),
                dt_bias_h: Some(&self.dt_bias_h.to(state_kind)),
                initial_state_bhpn: before.as_ref(),
                reset_bl,
                chunk_len: self.config.chunk_len,
                ..Ssd::new(x_blhp, dt_blh, &-self.a_log_h.to(state_kind).exp(), b_blgn, c_blgn)
            },
        )?;
        if let Some(state) = &mut state {
            state.conv_bje = conv.final_state_bje;
            state.scan = out.final_state_bhpn;
        }
        self.out_proj.forward(self.gated(&out.y_blhp.flatten(2, 3), z_ble)?)
    }

    /// `y` through gate and norm, for the output projection.
    fn gated(&self, y_ble: &Tensor, z_ble: &Tensor) -> Result<Activations> {
        let norm_groups = self.config.norm_groups;
        match &self.norm {
            Some(norm) if self.config.gate_norm == GateNorm::AfterGate => {
                norm.forward_gated_for(&self.out_proj, y_ble, z_ble, norm_groups)
            }
            Some(norm) => Ok(norm.forward_groups(y_ble, norm_groups)?.f_mul(&z_ble.f_silu()?)?.into()),
            None => Ok(y_ble.f_mul(&z_ble.f_silu()?)?.into()),
        }
    }
}
