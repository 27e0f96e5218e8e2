//! The choice among libtorch's fused attention operators on a CUDA device.
//!
//! Each operator is called by its own name, never through the one that picks among them: that one falls back to the plain formula,
//! and its memory, without a word. What was chosen, and why, by measurement on an H100 (`docs/kernels/attention.md`):
//!
//! | case | operator |
//! |---|---|
//! | bf16, whole sequences, the backward may add in any order | cuDNN |
//! | bf16, equal runs must give equal bits; a few queries against a cache | FlashAttention |
//! | bf16, sliding window | FlashAttention |
//! | bf16, masks that are spelled out (documents, routed positions) | cuDNN with a bias |
//! | f32 | the plain formula: the fused operators would round to fewer bits |

// b batch, h query heads, k key heads, n queries, m keys, p d_head

use tch::{Kind, Tensor};

use flowhn_torch::op::{Arg, call};
use flowhn_torch::{Error, Flag, Result};

use crate::mask::Pattern;

/// Head widths that the fused operators take are multiples of this.
const HEAD_MULTIPLE: i64 = 8;
/// The widest head of FlashAttention.
const MAX_HEAD: i64 = 256;
/// The widest head of cuDNN's backward.
const MAX_CUDNN_HEAD: i64 = 128;
/// Fewer queries than this are decoding: cuDNN would make a plan for every length of the cache.
const MIN_CUDNN_QUERIES: i64 = 64;

/// Attention of heads-first tensors, `[b, h, n, p]` and `[b, k, m, p]`, on a CUDA device.
pub(crate) fn attend(q_bhnp: &Tensor, k_bkmp: &Tensor, v_bkmp: &Tensor, pattern: &Pattern) -> Result<Tensor> {
    if q_bhnp.kind() != Kind::BFloat16 {
        return plain(q_bhnp, k_bkmp, v_bkmp, pattern);
    }
    let d_head = q_bhnp.size()[3];
    if d_head > MAX_HEAD {
        let want = format!("a d_head of at most {MAX_HEAD} in bf16 on a CUDA device; f32 takes any");
        return Err(Error::Shape { op: "attention", arg: "q_bnhp", got: q_bhnp.size(), want });
    }
    let scale = (d_head as f64).sqrt().recip();
    let padded = |x: &Tensor| -> Result<Tensor> {
        match (HEAD_MULTIPLE - d_head % HEAD_MULTIPLE) % HEAD_MULTIPLE {
            0 => Ok(x.shallow_clone()),
            missing => Ok(x.f_constant_pad_nd([0, missing])?),
        }
    };
    let heads = Heads { q: padded(q_bhnp)?, k: padded(k_bkmp)?, v: padded(v_bkmp)?, scale };
    let o_bhnp = match pattern {
        Pattern::Dense(mask) => heads.cudnn(Some(mask), false)?,
        Pattern::Window(window) => heads.flash_window(*window)?,
        Pattern::All | Pattern::Causal => {
            let is_causal = matches!(pattern, Pattern::Causal);
            match heads.suits_cudnn() && !Flag::Deterministic.is_set()? {
                true => heads.cudnn(None, is_causal)?,
                false => heads.flash(is_causal)?,
            }
        }
    };
    Ok(o_bhnp.f_narrow(3, 0, d_head)?)
}

/// Queries, keys and values with heads as wide as the operators want them.
struct Heads {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: f64,
}

impl Heads {
    fn suits_cudnn(&self) -> bool {
        let size = self.q.size();
        size[3] <= MAX_CUDNN_HEAD && size[2] >= MIN_CUDNN_QUERIES
    }

    fn cudnn(&self, visible: Option<&Tensor>, is_causal: bool) -> Result<Tensor> {
        let bias = visible.map(|visible| self.bias(visible)).transpose()?;
        let recorded = [&self.q, &self.k, &self.v].iter().any(|x| x.requires_grad());
        first(call(
            "aten::_scaled_dot_product_cudnn_attention",
            "",
            &[
                Arg::Tensor(&self.q),
                Arg::Tensor(&self.k),
                Arg::Tensor(&self.v),
                bias.as_ref().map_or(Arg::None, Arg::Tensor),
                Arg::Bool(recorded),
                Arg::Double(0.),
                Arg::Bool(is_causal),
                Arg::Bool(false),
                Arg::Double(self.scale),
            ],
        )?)
    }

    /// What is added to the scores: 0 for keys that a query sees, minus infinity for the others.
    fn bias(&self, visible: &Tensor) -> Result<Tensor> {
        let [batch, .., n] = [self.q.size()[0], self.q.size()[1], self.q.size()[2]];
        let bias = Tensor::f_zeros(visible.size(), (self.q.kind(), self.q.device()))?;
        let bias = bias.f_masked_fill(&visible.f_logical_not()?, f64::NEG_INFINITY)?;
        Ok(bias.f_expand([batch, 1, n, self.k.size()[2]], false)?)
    }

    fn flash(&self, is_causal: bool) -> Result<Tensor> {
        first(call(
            "aten::_scaled_dot_product_flash_attention",
            "",
            &[
                Arg::Tensor(&self.q),
                Arg::Tensor(&self.k),
                Arg::Tensor(&self.v),
                Arg::Double(0.),
                Arg::Bool(is_causal),
                Arg::Bool(false),
                Arg::Double(self.scale),
            ],
        )?)
    }

    /// Causal attention to the last `window` positions.
    fn flash_window(&self, window: i64) -> Result<Tensor> {
        let tokens_first = |x: &Tensor| -> Result<Tensor> { Ok(x.f_transpose(1, 2)?) };
        let (q, k, v) = (tokens_first(&self.q)?, tokens_first(&self.k)?, tokens_first(&self.v)?);
        let o_bnhp = first(call(
            "aten::_flash_attention_forward",
            "",
            &[
                Arg::Tensor(&q),
                Arg::Tensor(&k),
                Arg::Tensor(&v),
                Arg::None,
                Arg::None,
                Arg::Int(q.size()[1]),
                Arg::Int(k.size()[1]),
                Arg::Double(0.),
                Arg::Bool(true),
                Arg::Bool(false),
                Arg::Double(self.scale),
                Arg::Int(window - 1),
                Arg::Int(0),
            ],
        )?)?;
        tokens_first(&o_bnhp)
    }
}

/// libtorch's own formula in plain operators, which holds all scores in memory.
fn plain(q_bhnp: &Tensor, k_bkmp: &Tensor, v_bkmp: &Tensor, pattern: &Pattern) -> Result<Tensor> {
    let mask = match pattern {
        Pattern::Dense(mask) => Arg::Tensor(mask),
        Pattern::All | Pattern::Causal => Arg::None,
        Pattern::Window(_) => return Err(Error::invalid("attention", "a window must be spelled out in f32")),
    };
    first(call(
        "aten::_scaled_dot_product_attention_math",
        "",
        &[
            Arg::Tensor(q_bhnp),
            Arg::Tensor(k_bkmp),
            Arg::Tensor(v_bkmp),
            mask,
            Arg::Double(0.),
            Arg::Bool(matches!(pattern, Pattern::Causal)),
            Arg::None,
            Arg::None,
            Arg::Bool(q_bhnp.size()[1] != k_bkmp.size()[1]),
        ],
    )?)
}

fn first(outputs: Vec<Option<Tensor>>) -> Result<Tensor> {
    let output = outputs.into_iter().next().flatten();
    output.ok_or_else(|| Error::invalid("attention", "the operator returned no output"))
}
