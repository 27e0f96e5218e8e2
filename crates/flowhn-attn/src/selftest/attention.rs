//! Attention against the formula, with every kind of mask.

use flowhn_torch::testing::{Case, Outcome, Rule, check_replay, noise, same_bits};
use flowhn_torch::{Error, Flag, Result, catch, cpu};
use tch::{Device, Kind, Tensor};

use crate::{Mask, Positions, attention, hopper};

const BATCH: i64 = 2;

/// A mask in words: where queries and keys stand, the length of documents, the window.
#[derive(Clone, Debug)]
struct Pattern {
    name: &'static str,
    batch: i64,
    q: Vec<i64>,
    k: Vec<i64>,
    document_len: Option<i64>,
    window: Option<usize>,
    n_sinks: usize,
    /// Too many tokens for the plain formula on a CPU.
    is_long: bool,
}

/// Sizes: query heads, key heads, width of a head.
const SHAPES: [(i64, i64, i64); 5] = [(4, 4, 64), (12, 3, 64), (4, 2, 60), (4, 2, 24), (2, 1, 20)];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for pattern in patterns() {
        for shape in SHAPES {
            for kind in [Kind::Float, Kind::BFloat16] {
                let (heads, kv_heads, width) = shape;
                let name = format!("attention: {}, heads {heads}/{kv_heads} x {width}, {kind:?}", pattern.name);
                let case = if pattern.is_long { Case::on_cuda } else { Case::new };
                let pattern = pattern.clone();
                cases.push(case(name, move |device| check(&pattern, shape, kind, device)));
            }
        }
    }
    let documents = || Pattern { document_len: Some(150), ..causal("documents", 1000) };
    for (pattern, shape) in [
        (causal("causal, 64 tokens", 64), (4, 2, 128)),
        (causal("causal, 1000 tokens", 1000), (4, 2, 128)),
        (causal("causal, 1000 tokens", 1000), (2, 1, 20)),
        (documents(), (4, 2, 128)),
        (documents(), (4, 2, 24)),
        (plain("scattered among all", (0..300).map(|i| i * 3).collect(), (0..900).collect()), (4, 4, 64)),
    ] {
        let (heads, kv_heads, width) = shape;
        let name = format!("attention: nondeterministic, {}, heads {heads}/{kv_heads} x {width}", pattern.name);
        cases.push(Case::on_cuda(name, move |device| nondeterministic(&pattern, shape, device)));
    }
    for pattern in [
        causal("causal, 1000 tokens, batch 8", 1000),
        Pattern { document_len: Some(150), ..causal("documents of 1000 tokens, batch 8", 1000) },
    ] {
        for kind in [Kind::Float, Kind::BFloat16] {
            let pattern = Pattern { batch: 8, is_long: false, ..pattern.clone() };
            let name = format!("attention: {}, {kind:?}", pattern.name);
            cases.push(Case::new(name, move |device| check(&pattern, (1, 1, 64), kind, device)));
        }
    }
    for kind in [Kind::Float, Kind::BFloat16] {
        for width in [64, 24] {
            let name = |what| format!("attention: {what}, heads of {width}, {kind:?}");
            cases.push(Case::new(name("scores some 10,000 apart"), move |device| large_scores(width, kind, device)));
            cases.push(Case::on_cuda(name("replayed from a CUDA graph"), move |device| replays(width, kind, device)));
        }
        let name = format!("attention: gradients of some inputs alone, {kind:?}");
        cases.push(Case::new(name, move |device| some_gradients(kind, device)));
    }
    cases.push(Case::on_cuda("attention: documents out of order are NaN", falling_documents));
    cases
}

fn plain(name: &'static str, q: Vec<i64>, k: Vec<i64>) -> Pattern {
    let is_long = q.len() > 200;
    Pattern { name, batch: BATCH, q, k, document_len: None, window: None, n_sinks: 0, is_long }
}

