//! Grouped-query attention.
//!
//! Kernels of our own on Hopper and libtorch's fused operators elsewhere do the work: blocks of queries and keys, softmax on
//! the fly, in both directions, with key heads shared by groups of query heads without being copied. Forward their sums run over
//! the keys in a fixed order and a hidden key enters as an exact zero, so equal inputs give equal bits and a hidden token's value
//! cannot show, as long as it is finite.

// b batch, n queries, m keys, h query heads, k key heads, p d_head

use tch::{Device, Kind, Tensor};

use flowhn_torch::{Error, Result, check};

use crate::mask::{Pattern, Takes};
use crate::{Mask, fused, hopper};

/// `softmax(q k^T / sqrt(d_head)) v` over the keys that `mask` shows each query; a query that sees no key gets zeros.
///
/// Query head `i` reads key head `i / (n_heads / n_kv_heads)`.
///
/// # Shapes
/// - `q_bnhp`: `[batch, n, n_heads, d_head]`, f32, f64 or bf16, any strides
/// - `k_bmkp`, `v_bmkp`: `[batch, m, n_kv_heads, d_head]`, of the same dtype, `n_heads` a multiple of `n_kv_heads`
/// - returns `[batch, n, n_heads, d_head]`
///
/// ```
/// use flowhn_attn::{Mask, attention};
/// use tch::{Device, Kind, Tensor};
/// let q = Tensor::zeros([1, 2, 4, 8], (Kind::Float, Device::Cpu));
/// let k = Tensor::zeros([1, 2, 2, 8], (Kind::Float, Device::Cpu));
/// let v = Tensor::from_slice(&[1f32, 3.]).view([1, 2, 1, 1]).expand([1, 2, 2, 8], false);
/// let o = attention(&q, &k, &v, &Mask::causal())?;
/// assert_eq!(o.double_value(&[0, 0, 3, 7]), 1.);
/// assert_eq!(o.double_value(&[0, 1, 3, 7]), 2.);
/// # Ok::<(), flowhn_attn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`], [`Error::Dtype`] or [`Error::Device`], naming the argument at fault; [`Error::Invalid`] if the mask does
/// not fit the numbers of queries and keys.
pub fn attention(q_bnhp: &Tensor, k_bmkp: &Tensor, v_bmkp: &Tensor, mask: &Mask) -> Result<Tensor> {
    const OP: &str = "attention";
    let [batch, n, n_heads, d_head] = check::dims(OP, "q_bnhp", q_bnhp, "[batch, n, n_heads, d_head]")?;
    let [_, m, n_kv_heads, _] = check::dims(OP, "k_bmkp", k_bmkp, "[batch, m, n_kv_heads, d_head]")?;
    if n_kv_heads == 0 || n_heads % n_kv_heads != 0 {
        return Err(Error::Shape {
            op: OP,
            arg: "k_bmkp",
            got: k_bmkp.size(),
            want: format!("a number of key heads that divides the {n_heads} query heads"),
        });
    }
    for (arg, tensor) in [("k_bmkp", k_bmkp), ("v_bmkp", v_bmkp)] {
        check::shape(OP, arg, tensor, &[batch, m, n_kv_heads, d_head])?;
        check::kind(OP, arg, tensor, &[q_bnhp.kind()])?;
        check::device(OP, arg, tensor, q_bnhp.device())?;
    }
    check::kind(OP, "q_bnhp", q_bnhp, &[Kind::Float, Kind::Double, Kind::BFloat16])?;
    if q_bnhp.numel() == 0 || m == 0 {
        return Ok(q_bnhp.f_zeros_like()?);
    }

    let on_cpu = q_bnhp.device() == Device::Cpu;
    let on_hopper = hopper::takes(q_bnhp, k_bmkp, v_bmkp)?;
    let takes = Takes { windows: !on_cpu && q_bnhp.kind() == Kind::BFloat16, spans: on_hopper };
    let visible = mask.resolve(OP, [batch, n, m], q_bnhp.device(), takes)?;
    if visible.keys.is_empty() {
        return Ok(q_bnhp.f_zeros_like()?);
    }
    let is_whole = visible.keys.len() as i64 == m;
    if on_hopper && is_whole && !matches!(visible.pattern, Pattern::Window(_) | Pattern::Dense(_)) {
        return hopper::attend([q_bnhp, k_bmkp, v_bmkp], &visible.pattern);
    }
    let heads_first = |x: &Tensor| -> Result<Tensor> { Ok(x.f_transpose(1, 2)?) };
    let shown = |x: &Tensor| -> Result<Tensor> {
        if is_whole {
            return heads_first(x);
        }
        heads_first(&x.f_narrow(1, visible.keys.start as i64, visible.keys.len() as i64)?)
    };
    let (q, k, v) = (heads_first(q_bnhp)?, shown(k_bmkp)?, shown(v_bmkp)?);
    let o_bhnp = match on_cpu {
        true => on_the_cpu(&q, &k, &v, &visible.pattern)?,
        false => fused::attend(&q, &k, &v, &visible)?,
    };
    heads_first(&o_bhnp)
}

/// On the CPU libtorch has one fused operator, for all dtypes and masks.
fn on_the_cpu(q_bhnp: &Tensor, k_bkmp: &Tensor, v_bkmp: &Tensor, pattern: &Pattern) -> Result<Tensor> {
    let (dense, is_causal) = match pattern {
        Pattern::All => (None, false),
        Pattern::Causal => (None, true),
        Pattern::Dense(mask_bnm) => (Some(mask_bnm), false),
        Pattern::Window(_) | Pattern::Spans { .. } => {
            return Err(Error::invalid("attention", "windows and documents must be spelled out on the CPU"));
        }
    };
    let shared = q_bhnp.size()[1] != k_bkmp.size()[1];
    Ok(Tensor::f_scaled_dot_product_attention(q_bhnp, k_bkmp, v_bkmp, dense, 0., is_causal, None, shared)?)
}
