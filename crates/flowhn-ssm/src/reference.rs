//! The formulas in plain libtorch operators: slow, differentiable by autograd, on any device, and what every kernel is judged by.
//!
//! They take the same arguments as the operations of the crate and compute in the dtype of the state (f64 for f64 inputs, f32
//! for others). They check nothing: shapes that do not fit come back as libtorch's own errors.
// b batch, l seq_len, e d_inner, n d_state, h n_heads, p d_head, g n_groups, k d_conv, c chunks, q tokens of a chunk

use flowhn_torch::{Result, catch};
use tch::{Kind, Tensor};

use crate::args::state_kind;
use crate::conv::{Activation, CausalConv1d, CausalConv1dOutput};
use crate::scan::{DtActivation, SelectiveScan, SelectiveScanOutput};
use crate::ssd::{Ssd, SsdOutput};

/// [`selective_scan`](crate::selective_scan), one token after the other.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) if shapes do not fit.
pub fn selective_scan(args: &SelectiveScan) -> Result<SelectiveScanOutput> {
    catch(|| {
        let kind = state_kind(args.x_ble.kind());
        let x_ble = args.x_ble.to_kind(kind);
        let dt_ble = step_sizes(args.dt_ble, args.dt_bias_e, args.dt_activation, kind);
        let (b_bln, c_bln) = (args.b_bln.to_kind(kind), args.c_bln.to_kind(kind));
        let (batch, seq_len, d_inner) = x_ble.size3()?;
        let d_state = args.a_en.size()[1];
        let mut state_ben = match args.initial_state_ben {
            Some(state) => state.shallow_clone(),
            None => Tensor::zeros([batch, d_inner, d_state], (kind, x_ble.device())),
        };
        let mut y_be = Vec::new();
        for t in 0..seq_len {
            if let Some(reset_bl) = args.reset_bl {
                state_ben = state_ben.masked_fill(&reset_bl.select(1, t).view([batch, 1, 1]), 0.);
            }
            let (x_be, dt_be) = (x_ble.select(1, t), dt_ble.select(1, t));
            let decay_ben = (dt_be.unsqueeze(-1) * args.a_en).exp();
            state_ben = decay_ben * state_ben + (dt_be * x_be).unsqueeze(-1) * b_bln.select(1, t).unsqueeze(1);
            y_be.push((&state_ben * c_bln.select(1, t).unsqueeze(1)).sum_dim_intlist(-1, false, kind));
        }
        let mut y_ble = stack_tokens(&y_be, &x_ble);
        if let Some(d_e) = args.d_e {
            y_ble = &y_ble + d_e * &x_ble;
        }
        if let Some(z_ble) = args.z_ble {
            y_ble = &y_ble * z_ble.to_kind(kind).silu();
        }
        Ok(SelectiveScanOutput { y_ble: y_ble.to_kind(args.x_ble.kind()), final_state_ben: state_ben })
    })
}

/// [`ssd`](crate::ssd), one token after the other.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) if shapes do not fit.
pub fn ssd(args: &Ssd) -> Result<SsdOutput> {
    catch(|| {
        let inputs = SsdInputs::new(args)?;
        let kind = inputs.x_blhp.kind();
        let (batch, seq_len, ..) = inputs.x_blhp.size4()?;
        let mut state_bhpn = inputs.initial_state(args)?;
        let mut y_bhp = Vec::new();
        for t in 0..seq_len {
            if let Some(reset_bl) = args.reset_bl {
                state_bhpn = state_bhpn.masked_fill(&reset_bl.select(1, t).view([batch, 1, 1, 1]), 0.);
            }
            let (x_bhp, dt_bh) = (inputs.x_blhp.select(1, t), inputs.dt_blh.select(1, t));
            let (b_bhn, c_bhn) = (inputs.b_blhn.select(1, t), inputs.c_blhn.select(1, t));
            let decay_bh11 = (&dt_bh * args.a_h).exp().unsqueeze(-1).unsqueeze(-1);
            let input_bhp = dt_bh.unsqueeze(-1) * x_bhp;
            state_bhpn = decay_bh11 * state_bhpn + input_bhp.unsqueeze(-1) * b_bhn.unsqueeze(2);
            y_bhp.push((&state_bhpn * c_bhn.unsqueeze(2)).sum_dim_intlist(-1, false, kind));
        }
        let y_blhp = stack_tokens(&y_bhp, &inputs.x_blhp);
        Ok(inputs.finish(args, y_blhp, state_bhpn))
    })
}

