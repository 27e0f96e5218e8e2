//! The selective scan against its plain reference.

mod common;

use common::{normal, resets, strided};
use flowhn_ssm::{
    DtActivation, Result, SelectiveScan, SelectiveScanOutput, SelectiveScanStep, reference, selective_scan,
    selective_scan_step,
};
use flowhn_torch::testing::{assert_close, gradcheck, max_rel};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

/// Every float argument, in the order of `NAMES`, as f64.
struct Case {
    tensors: Vec<Tensor>,
    reset_bl: Option<Tensor>,
    dt_activation: DtActivation,
}

const NAMES: [&str; 9] = ["x", "dt", "a", "b", "c", "d", "z", "dt_bias", "initial_state"];

impl Case {
    fn new(batch: i64, seq_len: i64, d_inner: i64, d_state: i64) -> Self {
        let ble = [batch, seq_len, d_inner];
        let tensors = vec![
            normal(1, &ble),
            normal(2, &ble),
            -normal(3, &[d_inner, d_state]).exp(),
            normal(4, &[batch, seq_len, d_state]),
            normal(5, &[batch, seq_len, d_state]),
            normal(6, &[d_inner]),
            normal(7, &ble),
            normal(8, &[d_inner]) - 1.,
            normal(9, &[batch, d_inner, d_state]),
        ];
        Self { tensors, reset_bl: None, dt_activation: DtActivation::Softplus }
    }

    fn with_resets(mut self, every: i64) -> Self {
        let size = self.tensors[0].size();
        self.reset_bl = Some(resets(size[0], size[1], every));
        self
    }

    /// The same case with activations in `kind`, parameters and state in f32 (f64 for f64); leaves that require gradients.
    fn to_kind(&self, kind: Kind) -> Self {
        let param_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let convert = |(i, t): (usize, &Tensor)| {
            let kind = if [2, 5, 7, 8].contains(&i) { param_kind } else { kind };
            t.to_kind(kind).copy().detach().set_requires_grad(true)
        };
        Self {
            tensors: self.tensors.iter().enumerate().map(convert).collect(),
            reset_bl: self.reset_bl.as_ref().map(Tensor::shallow_clone),
            dt_activation: self.dt_activation,
        }
    }

    fn args<'a>(&'a self, t: &'a [Tensor]) -> SelectiveScan<'a> {
        SelectiveScan {
            d_e: Some(&t[5]),
            z_ble: Some(&t[6]),
            dt_bias_e: Some(&t[7]),
            initial_state_ben: Some(&t[8]),
            reset_bl: self.reset_bl.as_ref(),
            dt_activation: self.dt_activation,
            ..SelectiveScan::new(&t[0], &t[1], &t[2], &t[3], &t[4])
        }
    }

    /// Output, final state, and the gradients of a fixed combination of both.
    fn run(&self, op: fn(&SelectiveScan) -> Result<SelectiveScanOutput>) -> Vec<Tensor> {
        let out = op(&self.args(&self.tensors)).unwrap();
        let loss = |t: &Tensor, seed| (t.to_kind(Kind::Double) * normal(seed, &t.size())).sum(Kind::Double);
        let loss = loss(&out.y_ble, 20) + loss(&out.final_state_ben, 21);
        let mut results = vec![out.y_ble, out.final_state_ben];
        results.extend(Tensor::run_backward(&[loss], &self.tensors, false, false));
        results
    }
}

/// `max|kernel - exact| <= 2 max|plain - exact| + floor`, for outputs and gradients.
fn assert_as_exact_as_plain(case: &Case, kind: Kind, floor: f64) {
    let exact = case.to_kind(Kind::Double).run(reference::selective_scan);
    // What bf16 inputs lose by being rounded is not the kernel's doing: the exact result starts from the rounded inputs.
    let rounded = case.to_kind(kind);
    let exact = if kind == Kind::Double { exact } else { rounded.to_kind(Kind::Double).run(reference::selective_scan) };
    let (plain, kernel) = (rounded.run(reference::selective_scan), rounded.run(selective_scan));
    let names = ["y", "final_state"].into_iter().chain(NAMES);
    for (((name, exact), plain), kernel) in names.zip(&exact).zip(&plain).zip(&kernel) {
        assert_eq!((plain.size(), plain.kind()), (kernel.size(), kernel.kind()), "{name}");
        let (error, allowed) = (max_rel(kernel, exact), 2. * max_rel(plain, exact) + floor);
        assert!(error <= allowed, "{name} in {kind:?}: error {error:.2e}, allowed {allowed:.2e}");
    }
}

#[test]
fn gradients_match_finite_differences() {
    for with_resets in [false, true] {
        let case = Case::new(2, 19, 3, 2);
        let case = if with_resets { case.with_resets(5) } else { case };
        for output_idx in 0..2 {
            let f = |t: &[Tensor]| {
                let out = selective_scan(&case.args(t))?;
                Ok(if output_idx == 0 { out.y_ble } else { out.final_state_ben })
            };
            gradcheck(f, &case.to_kind(Kind::Double).tensors, 1e-5, 1e-7).unwrap();
        }
    }
}

#[test]
fn f64_equals_the_reference() {
    for (batch, seq_len, d_inner, d_state) in
        [(1, 1, 1, 1), (2, 2, 3, 5), (1, 16, 32, 16), (2, 17, 33, 16), (3, 31, 64, 8), (1, 97, 65, 3), (2, 33, 130, 16)]
    {
        for case in [
            Case::new(batch, seq_len, d_inner, d_state),
            Case::new(batch, seq_len, d_inner, d_state).with_resets(5),
            Case {
                dt_activation: DtActivation::Identity,
                ..Case::new(batch, seq_len, d_inner, d_state).with_resets(1)
            },
        ] {
            let case = case.to_kind(Kind::Double);
            let (want, got) = (case.run(reference::selective_scan), case.run(selective_scan));
            let names = ["y", "final_state"].into_iter().chain(NAMES);
            for ((name, got), want) in names.zip(&got).zip(&want) {
                let what = format!("{name} at {batch} x {seq_len} x {d_inner} x {d_state}");
                let scale = want.abs().max().double_value(&[]).max(1e-3);
                let error = (got - want).abs().max().double_value(&[]) / scale;
                assert_eq!(got.size(), want.size(), "{what}");
                assert!(error < 1e-12, "{what}: {error:e}");
            }
        }
    }
}

#[test]
fn f32_and_bf16_are_as_exact_as_the_plain_form() {
    for case in [Case::new(2, 37, 40, 16), Case::new(1, 130, 96, 16).with_resets(23), Case::new(3, 1, 7, 4)] {
        assert_as_exact_as_plain(&case, Kind::Float, 1e-6);
        assert_as_exact_as_plain(&case, Kind::BFloat16, 1e-6);
    }
}
