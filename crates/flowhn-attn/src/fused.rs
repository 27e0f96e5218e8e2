//! The choice among libtorch's fused attention operators on a CUDA device.
//!
//! Each operator is called by its own name, never through the one that picks among them: that one falls back to the plain formula,
//! and its memory, without a word. What was chosen, and why, by measurement on an H100 (`docs/kernels/attention.md`):
//!
//! - bf16, whole sequences: cuDNN, or FlashAttention where equal runs must give equal bits (cuDNN's backward adds in any order);
//! - bf16, a few queries against a cache, and sliding windows: FlashAttention (cuDNN would plan anew for every length of the cache; one
//!   query has a kernel of our own, `decode.rs`);
//! - bf16, masks that are spelled out (documents, routed positions): cuDNN with a bias, or where equal bits are wanted, or a query may
//!   see no key at all, the memory-efficient operator, whose result is then 0;
//! - f32: the plain formula, because the fused operators would round to fewer bits.
//!
//! Whole sequences with heads of 64 on Hopper do not come here: `hopper.rs`.

// b batch, h query heads, k key heads, n queries, m keys, p d_head

use tch::{Kind, Tensor};

use flowhn_torch::op::{Arg, call};
use flowhn_torch::{Error, Flag, Result};

use crate::mask::{Pattern, Visible};

/// Head widths, and the rows of a bias in memory, are multiples of this in the fused operators.
const MULTIPLE: i64 = 8;
/// The widest head of FlashAttention.
const MAX_HEAD: i64 = 256;
/// The widest head of cuDNN's backward.
const MAX_CUDNN_HEAD: i64 = 128;
/// Fewer queries than this are decoding.
const MIN_CUDNN_QUERIES: i64 = 64;

/// Attention of heads-first tensors, `[b, h, n, p]` and `[b, k, m, p]`, on a CUDA device.
pub(crate) fn attend(q_bhnp: &Tensor, k_bkmp: &Tensor, v_bkmp: &Tensor, visible: &Visible) -> Result<Tensor> {
    if q_bhnp.kind() != Kind::BFloat16 {
        return plain(q_bhnp, k_bkmp, v_bkmp, &visible.pattern);
    }
    let d_head = q_bhnp.size()[3];
    if d_head > MAX_HEAD {
        let want = format!("a d_head of at most {MAX_HEAD} in bf16 on a CUDA device; f32 takes any");
        return Err(Error::Shape { op: "attention", arg: "q_bnhp", got: q_bhnp.size(), want });
    }
    let scale = (d_head as f64).sqrt().recip();
    let padded = |x: &Tensor| -> Result<Tensor> {
        match missing(d_head) {
            0 => Ok(x.shallow_clone()),
            missing => Ok(x.f_constant_pad_nd([0, missing])?),
        }
    };
    let heads = Heads { q: padded(q_bhnp)?, k: padded(k_bkmp)?, v: padded(v_bkmp)?, scale };
    let is_causal = matches!(visible.pattern, Pattern::Causal);
    let o_bhnp = match operator(visible, d_head, q_bhnp.size()[2], Flag::Deterministic.is_set()?)? {
        Operator::Cudnn(mask) => heads.cudnn(mask, is_causal)?,
        Operator::MemoryEfficient(mask) => heads.memory_efficient(mask)?,
        Operator::FlashWindow(window) => heads.flash_window(window)?,
        Operator::Flash => heads.flash(is_causal)?,
    };
    // A view of everything would still cost a backward that fills zeros and copies.
    Ok(if missing(d_head) == 0 { o_bhnp } else { o_bhnp.f_narrow(3, 0, d_head)? })
}

/// One of libtorch's fused operators.
#[derive(Debug)]
enum Operator<'a> {
    Cudnn(Option<&'a Tensor>),
    MemoryEfficient(&'a Tensor),
    Flash,
    FlashWindow(i64),
}

/// The one that answers for `n` queries.
fn operator(visible: &Visible, d_head: i64, n: i64, deterministic: bool) -> Result<Operator<'_>> {
    let cudnn = d_head <= MAX_CUDNN_HEAD && n >= MIN_CUDNN_QUERIES && !deterministic;
    Ok(match &visible.pattern {
        Pattern::Dense(mask) if cudnn && visible.sees_itself => Operator::Cudnn(Some(mask)),
        Pattern::Dense(mask) => Operator::MemoryEfficient(mask),
        Pattern::Window(window) => Operator::FlashWindow(*window),
        Pattern::Spans { .. } => return Err(Error::invalid("attention", "documents must be spelled out here")),
        Pattern::All | Pattern::Causal if cudnn => Operator::Cudnn(None),
        Pattern::All | Pattern::Causal => Operator::Flash,
    })
}

/// What a length lacks to a multiple that the operators take.
fn missing(len: i64) -> i64 {
    (MULTIPLE - len % MULTIPLE) % MULTIPLE
}

/// Queries, keys and values with heads as wide as the operators want them.
struct Heads {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: f64,
}

impl Heads {
    /// Whether a backward may follow, which needs the sums of the softmax.
    fn recorded(&self) -> bool {
        [&self.q, &self.k, &self.v].iter().any(|x| x.requires_grad())
    }

    fn cudnn(&self, mask: Option<&Tensor>, is_causal: bool) -> Result<Tensor> {
        let bias = mask.map(|mask| self.bias(mask)).transpose()?;
        first(call(
            "aten::_scaled_dot_product_cudnn_attention",
            "",
            &[
                Arg::Tensor(&self.q),
                Arg::Tensor(&self.k),
                Arg::Tensor(&self.v),
                bias.as_ref().map_or(Arg::None, Arg::Tensor),
                Arg::Bool(self.recorded()),
                Arg::Double(0.),
                Arg::Bool(is_causal),
                Arg::Bool(false),
                Arg::Double(self.scale),
            ],
        )?)
    }