/// [`ssd`](crate::ssd) in matrix products over chunks of `chunk_len` tokens.
///
/// With `s_i` the sum of `dt a` over the chunk's tokens up to `i`, a token `i` reads token `j <= i` through
/// `exp(s_i - s_j) (c_i . b_j) dt_j`, and the chunk's initial state through `exp(s_i)`.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) if shapes do not fit.
pub fn ssd_chunked(args: &Ssd) -> Result<SsdOutput> {
    catch(|| {
        let inputs = SsdInputs::new(args)?;
        let (_, seq_len, ..) = inputs.x_blhp.size4()?;
        let mut state_bhpn = inputs.initial_state(args)?;
        let mut y_blhp = vec![inputs.x_blhp.narrow(1, 0, 0)];
        for start in (0..seq_len).step_by(args.chunk_len) {
            let len = (seq_len - start).min(args.chunk_len as i64);
            let (y, state) = inputs.chunk(args, start, len, &state_bhpn);
            y_blhp.push(y);
            state_bhpn = state;
        }
        Ok(inputs.finish(args, Tensor::cat(&y_blhp, 1), state_bhpn))
    })
}

/// The arguments of SSD in the dtype of the state, with step sizes made and groups repeated for their heads.
struct SsdInputs {
    x_blhp: Tensor,
    dt_blh: Tensor,
    b_blhn: Tensor,
    c_blhn: Tensor,
}

impl SsdInputs {
    fn new(args: &Ssd) -> Result<Self> {
        let kind = state_kind(args.x_blhp.kind());
        let n_heads = args.x_blhp.size()[2];
        let for_heads = |t: &Tensor| {
            let repeats = n_heads / t.size()[2];
            t.to_kind(kind).repeat_interleave_self_int(repeats, 2, None)
        };
        Ok(Self {
            x_blhp: args.x_blhp.to_kind(kind),
            dt_blh: step_sizes(args.dt_blh, args.dt_bias_h, args.dt_activation, kind),
            b_blhn: for_heads(args.b_blgn),
            c_blhn: for_heads(args.c_blgn),
        })
    }

    fn initial_state(&self, args: &Ssd) -> Result<Tensor> {
        let (batch, _, n_heads, d_head) = self.x_blhp.size4()?;
        let options = (self.x_blhp.kind(), self.x_blhp.device());
        Ok(match args.initial_state_bhpn {
            Some(state) => state.shallow_clone(),
            None => Tensor::zeros([batch, n_heads, d_head, self.b_blhn.size()[3]], options),
        })
    }

    /// Outputs and final state of the tokens `start..start + len`.
    fn chunk(&self, args: &Ssd, start: i64, len: i64, state_bhpn: &Tensor) -> (Tensor, Tensor) {
        let kind = self.x_blhp.kind();
        // Heads in front of tokens, so that the last two axes are matrices.
        let heads_first = |t: &Tensor| t.narrow(1, start, len).transpose(1, 2);
        let (x_bhqp, dt_bhq) = (heads_first(&self.x_blhp), heads_first(&self.dt_blh));
        let (b_bhqn, c_bhqn) = (heads_first(&self.b_blhn), heads_first(&self.c_blhn));
        let input_bhqp = dt_bhq.unsqueeze(-1) * x_bhqp;
        let log_decay_bhq = dt_bhq * args.a_h.unsqueeze(-1);

        // sums[.., i, j] is the sum over the tokens j + 1 ..= i. Summing those terms, rather than subtracting two prefix sums,
        // keeps small sums exact beside large ones.
        let later = Tensor::ones([len, len], (Kind::Bool, args.a_h.device())).tril(-1);
        let causal = Tensor::ones([len, len], (Kind::Bool, args.a_h.device())).tril(0);
        let spread = log_decay_bhq.unsqueeze(-1).expand([-1, -1, -1, len], false).masked_fill(&later.logical_not(), 0.);
        let sums_bhqq = spread.cumsum(-2, kind);
        let from_start_bhq = log_decay_bhq.cumsum(-1, kind);
        let (visible_bhqq, keeps_state_bhq) = match args.reset_bl {
            None => (causal, Tensor::ones([1, 1, len], (Kind::Bool, args.a_h.device()))),
            Some(reset_bl) => {
                let resets_bq = reset_bl.narrow(1, start, len).cumsum(1, Kind::Int64);
                let same_bqq = resets_bq.unsqueeze(2).eq_tensor(&resets_bq.unsqueeze(1));
                (same_bqq.logical_and(&causal).unsqueeze(1), resets_bq.eq(0).unsqueeze(1))
            }
        };
        let decay_bhqq = sums_bhqq.masked_fill(&visible_bhqq.logical_not(), f64::NEG_INFINITY).exp();
        let from_start_bhq = from_start_bhq.masked_fill(&keeps_state_bhq.logical_not(), f64::NEG_INFINITY).exp();

        let inside = (c_bhqn.matmul(&b_bhqn.transpose(-1, -2)) * &decay_bhqq).matmul(&input_bhqp);
        let carried = c_bhqn.matmul(&state_bhpn.transpose(-1, -2)) * from_start_bhq.unsqueeze(-1);
        let to_end_bhq = decay_bhqq.select(-2, -1);
        let added_bhpn = input_bhqp.transpose(-1, -2).matmul(&(b_bhqn * to_end_bhq.unsqueeze(-1)));
        let kept_bhpn = from_start_bhq.select(-1, -1).unsqueeze(-1).unsqueeze(-1) * state_bhpn;
        ((inside + carried).transpose(1, 2), kept_bhpn + added_bhpn)
    }

