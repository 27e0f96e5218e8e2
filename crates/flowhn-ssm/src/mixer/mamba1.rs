//! The mixer of Mamba-1, with the inner norms that Jamba adds.

use flowhn_nn::{Activations, Bias, Decay, Init, Linear, Path, RmsNorm, Weight};
use flowhn_torch::{Result, check, split_features};
use tch::Tensor;

use super::init::SsmInit;
use super::state::SsmState;
use crate::args::{Carry, check_sizes, state_kind};
use crate::conv::{self, CausalConv1d};
use crate::scan::{self, SelectiveScan};

/// Sizes of a [`Mamba1`].
#[derive(Clone, Debug, PartialEq)]
pub struct Mamba1Config {
    /// Width of the model.
    pub d_model: i64,
    /// Channels of conv and scan, twice `d_model` in Mamba; any width will do.
    pub d_inner: i64,
    /// State elements of a channel, 16 in Mamba.
    pub d_state: i64,
    /// Taps of the convolution, 4 in Mamba.
    pub d_conv: i64,
    /// Rank of the map that makes step sizes, `ceil(d_model / 16)` in Mamba.
    pub dt_rank: i64,
    /// With a value, RMSNorms with this epsilon on the low-rank step sizes, B and C, as in Jamba.
    pub inner_norm_eps: Option<f64>,
    /// Whether the convolution has a bias, as in Mamba.
    pub conv_bias: bool,
    /// Whether the input and output projections have biases, zero at first.
    pub proj_bias: bool,
    /// With a value, an RMSNorm with this epsilon before the output projection, as in Hymba.
    pub out_norm_eps: Option<f64>,
}

impl Mamba1Config {
    /// Mamba's own: these sizes, a bias in the convolution, and nothing else.
    pub const fn new(d_model: i64, d_inner: i64, d_state: i64, d_conv: i64, dt_rank: i64) -> Self {
        Self {
            d_model,
            d_inner,
            d_state,
            d_conv,
            dt_rank,
            inner_norm_eps: None,
            conv_bias: true,
            proj_bias: false,
            out_norm_eps: None,
        }
    }
}

/// `out_proj(scan(silu(conv(u))) silu(z))` with `(u, z) = in_proj(x)` (Gu and Dao, arXiv 2312.00752, section 3.4).
#[derive(Debug)]
pub struct Mamba1 {
    config: Mamba1Config,
    in_proj: Linear,
    conv_weight_ek: Weight,
    conv_bias_e: Option<Weight>,
    x_proj: Linear,
    inner_norms: Option<[RmsNorm; 3]>,
    dt_weight_er: Weight,
    dt_bias_e: Weight,
    a_log_en: Weight,
    d_e: Weight,
    out_norm: Option<RmsNorm>,
    out_proj: Linear,
}

impl Mamba1 {
    /// Registers `in_proj.weight conv1d.{weight,bias} x_proj.weight {dt,b,c}_norm.weight dt_proj.{weight,bias} A_log D
    /// out_proj.weight` under `path`; the inner norms, `in_proj.bias`, `out_proj.bias` and `out_norm.weight` only where the config
    /// asks for them.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) if a size is not positive or a name is taken.
    pub fn new(path: &mut Path, config: &Mamba1Config, init: SsmInit) -> Result<Self> {
        let Mamba1Config { d_model, d_inner, d_state, d_conv, dt_rank, inner_norm_eps, .. } = *config;
        let proj_bias = Bias::zeros_if(config.proj_bias);
        check_sizes(
            "Mamba1",
            &[
                ("d_model", d_model),
                ("d_inner", d_inner),
                ("d_state", d_state),
                ("d_conv", d_conv),
                ("dt_rank", dt_rank),
            ],
        )?;
        let in_proj = Linear::new(path, "in_proj", d_model, 2 * d_inner, init.linear(d_model), proj_bias.clone())?;
        let mut conv = path.push("conv1d");
        let conv_weight_ek = conv.weight("weight", &[d_inner, d_conv], init.conv_weight(d_conv), Decay::Yes)?;
        let conv_bias_e = match config.conv_bias {
            true => Some(conv.weight("bias", &[d_inner], init.conv_bias(d_conv), Decay::No)?),
            false => None,
        };
        let x_proj = Linear::new(path, "x_proj", d_inner, dt_rank + 2 * d_state, init.linear(d_inner), Bias::None)?;
        let inner_norms = match inner_norm_eps {
            None => None,
            Some(eps) => Some([
                RmsNorm::new(path, "dt_norm", dt_rank, eps)?,
                RmsNorm::new(path, "b_norm", d_state, eps)?,
                RmsNorm::new(path, "c_norm", d_state, eps)?,
            ]),
        };
        let mut dt_proj = path.push("dt_proj");
        let dt_weight_er = dt_proj.weight("weight", &[d_inner, dt_rank], init.linear(dt_rank), Decay::Yes)?;
        let dt_bias = init.dt_bias(&dt_proj, "bias", d_inner)?;
        let dt_bias_e = dt_proj.weight("bias", &[d_inner], dt_bias, Decay::No)?;
        let a_log = (0..d_inner).flat_map(|_| (1..=d_state).map(|n| (n as f32).ln())).collect();
        Ok(Self {
            config: config.clone(),
            in_proj,
            conv_weight_ek,
            conv_bias_e,
            x_proj,
            inner_norms,
            dt_weight_er,
            dt_bias_e,
            a_log_en: path.weight("A_log", &[d_inner, d_state], Init::Values(a_log), Decay::No)?,
            d_e: path.weight("D", &[d_inner], Init::Ones, Decay::No)?,
            out_norm: config.out_norm_eps.map(|eps| RmsNorm::new(path, "out_norm", d_inner, eps)).transpose()?,
            out_proj: Linear::new(path, "out_proj", d_inner, d_model, init.linear(d_inner), proj_bias)?,
        })
    }

