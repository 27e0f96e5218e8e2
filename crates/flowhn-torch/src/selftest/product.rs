//! Matrix products by whichever way was found to be the fastest.

use tch::{Device, Kind, Tensor};

use super::{ensure, of_cuda};
use crate::testing::Case;
use crate::{Result, Sum, op, product, product_into};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = vec![of_cuda("product: small, odd and strided factors, libtorch's bits", small)];
    #[cfg(flowhn_cuda)]
    cases.push(of_cuda("product: sizes met first inside a captured graph, libtorch's bits", captured));
    for layouts in LAYOUTS {
        for kind in [Kind::BFloat16, Kind::Float] {
            let name = format!("product: {} by {}, {kind:?}, libtorch's bits", told(layouts[0]), told(layouts[1]));
            cases.push(Case::on_cuda(name, move |device| large(layouts, kind, device)));
        }
    }
    cases
}

/// Whether a factor is transposed.
const LAYOUTS: [[bool; 2]; 4] = [[false, false], [false, true], [true, false], [true, true]];

fn told(transposed: bool) -> &'static str {
    if transposed { "columns" } else { "rows" }
}

/// Values of both signs in bf16, `[rows, columns]`, made without the generator of random numbers.
fn factor(rows: i64, columns: i64, transposed: bool, device: Device) -> Result<Tensor> {
    let shape = if transposed { [columns, rows] } else { [rows, columns] };
    let values = Tensor::f_arange(rows * columns, (Kind::Float, device))?.f_mul_scalar(0.7)?.f_sin()?;
    let values = values.f_to_kind(Kind::BFloat16)?.f_view(shape)?;
    Ok(if transposed { values.f_tr()? } else { values })
}

fn by_libtorch(a: &Tensor, b: &Tensor, kind: Kind) -> Result<Tensor> {
    if kind == Kind::BFloat16 {
        return Ok(a.f_mm(b)?);
    }
    let float = op::Arg::Int(6);
    Ok(result(op::call("aten::mm", "dtype", &[op::Arg::Tensor(a), op::Arg::Tensor(b), float])?))
}

fn result(outputs: Vec<Option<Tensor>>) -> Tensor {
    outputs.into_iter().flatten().next().expect("a product has a result")
}

/// The same bits in the product that chooses and in those that follow, on other values.
fn large(layouts: [bool; 2], kind: Kind, device: Device) -> Result<String> {
    for (m, k, n) in [(2048, 1024, 768), (1024, 4096, 512), (4096, 264, 1032), (8000, 264, 4104)] {
        let (a, b) = (factor(m, k, layouts[0], device)?, factor(k, n, layouts[1], device)?);
        for step in 1..=3 {
            let a = a.f_mul_scalar(f64::from(step) * 0.3)?;
            let (got, want) = (product(&a, &b, kind)?, by_libtorch(&a, &b, kind)?);
            ensure(got.kind() == kind && got.f_equal(&want)?, || format!("{m} x {k} x {n}, time {step}: other bits"))?;
            // Added to a product, as the gradient of a weight is over chunks.
            product_into(&a, &b, &got, Sum::Old)?;
            let mut want = want;
            if kind == Kind::Float {
                let one = || op::Arg::Int(1);
                let [old, factor_a, factor_b] = [&want, &a, &b].map(op::Arg::Tensor);
                let args = [old, factor_a, factor_b, op::Arg::Int(6), one(), one()];
                want = result(op::call("aten::addmm", "dtype", &args)?);
            } else {
                let _ = want.f_addmm_(&a, &b)?;
            }
            ensure(got.f_equal(&want)?, || format!("{m} x {k} x {n}, time {step}: other bits in a sum"))?;
        }
    }
    Ok(String::new())
}

fn small(device_idx: usize) -> Result<String> {
    let device = Device::Cuda(device_idx);
    for (m, k, n) in [(1, 1, 1), (3, 5, 7), (64, 72, 8), (2049, 1023, 513)] {
        let (a, b) = (factor(m, k, false, device)?, factor(k, n, true, device)?);
        let wide = factor(m, 2 * k, false, device)?;
        for a in [a, wide.f_narrow(1, k, k)?, wide.f_slice(1, 0, 2 * k, 2)?] {
            let (got, want) = (product(&a, &b, Kind::BFloat16)?, by_libtorch(&a, &b, Kind::BFloat16)?);
            ensure(got.f_equal(&want)?, || format!("{m} x {k} x {n}, strides {:?}: other bits", a.stride()))?;
        }
    }
    // Nothing can be chosen by a result of zeros.
    let (zeros, b) = (factor(2048, 1088, false, device)?.f_zeros_like()?, factor(1088, 768, false, device)?);
    for _ in 0..2 {
        ensure(product(&zeros, &b, Kind::Float)?.f_count_nonzero(None)?.int64_value(&[]) == 0, || {
            "not zeros".to_owned()
        })?;
    }
    Ok(String::new())
}

#[cfg(flowhn_cuda)]
fn captured(device_idx: usize) -> Result<String> {
    use crate::{CaptureMode, Graph, Priority, Stream};

    let device = Device::Cuda(device_idx);
    let side = Stream::from_pool(device_idx, Priority::Normal)?;
    let _guard = side.enter()?;
    let (a, b) = (factor(1536, 1280, false, device)?, factor(1280, 640, false, device)?);
    let want = by_libtorch(&a, &b, Kind::Float)?;
    side.synchronize()?;
    // First as libtorch does it, then, after a choice outside, as that has it.
    for when in ["unknown", "known"] {
        let mut graph = Graph::new()?;
        let got = graph.capture(None, CaptureMode::ThreadLocal, || product(&a, &b, Kind::Float))?;
        graph.replay()?;
        side.synchronize()?;
        ensure(got.f_equal(&want)?, || format!("{when} sizes: other bits"))?;
        ensure(product(&a, &b, Kind::Float)?.f_equal(&want)?, || "outside: other bits".to_owned())?;
    }
    Ok(String::new())
}
