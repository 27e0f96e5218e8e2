//! Attention against the formula in double precision, with every kind of mask.

use tch::{Device, Kind, Tensor};

use crate::common::{leaf, noise};
use flowhn_attn::{Mask, Positions, attention};
use flowhn_torch::testing::{assert_close, gradcheck, max_rel};

/// A mask in words: where queries and keys stand, their documents, the window.
struct Case {
    name: &'static str,
    order: Order,
    q: Vec<i64>,
    k: Vec<i64>,
    documents: Option<fn(batch: i64, position: i64) -> i64>,
    window: Option<usize>,
    n_sinks: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Order {
    Causal,
    Tail,
    Positions,
}

/// Documents with other borders in each sequence of the batch.
fn packed(batch: i64, position: i64) -> i64 {
    (position + 2 * batch) / 5
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut add = |name, order, q: Vec<i64>, k: Vec<i64>| {
        let documents: Option<fn(i64, i64) -> i64> = Some(packed);
        for (documents, window, n_sinks) in [
            (None, None, 0),
            (documents, None, 0),
            (None, Some(3), 0),
            (documents, Some(4), 0),
            (None, Some(3), 2),
            (documents, Some(2), 9),
        ] {
            cases.push(Case { name, order, q: q.clone(), k: k.clone(), documents, window, n_sinks });
        }
    };
    for n in [1, 2, 5, 37, 70] {
        add("causal", Order::Causal, (0..n).collect(), (0..n).collect());
        add("same positions", Order::Positions, (7..7 + n).collect(), (7..7 + n).collect());
    }
    for (n, m) in [(1, 1), (1, 33), (3, 11), (20, 53)] {
        add("tail", Order::Tail, (m - n..m).collect(), (0..m).collect());
        add("tail by positions", Order::Positions, (m - n..m).collect(), (0..m).collect());
    }
    add("window in the middle", Order::Positions, (10..20).collect(), (0..40).collect());
    add("window at the start", Order::Positions, (0..9).collect(), (0..40).collect());
    add("scattered", Order::Positions, vec![2, 3, 9, 10, 30], (0..31).collect());
    add("both scattered", Order::Positions, vec![5, 8, 21], vec![0, 1, 4, 5, 6, 9, 20, 21, 22]);
    add("first query sees nothing", Order::Positions, vec![1, 6, 9], vec![3, 4, 8, 30]);
    add("no query sees anything", Order::Positions, vec![1, 2], vec![3, 4, 5]);
    cases
}

struct Inputs {
    q: Tensor,
    k: Tensor,
    v: Tensor,
}

impl Case {
    const BATCH: i64 = 2;

    fn inputs(&self, heads: (i64, i64), d_head: i64, kind: Kind) -> Inputs {
        let (n, m) = (self.q.len() as i64, self.k.len() as i64);
        let make = |len, heads, seed| leaf(&noise(&[Self::BATCH, len, heads, d_head], seed, kind));
        Inputs { q: make(n, heads.0, 1), k: make(m, heads.1, 2), v: make(m, heads.1, 3) }
    }

    /// The rule, straight from its words.
    fn sees(&self, batch: i64, query: i64, key: i64) -> bool {
        key <= query
            && self.documents.is_none_or(|document| document(batch, query) == document(batch, key))
            && self.window.is_none_or(|window| key > query - window as i64 || key < self.n_sinks as i64)
    }

    fn run(&self, x: &Inputs) -> Tensor {
        let segments = |positions: &[i64]| {
            let document = self.documents.unwrap_or(packed);
            let ids: Vec<i64> =
                (0..Self::BATCH).flat_map(|b| positions.iter().map(move |&position| document(b, position))).collect();
            Tensor::from_slice(&ids).view([Self::BATCH, positions.len() as i64])
        };
        let positions = [&self.q, &self.k].map(|positions| Positions::new(positions, Device::Cpu).unwrap());
        let (q_segments, k_segments) = (segments(&self.q), segments(&self.k));
        let mut mask = match self.order {
            Order::Causal => Mask::causal(),
            Order::Tail => Mask::causal_tail(),
            Order::Positions => Mask::positions(&positions[0], &positions[1]),
        };
        if self.documents.is_some() {
            mask = mask.with_segments(&q_segments, &k_segments);
        }
        if let Some(window) = self.window {
            mask = mask.with_window(window).with_sinks(self.n_sinks);
        }
        attention(&x.q, &x.k, &x.v, &mask).unwrap()
    }