    /// The sizes.
    pub fn config(&self) -> &Mamba1Config {
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
        let Mamba1Config { d_model, d_inner, d_state, dt_rank, .. } = self.config;
        let x = x_bld.tensor();
        let [batch, seq_len, _] = check::dims("Mamba1", "x_bld", x, "[batch, seq_len, d_model]")?;
        check::shape("Mamba1", "x_bld", x, &[batch, seq_len, d_model])?;
        let (kind, state_kind) = (x.kind(), state_kind(x.kind()));

        let uz = self.in_proj.forward(x_bld)?;
        let pieces = split_features(&uz, &[&[d_inner], &[d_inner]])?;
        let [u_ble, z_ble] = &pieces[..] else { unreachable!("two pieces") };
        let window = state.as_ref().map(|state| state.conv_bje.to_kind(state_kind));
        let conv = conv::run(
            carry,
            &CausalConv1d {
                bias_e: self.conv_bias_e.as_ref().map(|bias| bias.to(state_kind)).as_ref(),
                initial_state_bje: window.as_ref(),
                reset_bl,
                ..CausalConv1d::new(u_ble, &self.conv_weight_ek.to(state_kind))
            },
        )?;

        let u_ble = conv.y_ble;
        let dt_b_c = self.x_proj.forward(&u_ble)?;
        let mut pieces = split_features(&dt_b_c, &[&[dt_rank], &[d_state], &[d_state]])?.into_iter();
        let [Some(mut dt_blr), Some(mut b_bln), Some(mut c_bln)] = [(); 3].map(|()| pieces.next()) else {
            unreachable!("three pieces")
        };
        if let Some([dt_norm, b_norm, c_norm]) = &self.inner_norms {
            dt_blr = dt_norm.forward(&dt_blr)?;
            b_bln = b_norm.forward(&b_bln)?;
            c_bln = c_norm.forward(&c_bln)?;
        }
        let dt_ble = dt_blr.f_linear(&self.dt_weight_er.to(kind), None::<&Tensor>)?;

        let before = state.as_ref().map(|state| state.scan.to_kind(state_kind));
        let scan = scan::run(
            carry,
            &SelectiveScan {
                d_e: Some(&self.d_e.to(state_kind)),
                z_ble: Some(z_ble),
                dt_bias_e: Some(&self.dt_bias_e.to(state_kind)),
                initial_state_ben: before.as_ref(),
                reset_bl,
                ..SelectiveScan::new(&u_ble, &dt_ble, &-self.a_log_en.to(state_kind).exp(), &b_bln, &c_bln)
            },
        )?;
        if let Some(state) = &mut state {
            state.conv_bje = conv.final_state_bje;
            state.scan = scan.final_state_ben;
        }
        match &self.out_norm {
            Some(norm) => self.out_proj.forward(&norm.forward(&scan.y_ble)?),
            None => self.out_proj.forward(&scan.y_ble),
        }
    }
}
