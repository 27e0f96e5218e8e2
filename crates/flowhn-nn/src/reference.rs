//! The formulas of this crate's operations in plain tensor operations: what the kernels are tested against.
//!
//! They compute in the type of their arguments, except where a formula asks for f32, and leave the derivative to
//! autograd. Arguments are as in the operation of the same name; they are not checked.

use tch::{Kind, Tensor};

/// [`rms_norm`](crate::rms_norm).
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    let wide = x.to_kind(statistics_kind(x));
    let mean = wide.square().mean_dim(-1, true, None::<Kind>);
    let normalised = (&wide * (mean + eps).rsqrt()).to_kind(x.kind());
    (normalised * weight).to_kind(x.kind())
}

/// [`gated_rms_norm`](crate::gated_rms_norm).
pub fn gated_rms_norm(x: &Tensor, z: &Tensor, weight: &Tensor, eps: f64, n_groups: i64) -> Tensor {
    let kind = statistics_kind(x);
    let gated = x.to_kind(kind) * z.to_kind(kind).silu();
    let d = weight.size()[0];
    let grouped = gated.unflatten(-1, [n_groups, d / n_groups]);
    let mean = grouped.square().mean_dim(-1, true, None::<Kind>);
    let normalised = (&grouped * (mean + eps).rsqrt()).flatten(-2, -1);
    (normalised * weight.to_kind(kind)).to_kind(x.kind())
}

/// [`swiglu`](crate::swiglu).
pub fn swiglu(gate_up: &Tensor) -> Tensor {
    let halves = gate_up.chunk(2, -1);
    halves[0].silu() * &halves[1]
}

/// [`embedding`](crate::embedding) without a padding row.
pub fn embedding(weight_vd: &Tensor, ids: &Tensor, kind: Kind) -> Tensor {
    Tensor::embedding(weight_vd, ids, -1, false, false).to_kind(kind)
}

/// [`linear_cross_entropy`](crate::linear_cross_entropy); NaN where every target is ignored.
pub fn linear_cross_entropy(x_td: &Tensor, weight_vd: &Tensor, targets_t: &Tensor, ignore_index: i64) -> Tensor {
    let logits = x_td.matmul(&weight_vd.tr());
    let logits = logits.to_kind(statistics_kind(&logits));
    logits.cross_entropy_loss::<Tensor>(targets_t, None, tch::Reduction::Mean, ignore_index, 0.)
}

/// [`token_losses`](crate::token_losses).
pub fn token_losses(x_td: &Tensor, weight_vd: &Tensor, targets_t: &Tensor, ignore_index: i64) -> Tensor {
    let logits = x_td.matmul(&weight_vd.tr());
    let logits = logits.to_kind(statistics_kind(&logits));
    logits.cross_entropy_loss::<Tensor>(targets_t, None, tch::Reduction::None, ignore_index, 0.)
}

/// Statistics and reductions are f32 for every type but f64.
fn statistics_kind(x: &Tensor) -> Kind {
    if x.kind() == Kind::Double { Kind::Double } else { Kind::Float }
}