    /// The formula, in double precision, with keys copied for every query head and a softmax that is all zeros in an empty row.
    fn reference(&self, x: &Inputs) -> Tensor {
        let groups = x.q.size()[2] / x.k.size()[2];
        let heads = |x: &Tensor, copies: i64| {
            x.to_kind(Kind::Double).repeat_interleave_self_int(copies, 2, None).transpose(1, 2)
        };
        let (q, k, v) = (heads(&x.q, 1), heads(&x.k, groups), heads(&x.v, groups));
        let sees: Vec<f64> = (0..Self::BATCH)
            .flat_map(|b| self.q.iter().flat_map(move |&q| self.k.iter().map(move |&k| f64::from(self.sees(b, q, k)))))
            .collect();
        let sees = Tensor::from_slice(&sees).view([Self::BATCH, 1, self.q.len() as i64, self.k.len() as i64]);
        let scores = q.matmul(&k.transpose(-1, -2)) / (x.q.size()[3] as f64).sqrt();
        let weights = scores.exp() * sees;
        let total = weights.sum_dim_intlist([-1i64].as_slice(), true, Kind::Double);
        (weights / total.clamp_min(1e-300)).matmul(&v).transpose(1, 2)
    }

    fn label(&self, heads: (i64, i64), d_head: i64) -> String {
        let (n, m, documents) = (self.q.len(), self.k.len(), self.documents.is_some());
        format!(
            "{}: {n} of {m}, heads {heads:?} of {d_head}, documents {documents}, window {:?}, sinks {}",
            self.name, self.window, self.n_sinks
        )
    }
}

fn gradients(o: &Tensor, x: &Inputs) -> Vec<Tensor> {
    let loss = (o * noise(&o.size(), 4, o.kind())).sum(o.kind());
    if !loss.requires_grad() {
        return [&x.q, &x.k, &x.v].map(Tensor::zeros_like).into();
    }
    Tensor::run_backward(&[loss], &[&x.q, &x.k, &x.v], false, false)
}

#[test]
fn every_mask_gives_the_formulas_values_and_gradients() {
    for case in cases() {
        for (heads, d_head) in [((1, 1), 16), ((4, 2), 7), ((6, 2), 24), ((4, 1), 33)] {
            let label = case.label(heads, d_head);
            let x = case.inputs(heads, d_head, Kind::Double);
            let (o, want) = (case.run(&x), case.reference(&x));
            assert_close(&label, &o, &want, 1e-12);
            for (name, (got, want)) in ["q", "k", "v"].iter().zip(gradients(&o, &x).iter().zip(gradients(&want, &x))) {
                // A gradient may vanish altogether, as that of a query with one key does, so its scale is not its own.
                let error = (got - &want).abs().max().double_value(&[]);
                assert!(error <= 1e-10, "{label}: gradient of {name} is {error:.1e} off");
            }
        }
    }
}

#[test]
fn lower_precision_stays_near_the_formula() {
    for case in cases() {
        let (heads, d_head) = ((4, 2), 32);
        for (kind, tol) in [(Kind::Float, 2e-6), (Kind::BFloat16, 2e-2)] {
            let x = case.inputs(heads, d_head, kind);
            let (o, want) = (case.run(&x), case.reference(&x));
            assert_eq!(o.kind(), kind);
            assert_close(&case.label(heads, d_head), &o, &want, tol);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    for case in cases().iter().filter(|case| case.q.len() * case.k.len() <= 16 && case.name != "no query sees anything")
    {
        let x = case.inputs((2, 1), 4, Kind::Double);
        let run = |inputs: &[Tensor]| {
            let [q, k, v] = [0, 1, 2].map(|i: usize| inputs[i].shallow_clone());
            Ok(case.run(&Inputs { q, k, v }))
        };
        gradcheck(run, &[x.q, x.k, x.v], 1e-5, 1e-6).unwrap_or_else(|e| panic!("{}: {e}", case.label((2, 1), 4)));
    }
}

#[test]
fn a_query_without_keys_gets_zeros_and_sends_none_back() {
    let (q, k) = (Positions::new(&[1, 6], Device::Cpu).unwrap(), Positions::new(&[3, 4], Device::Cpu).unwrap());
    let tensors = [2i64, 1, 1].map(|heads| leaf(&noise(&[1, 2, heads, 8], heads as u64, Kind::Float)));
    let o = attention(&tensors[0], &tensors[1], &tensors[2], &Mask::positions(&q, &k)).unwrap();
    let size = |x: Tensor| x.abs().max().double_value(&[]);
    assert_eq!(size(o.select(1, 0)), 0.);
    assert!(size(o.select(1, 1)) > 0.);
    let grads = Tensor::run_backward(&[o.select(1, 0).sum(Kind::Float)], &tensors, false, false);
    assert!(grads.into_iter().all(|grad| size(grad) == 0.));

    // No tokens at all, on either side.
    let none = Positions::new(&[], Device::Cpu).unwrap();
    let empty = tensors[1].narrow(1, 0, 0);
    let o = attention(&tensors[0], &empty, &empty, &Mask::positions(&q, &none)).unwrap();
    assert_eq!((o.size(), size(o)), (vec![1, 2, 2, 8], 0.));
    let o = attention(&tensors[0].narrow(1, 0, 0), &tensors[1], &tensors[2], &Mask::positions(&none, &k)).unwrap();
    assert_eq!(o.size(), [1, 0, 2, 8]);
}

/// `x` with other values from token `t` on.
fn changed_from(x: &Tensor, t: i64) -> Tensor {
    let n = x.size()[1];
    Tensor::cat(&[x.narrow(1, 0, t), x.narrow(1, t, n - t) * -3. + 0.7], 1)
}

#[test]
fn a_later_token_leaves_earlier_rows_as_they_were_to_the_bit() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for n in [5i64, 64, 150, 577] {
            let [q, k, v] = [(4, 1), (2, 2), (2, 3)].map(|(heads, seed)| noise(&[2, n, heads, 32], seed, kind));
            let one_document = Tensor::zeros([2, n], (Kind::Int64, Device::Cpu));
            let every = Positions::range(0..n, Device::Cpu).unwrap();
            let masks = [
                ("causal", Mask::causal()),
                ("spelled out", Mask::causal().with_segments(&one_document, &one_document)),
                ("window", Mask::positions(&every, &every).with_window(3)),
            ];
            for (name, mask) in masks {
                let o = attention(&q, &k, &v, &mask).unwrap();
                assert_eq!(o, attention(&q, &k, &v, &mask).unwrap(), "{name}: the same twice");
                for t in [1, n / 2, n - 1] {
                    let [q, k, v] = [&q, &k, &v].map(|x| changed_from(x, t));
                    let changed = attention(&q, &k, &v, &mask).unwrap();
                    assert_eq!(changed.narrow(1, 0, t), o.narrow(1, 0, t), "{name}, {kind:?}, n {n}, t {t}");
                    assert_ne!(changed.narrow(1, t, n - t), o.narrow(1, t, n - t), "the change shows later");
                }
            }
        }
    }
}

#[test]
fn packed_documents_do_not_see_each_other() {
    let borders = [0i64, 41, 42, 100, 150];
    let ids: Vec<i64> = (0..150).map(|i| borders.iter().filter(|&&border| border <= i).count() as i64).collect();
    let segments = Tensor::from_slice(&ids).view([1, 150]);
    let [q, k, v] = [(4, 1), (2, 2), (2, 3)].map(|(heads, seed)| noise(&[1, 150, heads, 32], seed, Kind::Float));
    let mask = Mask::causal().with_segments(&segments, &segments);
    let pack = attention(&q, &k, &v, &mask).unwrap();
    for document in borders.windows(2) {
        let (start, len) = (document[0], document[1] - document[0]);
        let part = |x: &Tensor| x.narrow(1, start, len);
        let alone = attention(&part(&q), &part(&k), &part(&v), &Mask::causal()).unwrap();
        let error = max_rel(&part(&pack), &alone);
        assert!(error <= 1e-6, "document {document:?} alone: {error:.1e}");

        let other = |x: &Tensor| {
            let before = x.narrow(1, 0, start) * -3. + 0.7;
            let after = x.narrow(1, start + len, 150 - start - len) * 2.;
            Tensor::cat(&[before, part(x), after], 1)
        };
        let changed = attention(&other(&q), &other(&k), &other(&v), &mask).unwrap();
        assert_eq!(part(&changed), part(&pack), "document {document:?} beside others");
    }
}

#[test]
fn strides_do_not_matter() {
    let qkv = noise(&[2, 9, 8, 16], 1, Kind::Float);
    let parts = [(0, 4), (4, 2), (6, 2)].map(|(start, len)| qkv.narrow(2, start, len));
    let dense = [0, 1, 2].map(|i: usize| parts[i].contiguous());
    let spread = [0, 1, 2].map(|i: usize| parts[i].transpose(1, 3).contiguous().transpose(1, 3));
    let run = |x: &[Tensor; 3]| attention(&x[0], &x[1], &x[2], &Mask::causal()).unwrap();
    assert_eq!(run(&parts), run(&dense));
    assert_close("features far apart", &run(&spread), &run(&dense), 1e-6);
}

#[test]
fn mistakes_are_named() {
    let [q, k] = [4, 2].map(|heads| noise(&[2, 5, heads, 8], 0, Kind::Float));
    let message = |q: &Tensor, k: &Tensor, v: &Tensor, mask: Mask| attention(q, k, v, &mask).unwrap_err().to_string();
    let causal = Mask::causal();
    assert!(
        message(&q, &k.narrow(3, 0, 4), &k, causal).contains("k_bmkp has shape [2, 5, 2, 4], expected [2, 5, 2, 8]")
    );
    assert!(message(&q, &k, &k.narrow(1, 0, 4), causal).contains("v_bmkp has shape [2, 4, 2, 8]"));
    let three = noise(&[2, 5, 3, 8], 0, Kind::Float);
    assert!(message(&q, &three, &three, causal).contains("divides the 4 query heads"));
    assert!(message(&q, &k.to_kind(Kind::Double), &k, causal).contains("k_bmkp is Double, expected Float"));
    let [qi, ki] = [&q, &k].map(|x| x.to_kind(Kind::Int64));
    assert!(message(&qi, &ki, &ki, causal).contains("q_bnhp is Int64, expected Float or Double or BFloat16"));
    let shorter = k.narrow(1, 0, 3);
    assert!(message(&q, &shorter, &shorter, causal).contains("5 queries and 3 keys"));
    assert!(message(&q, &shorter, &shorter, Mask::causal_tail()).contains("5 queries cannot be the last of 3 keys"));
    assert!(message(&q, &k, &k, causal.with_window(0)).contains("a window of 0"));
    let four = Positions::range(0..4, Device::Cpu).unwrap();
    assert!(message(&q, &k, &k, Mask::positions(&four, &four)).contains("4 positions for 5 queries"));
    let segments = Tensor::zeros([2, 5], (Kind::Int64, Device::Cpu));
    let wrong = Tensor::zeros([2, 4], (Kind::Int64, Device::Cpu));
    assert!(message(&q, &k, &k, causal.with_segments(&segments, &wrong)).contains("k_segments_bm has shape [2, 4]"));
    let floats = segments.to_kind(Kind::Float);
    assert!(message(&q, &k, &k, causal.with_segments(&floats, &segments)).contains("q_segments_bn is Float"));
}