fn causal(name: &'static str, n: i64) -> Pattern {
    plain(name, (0..n).collect(), (0..n).collect())
}

fn patterns() -> Vec<Pattern> {
    vec![
        causal("causal, 1 token", 1),
        causal("causal, 2 tokens", 2),
        causal("causal, 31 tokens", 31),
        causal("causal, 64 tokens", 64),
        causal("causal, 127 tokens", 127),
        causal("causal, 128 tokens", 128),
        causal("causal, 200 tokens", 200),
        plain("all keys before the queries", (150..280).collect(), (0..130).collect()),
        Pattern { document_len: Some(21), ..plain("documents, last few", (70..77).collect(), (0..77).collect()) },
        plain("last of a cache", vec![76], (0..77).collect()),
        plain("last few of a cache", (70..77).collect(), (0..77).collect()),
        plain("scattered among all", vec![2, 3, 9, 10, 66], (0..80).collect()),
        plain("both scattered", vec![5, 8, 21], vec![0, 1, 4, 5, 6, 9, 20, 21, 22]),
        plain("first query sees nothing", vec![1, 6, 9], vec![3, 4, 8, 30]),
        Pattern { window: Some(17), ..causal("window of 17", 100) },
        Pattern { window: Some(1), ..causal("window of 1", 70) },
        Pattern { window: Some(17), n_sinks: 5, ..causal("window of 17 and 5 sinks", 100) },
        causal("causal, 384 tokens", 384),
        causal("causal, 1000 tokens", 1000),
        plain("all keys before the queries, long", (900..1300).collect(), (0..400).collect()),
        Pattern { document_len: Some(13), ..causal("documents", 100) },
        Pattern { document_len: Some(70), ..causal("long documents", 200) },
        Pattern { document_len: Some(150), ..causal("long documents, some whole", 1000) },
        Pattern { document_len: Some(3), ..causal("many documents", 385) },
        Pattern { document_len: Some(23), window: Some(9), ..causal("documents and window", 90) },
        Pattern { window: Some(200), ..causal("window of 200", 1000) },
        Pattern { document_len: Some(310), window: Some(130), ..causal("long documents and window", 700) },
        Pattern {
            window: Some(5),
            ..plain("window and gaps", (0..90).map(|i| i * 3 / 2).collect(), (0..90).map(|i| i * 3 / 2).collect())
        },
    ]
}

impl Pattern {
    /// The document of a position; those of other sequences begin elsewhere.
    fn document(&self, batch_idx: i64, position: i64) -> i64 {
        self.document_len.map_or(0, |len| (position + 5 * batch_idx) / len)
    }

    fn sees(&self, batch_idx: i64, q: i64, k: i64) -> bool {
        k <= q
            && self.document(batch_idx, q) == self.document(batch_idx, k)
            && self.window.is_none_or(|window| k > q - window as i64 || k < self.n_sinks as i64)
    }

    /// `[batch, 1, n, m]`.
    fn visible(&self) -> Result<Tensor> {
        let (n, m) = (self.q.len() as i64, self.k.len() as i64);
        let mut flags = Vec::with_capacity((self.batch * n * m) as usize);
        for batch_idx in 0..self.batch {
            for &q in &self.q {
                flags.extend(self.k.iter().map(|&k| self.sees(batch_idx, q, k)));
            }
        }
        cpu::from_slice(&[self.batch, 1, n, m], &flags)
    }

    fn documents(&self, positions: &[i64]) -> Result<Tensor> {
        let of = |batch_idx| positions.iter().map(move |&position| self.document(batch_idx, position));
        let all: Vec<i64> = (0..self.batch).flat_map(of).collect();
        cpu::from_slice(&[self.batch, positions.len() as i64], &all)
    }
}

fn check(pattern: &Pattern, shape: (i64, i64, i64), kind: Kind, device: Device) -> Result<String> {
    // Where a query sees one key its weight is 1 and its gradient cancels to 0.
    judge(pattern, shape, kind, device, |rule, inputs| rule.check_at_scale(1., inputs, &[kind; 3], device))
}

