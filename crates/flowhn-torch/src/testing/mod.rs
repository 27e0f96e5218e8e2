//! Helpers for tests of differentiable operations (feature `testing`).

mod case;
mod flops;
mod kernels;
mod replay;
mod rule;

pub use case::{Case, Outcome, run_on_cpu};
pub use flops::count_matmul_flops;
pub use kernels::{CompiledEntry, check_kernels, compile_all};
pub use replay::check_replay;
pub use rule::{Rule, noise, same_bits};

use tch::{Kind, Tensor};

use crate::{Error, Result, check};

/// Largest difference of two tensors, relative to the largest absolute value of `want`. NaN if either has a NaN; where `want`
/// is all zeros, any difference at all is a huge one.
pub fn max_rel(got: &Tensor, want: &Tensor) -> f64 {
    if want.numel() == 0 {
        return 0.;
    }
    let (got, want) = (got.detach().to_kind(Kind::Double), want.detach().to_kind(Kind::Double));
    let scale = want.abs().max().double_value(&[]).max(f64::MIN_POSITIVE);
    (got - want).abs().max().double_value(&[]) / scale
}

/// Asserts that two tensors agree to `tol` in the sense of [`max_rel`], and in shape.
///
/// # Panics
/// If they do not; the message names `what`.
#[track_caller]
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, tol: f64) {
    assert_eq!(got.size(), want.size(), "{what}: shape");
    let error = max_rel(got, want);
    assert!(error <= tol, "{what}: relative error {error:.3e} exceeds {tol:.1e}");
}

/// Compares the gradients of `f` with central differences, element by element, in double precision.
///
/// `f` maps the inputs to one tensor of any shape; it is contracted with a fixed pseudo-random direction first.
/// Inputs are double tensors; those that require a gradient are checked.
///
/// # Errors
/// Those of `f`; [`Error::Dtype`] if an input is not double; [`Error::Torch`] if nothing requires a gradient;
/// [`Error::Invalid`] that names the input and element where the two differ by more than
/// `tol * (1 + |difference quotient|)`.
pub fn gradcheck(f: impl Fn(&[Tensor]) -> Result<Tensor>, inputs: &[Tensor], step: f64, tol: f64) -> Result<()> {
    for input in inputs {
        check::kind("gradcheck", "inputs", input, &[Kind::Double])?;
    }
    let direction = |out: &Tensor| {
        let n = out.numel() as i64;
        (Tensor::arange(n, (Kind::Double, out.device())) * 0.7 + 0.3).sin().reshape(out.size())
    };
    let contracted = |inputs: &[Tensor]| -> Result<Tensor> {
        let out = f(inputs)?;
        Ok((&out * direction(&out)).sum(Kind::Double))
    };
    let leaves: Vec<Tensor> = inputs.iter().map(|x| x.detach().copy().set_requires_grad(x.requires_grad())).collect();
    let checked: Vec<usize> = (0..leaves.len()).filter(|&i| leaves[i].requires_grad()).collect();
    let wanted: Vec<&Tensor> = checked.iter().map(|&i| &leaves[i]).collect();
    let grads = Tensor::f_run_backward(&[contracted(&leaves)?], &wanted, false, false)?;

    for (&input_idx, grad) in checked.iter().zip(&grads) {
        let grad = match grad.defined() {
            true => Vec::<f64>::try_from(grad.contiguous().view(-1))?,
            // `f` does not use this input.
            false => vec![0.; leaves[input_idx].numel()],
        };
        for (element_idx, analytic) in grad.into_iter().enumerate() {
            let shifted = |delta: f64| -> Result<f64> {
                let moved: Vec<Tensor> = leaves.iter().map(|x| x.detach().contiguous().copy()).collect();
                let _ = moved[input_idx].view(-1).narrow(0, element_idx as i64, 1).g_add_scalar_(delta);
                Ok(tch::no_grad(|| contracted(&moved))?.double_value(&[]))
            };
            let numeric = (shifted(step)? - shifted(-step)?) / (2. * step);
            let close = (analytic - numeric).abs() <= tol * (1. + numeric.abs());
            if !close {
                let message = format!(
                    "input {input_idx}, element {element_idx}: gradient {analytic:.9}, difference quotient {numeric:.9}"
                );
                return Err(Error::invalid("gradcheck", message));
            }
        }
    }
    Ok(())
}
