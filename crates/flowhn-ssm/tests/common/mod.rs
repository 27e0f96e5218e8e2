//! What every test file needs: inputs, and the two ways of comparing an operation with its reference.
#![allow(dead_code, reason = "each test file uses its own part")]

use flowhn_ssm::Result;
use flowhn_torch::testing::{gradcheck, max_rel};
use tch::{Device, Kind, Tensor};

/// An operation as a function of its float arguments to output and final state.
pub type Op<'a> = &'a dyn Fn(&[Tensor]) -> Result<[Tensor; 2]>;

/// One set of arguments.
pub struct Case {
    /// What failures call it.
    pub what: String,
    /// The float arguments with their names, f64.
    pub inputs: Vec<(&'static str, Tensor)>,
    /// Arguments that stay f32 when activations are bf16.
    pub params: &'static [&'static str],
}

impl Case {
    /// Activations in `kind`, parameters and states in f32 (f64 with f64); leaves that require gradients.
    pub fn leaves(&self, kind: Kind) -> Vec<Tensor> {
        let param_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let convert = |(name, t): &(&str, Tensor)| {
            let kind = if self.params.contains(name) { param_kind } else { kind };
            t.to_kind(kind).copy().detach().set_requires_grad(true)
        };
        self.inputs.iter().map(convert).collect()
    }

    fn names(&self) -> impl Iterator<Item = &'static str> {
        ["output", "final state"].into_iter().chain(self.inputs.iter().map(|(name, _)| *name))
    }

    /// Finite differences against the gradients of every argument, through output and final state.
    pub fn check_gradients(&self, op: Op) {
        for output_idx in 0..2 {
            let f = |t: &[Tensor]| Ok(op(t)?[output_idx].shallow_clone());
            let outcome = gradcheck(f, &self.leaves(Kind::Double), 1e-5, 1e-7);
            outcome.unwrap_or_else(|e| panic!("{}, output {output_idx}: {e}", self.what));
        }
    }

    /// Outputs and gradients in f64 agree to rounding.
    pub fn check_f64(&self, op: Op, reference: Op) {
        let leaves = self.leaves(Kind::Double);
        for ((name, got), want) in self.names().zip(results(op, &leaves)).zip(results(reference, &leaves)) {
            let scale = if want.numel() == 0 { 1. } else { want.abs().max().double_value(&[]).max(1e-3) };
            let error = if want.numel() == 0 { 0. } else { (&got - &want).abs().max().double_value(&[]) / scale };
            assert_eq!(got.size(), want.size(), "{}: {name}", self.what);
            assert!(error < 1e-11, "{}: {name} is off by {error:e}", self.what);
        }
    }

    /// `max|op - exact| <= 2 max|plain - exact| + 1e-6`, relative to the largest value, for outputs and gradients.
    ///
    /// The exact results are those of the reference in f64 from the inputs as `kind` rounds them.
    pub fn check_rounding(&self, kind: Kind, op: Op, reference: Op) {
        let leaves = self.leaves(kind);
        let widened: Vec<Tensor> =
            leaves.iter().map(|t| t.detach().to_kind(Kind::Double).set_requires_grad(true)).collect();
        let exact = results(reference, &widened);
        let (plain, got) = (results(reference, &leaves), results(op, &leaves));
        for (((name, exact), plain), got) in self.names().zip(&exact).zip(&plain).zip(&got) {
            assert_eq!((plain.size(), plain.kind()), (got.size(), got.kind()), "{}: {name}", self.what);
            let (error, allowed) = (max_rel(got, exact), 2. * max_rel(plain, exact) + 1e-6);
            assert!(error <= allowed, "{}: {name} in {kind:?}: {error:.2e}, allowed {allowed:.2e}", self.what);
        }
    }
}

/// Output, final state, and the gradients of a fixed combination of both.
pub fn results(op: Op, leaves: &[Tensor]) -> Vec<Tensor> {
    let outputs = op(leaves).unwrap();
    let loss = |t: &Tensor, seed| (t.to_kind(Kind::Double) * normal(seed, &t.size())).sum(Kind::Double);
    let loss = loss(&outputs[0], 20) + loss(&outputs[1], 21);
    let mut results = Vec::from(outputs);
    results.extend(Tensor::run_backward(&[loss], leaves, false, false));
    results
}

/// Values of mean 0 and deviation near 1 that depend on seed and shape alone, in f64.
pub fn normal(seed: i64, shape: &[i64]) -> Tensor {
    let n: i64 = shape.iter().product();
    let index = Tensor::arange(n, (Kind::Double, Device::Cpu)) + 1.;
    // Four sequences that fill the unit interval evenly; their sum is close to normal.
    let part = |i: i64| (&index * ((4 * seed + i + 2) as f64 * 0.618_033_988_749_895).fract()).frac() - 0.5;
    ((part(0) + part(1) + part(2) + part(3)) * 1.732).reshape(shape)
}

/// A mask with one reset in `every` tokens, position 0 of the first sequence among them.
pub fn resets(batch: i64, seq_len: i64, every: i64) -> Tensor {
    let index = Tensor::arange(batch * seq_len, (Kind::Int64, Device::Cpu)).view([batch, seq_len]);
    (index * 7).remainder(every).eq(0)
}

/// A tensor with the same values in another layout: every second channel of a larger tensor, tokens outermost.
pub fn strided(t: &Tensor) -> Tensor {
    let apart = Tensor::stack(&[t, &t.zeros_like()], -1).flatten(-2, -1);
    let tokens_first = apart.transpose(0, 1).contiguous().transpose(0, 1);
    tokens_first.slice(t.dim() as i64 - 1, 0, None, 2)
}

/// A tensor with the same values whose rows lie inside wider ones, as after splitting a projection.
pub fn widened(t: &Tensor) -> Tensor {
    let last = t.dim() as i64 - 1;
    Tensor::cat(&[&t.zeros_like(), t, &t.zeros_like()], last).narrow(
        last,
        t.size()[last as usize],
        t.size()[last as usize],
    )
}

/// Whether two tensors have the same bits.
pub fn same_bits(a: &Tensor, b: &Tensor) -> bool {
    a.kind() == b.kind() && a.equal(b)
}

/// Runs `f` on a rayon pool of `n_threads`.
pub fn with_threads<T: Send>(n_threads: usize, f: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().unwrap().install(f)
}