/// Where equal runs need not give equal bits, `fused.rs` asks cuDNN.
fn nondeterministic(pattern: &Pattern, shape: (i64, i64, i64), device: Device) -> Result<String> {
    let kind = Kind::BFloat16;
    let was = Flag::Deterministic.is_set()?;
    Flag::Deterministic.set(false)?;
    let outcome = catch(|| {
        judge(pattern, shape, kind, device, |rule, inputs| rule.check_nondeterministic(1., inputs, &[kind; 3], device))
    });
    Flag::Deterministic.set(was)?;
    outcome
}

fn judge(
    pattern: &Pattern,
    shape: (i64, i64, i64),
    kind: Kind,
    device: Device,
    by: impl Fn(&Rule, &[Tensor]) -> Result<String>,
) -> Result<String> {
    let (heads, kv_heads, width) = shape;
    let (n, m) = (pattern.q.len() as i64, pattern.k.len() as i64);
    // Queries, keys and values are parts of one projection, as in the mixer, and so have gaps between tokens.
    let part = |len, heads, seed| noise(&[pattern.batch, len, heads + 1, width], seed).narrow(2, 1, heads) * 2.;
    let inputs = [part(n, heads, 1), part(m, kv_heads, 2), part(m, kv_heads, 3)];
    let visible = pattern.visible()?.to_device(device);
    let (q_positions, k_positions) = (Positions::new(&pattern.q, device)?, Positions::new(&pattern.k, device)?);
    let (q_documents, k_documents) =
        (pattern.documents(&pattern.q)?.to_device(device), pattern.documents(&pattern.k)?.to_device(device));
    let kernel = |x: &[Tensor]| -> Result<Vec<Tensor>> {
        let mut mask = Mask::positions(&q_positions, &k_positions);
        if pattern.document_len.is_some() {
            mask = match pattern.q == pattern.k {
                true => mask.with_documents(&q_documents),
                false => mask.with_segments(&q_documents, &k_documents),
            };
        }
        if let Some(window) = pattern.window {
            mask = mask.with_window(window).with_sinks(pattern.n_sinks);
        }
        Ok(vec![attention(&x[0], &x[1], &x[2], &mask)?])
    };
    let plain = |x: &[Tensor]| Ok(vec![formula(&x[0], &x[1], &x[2], &visible)]);
    by(&Rule { kernel: &kernel, plain: &plain, floor: Rule::floor_of(kind) }, &inputs)
}

/// A softmax that all but chooses one key: what a careless exponential makes infinite stays finite. The floor is what a few roundings of
/// such a score in f32 do to a weight.
fn large_scores(width: i64, kind: Kind, device: Device) -> Result<String> {
    let size = 3e4f64.sqrt();
    let inputs = [(4, 1, size), (2, 2, size), (2, 3, 1.)]
        .map(|(heads, seed, size)| noise(&[BATCH, 150, heads, width], seed) * size);
    let visible = causal("", 150).visible()?.to_device(device);
    let kernel = |x: &[Tensor]| Ok(vec![attention(&x[0], &x[1], &x[2], &Mask::causal())?]);
    let plain = |x: &[Tensor]| Ok(vec![formula(&x[0], &x[1], &x[2], &visible)]);
    let floor = 1e4 * 2f64.powi(-20);
    Rule { kernel: &kernel, plain: &plain, floor }.check_extremes(&inputs, &[kind; 3], device)
}

