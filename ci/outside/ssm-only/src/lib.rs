//! A leaky integrator, computed and differentiated with `flowhn-ssm` and `tch` alone.

#![forbid(unsafe_code)]

use flowhn_ssm::{DtActivation, Result, SelectiveScan, selective_scan};
use tch::{Kind, Tensor};

/// Halves its memory before each input and adds the input times ln 2. Takes and returns `[batch, seq_len, 1]`.
///
/// # Errors
/// An input of another shape, or of a dtype that the scan does not take.
pub fn leaky_integrator(x_ble: &Tensor) -> Result<Tensor> {
    let ones = x_ble.ones_like();
    let dt_ble = &ones * std::f64::consts::LN_2;
    let a_en = -Tensor::ones([1, 1], (Kind::Float, x_ble.device()));
    // One channel and one state: the projections in and out have the shape of the input.
    let mut scan = SelectiveScan::new(x_ble, &dt_ble, &a_en, &ones, &ones);
    scan.dt_activation = DtActivation::Identity;
    Ok(selective_scan(&scan)?.y_ble)
}

#[cfg(test)]
mod tests {
    use std::f32::consts::LN_2;

    use super::*;

    #[test]
    fn the_scan_follows_its_recurrence() {
        let x = Tensor::from_slice(&[1_f32, 1.0, 1.0]).reshape([1, 3, 1]);
        let y = leaky_integrator(&x).expect("the shapes fit");
        let expected = Tensor::from_slice(&[LN_2, 1.5 * LN_2, 1.75 * LN_2]).reshape([1, 3, 1]);
        assert!(y.allclose(&expected, 1e-6, 1e-6, false), "{y}");
    }

    #[test]
    fn gradients_flow_back_in_time() {
        let x = Tensor::from_slice(&[3_f32, -1.0, 2.0]).reshape([1, 3, 1]).set_requires_grad(true);
        let y = leaky_integrator(&x).expect("the shapes fit");
        y.select(1, 2).sum(Kind::Float).backward();
        let expected = Tensor::from_slice(&[0.25 * LN_2, 0.5 * LN_2, LN_2]).reshape([1, 3, 1]);
        assert!(x.grad().allclose(&expected, 1e-6, 1e-6, false), "{}", x.grad());
    }

    #[test]
    fn a_wrong_shape_is_an_error_that_names_the_argument() {
        let x = Tensor::ones([1, 3, 2], (Kind::Float, tch::Device::Cpu));
        let error = leaky_integrator(&x).expect_err("two channels do not fit one decay").to_string();
        assert!(error.contains("a_en") && error.contains("[1, 1]"), "{error}");
    }
}