    fn finish(&self, args: &Ssd, mut y_blhp: Tensor, final_state_bhpn: Tensor) -> SsdOutput {
        if let Some(d_h) = args.d_h {
            y_blhp = &y_blhp + d_h.unsqueeze(-1) * &self.x_blhp;
        }
        SsdOutput { y_blhp: y_blhp.to_kind(args.x_blhp.kind()), final_state_bhpn }
    }
}

/// [`causal_conv1d`](crate::causal_conv1d), tap by tap.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) if shapes do not fit.
pub fn causal_conv1d(args: &CausalConv1d) -> Result<CausalConv1dOutput> {
    catch(|| {
        let kind = state_kind(args.x_ble.kind());
        let x_ble = args.x_ble.to_kind(kind);
        let weight_ek = args.weight_ek.to_kind(kind);
        let (batch, seq_len, channels) = x_ble.size3()?;
        let d_conv = weight_ek.size()[1];
        let n_before = d_conv - 1;
        let before = match args.initial_state_bje {
            Some(state) => state.shallow_clone(),
            None => Tensor::zeros([batch, n_before, channels], (kind, x_ble.device())),
        };
        // Index m of the extended input is token m - n_before.
        let extended = Tensor::cat(&[before, x_ble.shallow_clone()], 1);
        let documents = args.reset_bl.map(|reset_bl| {
            let count = reset_bl.cumsum(1, Kind::Int64);
            Tensor::cat(&[Tensor::zeros([batch, n_before], (Kind::Int64, x_ble.device())), count], 1)
        });
        // The inputs `from..from + len` as a token of the document of `to..to + len` sees them.
        let visible = |from: i64, to: i64, len: i64| {
            let window = extended.narrow(1, from, len);
            match &documents {
                None => window,
                Some(documents) => {
                    let other = documents.narrow(1, from, len).ne_tensor(&documents.narrow(1, to, len));
                    window.masked_fill(&other.unsqueeze(-1), 0.)
                }
            }
        };
        let mut y_ble = x_ble.zeros_like();
        for tap in 0..d_conv {
            y_ble = &y_ble + visible(tap, n_before, seq_len) * weight_ek.select(1, tap);
        }
        if let Some(bias_e) = args.bias_e {
            y_ble = &y_ble + bias_e.to_kind(kind);
        }
        if args.activation == Activation::Silu {
            y_ble = y_ble.silu();
        }
        let last = seq_len + n_before - 1;
        let final_state_bje = match &documents {
            Some(documents) if n_before > 0 && last >= 0 => {
                let other = documents.narrow(1, seq_len, n_before).ne_tensor(&documents.narrow(1, last, 1));
                extended.narrow(1, seq_len, n_before).masked_fill(&other.unsqueeze(-1), 0.)
            }
            _ => extended.narrow(1, seq_len, n_before),
        };
        Ok(CausalConv1dOutput { y_ble: y_ble.to_kind(args.x_ble.kind()), final_state_bje })
    })
}

fn step_sizes(dt: &Tensor, bias: Option<&Tensor>, activation: DtActivation, kind: Kind) -> Tensor {
    let mut dt = dt.to_kind(kind);
    if let Some(bias) = bias {
        dt = &dt + bias;
    }
    match activation {
        // libtorch's own softplus switches to the identity at 20, which is exact to f32 but not to f64.
        DtActivation::Softplus => dt.clamp_min(0.) + (-dt.abs()).exp().log1p(),
        DtActivation::Identity => dt,
    }
}

/// Puts per-token outputs side by side on axis 1; `like` gives the result of no tokens.
fn stack_tokens(tokens: &[Tensor], like: &Tensor) -> Tensor {
    match tokens {
        [] => like.zeros_like(),
        _ => Tensor::stack(tokens, 1),
    }
}