    /// It does not share keys among heads, so it is asked once for each query head of a group, and no key is repeated in memory.
    fn memory_efficient(&self, mask: &Tensor) -> Result<Tensor> {
        let size = self.q.size();
        let [batch, n_heads, n] = [size[0], size[1], size[2]];
        let kv_heads = self.k.size()[1];
        let bias = self.bias(mask)?.f_expand([batch, kv_heads, n, self.k.size()[2]], false)?;
        let q_bkgnp = self.q.f_unflatten(1, [kv_heads, n_heads / kv_heads])?;
        let mut parts_bnkp = Vec::new();
        for head in 0..n_heads / kv_heads {
            let o_bknp = first(call(
                "aten::_scaled_dot_product_efficient_attention",
                "",
                &[
                    Arg::Tensor(&q_bkgnp.f_select(2, head)?),
                    Arg::Tensor(&self.k),
                    Arg::Tensor(&self.v),
                    Arg::Tensor(&bias),
                    Arg::Bool(self.recorded()),
                    Arg::Double(0.),
                    Arg::Bool(false),
                    Arg::Double(self.scale),
                ],
            )?)?;
            parts_bnkp.push(o_bknp.f_transpose(1, 2)?);
        }
        let o_bnkp = match parts_bnkp.len() {
            1 => parts_bnkp.swap_remove(0),
            _ => Tensor::f_stack(&parts_bnkp, 3)?.f_flatten(2, 3)?,
        };
        Ok(o_bnkp.f_transpose(1, 2)?)
    }

    /// What is added to the scores, `[batch, 1, n, m]`: 0 for keys that a query sees, minus infinity for the others. Its rows are
    /// aligned in memory.
    fn bias(&self, mask: &Tensor) -> Result<Tensor> {
        let [batch, n, m] = [self.q.size()[0], self.q.size()[2], self.k.size()[2]];
        let bias = hide(mask, m + missing(m), self.q.kind())?;
        Ok(bias.f_expand([batch, 1, n, m], false)?)
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
    let bias = match pattern {
        Pattern::Dense(mask) => Some(hide(mask, mask.size()[3], q_bhnp.kind())?),
        Pattern::All | Pattern::Causal => None,
        Pattern::Window(_) | Pattern::Spans { .. } => {
            return Err(Error::invalid("attention", "windows and documents must be spelled out in f32"));
        }
    };
    first(call(
        "aten::_scaled_dot_product_attention_math",
        "",
        &[
            Arg::Tensor(q_bhnp),
            Arg::Tensor(k_bkmp),
            Arg::Tensor(v_bkmp),
            bias.as_ref().map_or(Arg::None, Arg::Tensor),
            Arg::Double(0.),
            Arg::Bool(matches!(pattern, Pattern::Causal)),
            Arg::None,
            Arg::None,
            Arg::Bool(q_bhnp.size()[1] != k_bkmp.size()[1]),
        ],
    )?)
}

/// What is added to the scores, in rows of memory that are `row_len` long: 0 where `mask` is true, minus infinity where it is not.
fn hide(mask: &Tensor, row_len: i64, kind: Kind) -> Result<Tensor> {
    let (size, device) = (mask.size(), mask.device());
    let room = Tensor::f_zeros([size[0], size[1], size[2], row_len], (kind, device))?;
    let mut bias = room.f_narrow(3, 0, size[3])?;
    Ok(bias.f_masked_fill_(&mask.f_logical_not()?, f64::NEG_INFINITY)?)
}

fn first(outputs: Vec<Option<Tensor>>) -> Result<Tensor> {
    let output = outputs.into_iter().next().flatten();
    output.ok_or_else(|| Error::invalid("attention", "the operator returned no output"))
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// The operator for so wide heads and so many queries, as text without what is in its mask.
    fn chosen(pattern: Pattern, sees_itself: bool, [d_head, n]: [i64; 2], deterministic: bool) -> String {
        let visible = Visible { pattern, sees_itself, keys: 0..n as usize };
        let name = format!("{:?}", operator(&visible, d_head, n, deterministic).unwrap());
        name.split('(').next().unwrap_or_default().to_owned()
    }

    #[test]
    fn cudnn_answers_where_bits_may_differ_and_nowhere_else() {
        let dense = || Pattern::Dense(Tensor::ones([1, 1, 2, 2], (Kind::Bool, Device::Cpu)));
        let size = [128, 1000];
        for (deterministic, whole, masked) in [(false, "Cudnn", "Cudnn"), (true, "Flash", "MemoryEfficient")] {
            assert_eq!(chosen(Pattern::Causal, true, size, deterministic), whole);
            assert_eq!(chosen(Pattern::All, true, size, deterministic), whole);
            assert_eq!(chosen(dense(), true, size, deterministic), masked);
            assert_eq!(chosen(dense(), false, size, deterministic), "MemoryEfficient", "a query may see no key");
            assert_eq!(chosen(Pattern::Window(5), true, size, deterministic), "FlashWindow");
        }
        assert_eq!(chosen(Pattern::Causal, true, [136, 1000], false), "Flash", "wide heads");
        assert_eq!(chosen(Pattern::Causal, true, [64, 63], false), "Flash", "few queries");
        assert_eq!(chosen(Pattern::Causal, true, [64, 64], false), "Cudnn");
    }
}