/// Causal, and within documents.
fn replays(width: i64, kind: Kind, device: Device) -> Result<String> {
    let pattern = Pattern { document_len: Some(70), ..causal("", 200) };
    let documents = pattern.documents(&pattern.q)?.to_device(device);
    let both = |x: &[Tensor]| {
        let within_documents = attention(&x[0], &x[1], &x[2], &Mask::causal().with_documents(&documents))?;
        Ok(vec![within_documents, attention(&x[0], &x[1], &x[2], &Mask::causal())?])
    };
    let inputs = [(4, 1), (2, 2), (2, 3)].map(|(heads, seed)| noise(&[BATCH, 200, heads, width], seed) * 2.);
    check_replay(&both, &inputs, &[kind; 3], device)
}

/// Whatever else needs a gradient, an input's is the same, for a gradient of the output that has no memory of its own.
fn some_gradients(kind: Kind, device: Device) -> Result<String> {
    let inputs = [(4, 1), (2, 2), (2, 3)]
        .map(|(heads, seed)| noise(&[BATCH, 150, heads, 64], seed).to_kind(kind).to_device(device));
    let gradients = |wanted: [bool; 3]| -> Result<[Tensor; 3]> {
        let leaves: [Tensor; 3] = std::array::from_fn(|i| inputs[i].detach().set_requires_grad(wanted[i]));
        let o = attention(&leaves[0], &leaves[1], &leaves[2], &Mask::causal())?;
        o.sum(Kind::Float).f_backward()?;
        Ok(leaves.map(|leaf| leaf.grad()))
    };
    let all = gradients([true; 3])?;
    for wanted in (1..7).map(|bits| [bits & 1 != 0, bits & 2 != 0, bits & 4 != 0]) {
        let some = gradients(wanted)?;
        for i in 0..3 {
            let is_right = if wanted[i] { same_bits(&some[i], &all[i]) } else { !some[i].defined() };
            if !is_right {
                let message = format!("the gradient of input {i} is another where {wanted:?} of the inputs need one");
                return Err(Error::invalid("attention", message));
            }
        }
    }
    Ok("the same bits".to_owned())
}

/// On a device nobody can check that documents follow one another without waiting for it.
fn falling_documents(device: Device) -> Result<Outcome> {
    let [q, k, v] = [1, 2, 3].map(|seed| noise(&[1, 4, 2, 64], seed).to_kind(Kind::BFloat16).to_device(device));
    let segments = Tensor::from_slice(&[1i64, 1, 0, 0]).view([1, 4]).to_device(device);
    if !hopper::takes(&q, &k, &v)? {
        return Ok(Outcome::NotRun("our kernels for whole sequences need compute capability 9.0".to_owned()));
    }
    let o = attention(&q, &k, &v, &Mask::causal().with_documents(&segments))?;
    let is_nan = Vec::<bool>::try_from(o.isnan().view([4, -1]).all_dim(1, false).to_device(Device::Cpu))?;
    match is_nan[..] == [false, false, true, false] {
        true => Ok("NaN".to_owned().into()),
        false => Err(Error::invalid("attention", format!("of four tokens these are NaN: {is_nan:?}"))),
    }
}

/// `softmax(q k^T / sqrt(d_head)) v` over the visible keys; zeros where there is none.
pub(super) fn formula(q_bnhp: &Tensor, k_bmkp: &Tensor, v_bmkp: &Tensor, visible: &Tensor) -> Tensor {
    let repeats = q_bnhp.size()[2] / k_bmkp.size()[2];
    let for_heads = |x: &Tensor| x.repeat_interleave_self_int(repeats, 2, None).transpose(1, 2);
    let scale = (q_bnhp.size()[3] as f64).sqrt().recip();
    let scores = q_bnhp.transpose(1, 2).matmul(&for_heads(k_bmkp).transpose(-1, -2)) * scale;
    // The softmax of a row without keys is 0 / 0; such rows are computed as if all were visible and then cleared.
    let any = visible.any_dim(-1, true);
    let hidden = visible.logical_not().logical_and(&any);
    let weights = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, None::<Kind>);
    let cleared = weights.masked_fill(&any.logical_not(), 0.);
    cleared.matmul(&for_heads(v_bmkp)).transpose(1, 2)
}
