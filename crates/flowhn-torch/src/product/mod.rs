//! Matrix products of bf16 factors, each done the fastest way that gives the bits of libtorch's own.
//!
//! libtorch takes the first algorithm that cuBLASLt proposes for a product's sizes. Others of its proposals are up to a tenth faster, and most of
//! them add in the same order. So the first time that a large product of some sizes is done, libtorch does it, and the other proposals are
//! tried beside it: those with other bits are dropped, and the fastest of the rest does all later products of these sizes. What is computed
//! does not depend on which one that is.

mod choose;
mod plan;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use tch::{Device, Kind, Tensor};

use crate::{Result, op};
use choose::Choice;
use plan::{Plan, Sizes};

/// Products of fewer FLOPs are left to libtorch: what could be gained is less than what launches differ by.
const MIN_FLOPS: f64 = 1e9;
/// Sizes to choose for; a program that meets more of them spends more on choices than these give back.
const MAX_CHOICES: usize = 256;
/// The number by which the dispatcher knows `Kind::Float`.
const FLOAT: op::Arg<'static> = op::Arg::Int(6);

/// What was found for the products of some sizes; nothing where libtorch's own way is the fastest.
type Plans = HashMap<Sizes, Option<Arc<Plan>>>;

/// `a b` of `a: [m, k]` and `b: [k, n]` in `kind`: that of the factors or, for bf16 factors on CUDA, f32, which is what the products are added
/// up in.
///
/// The first product of its sizes that is enqueued outside of a captured graph waits for the device while ways to do it are timed, about a
/// hundred times what the product takes, with twice as much memory as its result besides. So this is for sizes that come again and again, as those of
/// training do. `FLOWHN_TUNE_PRODUCTS=0` in the environment leaves all products to libtorch. The bits are libtorch's either way.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) if the factors do not fit each other or libtorch has no such product;
/// [`Error::Kernel`](crate::Error::Kernel) if cuBLASLt refuses what it did before.
pub fn product(a: &Tensor, b: &Tensor, kind: Kind) -> Result<Tensor> {
    let Some((device_idx, sizes)) = tunable(a, b, kind)? else { return by_libtorch(a, b, kind) };
    if let Some(found) = plans(|plans| plans.get(&sizes).cloned()) {
        let Some(plan) = found else { return by_libtorch(a, b, kind) };
        let out = Tensor::f_empty(sizes.out(), (kind, a.device()))?;
        plan.run(device_idx, a, b, &out)?;
        return Ok(out);
    }
    let out = by_libtorch(a, b, kind)?;
    if plans(|plans| plans.len()) >= MAX_CHOICES {
        return Ok(out);
    }
    match choose::choose(device_idx, &sizes, a, b, &out)? {
        Choice::Made(plan) => drop(plans(|plans| plans.insert(sizes, plan.map(Arc::new)))),
        Choice::Postponed => {}
    }
    Ok(out)
}

fn by_libtorch(a: &Tensor, b: &Tensor, kind: Kind) -> Result<Tensor> {
    if a.kind() == kind {
        return Ok(a.f_mm(b)?);
    }
    let outputs = op::call("aten::mm", "dtype", &[op::Arg::Tensor(a), op::Arg::Tensor(b), dtype(kind)?])?;
    outputs.into_iter().next().flatten().ok_or_else(|| crate::Error::invalid("product", "libtorch returned nothing"))
}

/// The only type besides the factors' own.
fn dtype(kind: Kind) -> Result<op::Arg<'static>> {
    match kind {
        Kind::Float => Ok(FLOAT),
        other => Err(crate::Error::invalid("product", format!("results in {other:?} from factors of another type"))),
    }
}

/// The device and sizes of a product that is worth a choice and that cuBLASLt takes as it lies.
fn tunable(a: &Tensor, b: &Tensor, kind: Kind) -> Result<Option<(usize, Sizes)>> {
    let Device::Cuda(device_idx) = a.device() else { return Ok(None) };
    let fits = a.kind() == Kind::BFloat16
        && b.kind() == Kind::BFloat16
        && matches!(kind, Kind::BFloat16 | Kind::Float)
        && b.device() == a.device()
        && is_wanted();
    if !fits {
        return Ok(None);
    }
    let sizes = Sizes::of(device_idx, a, b, kind);
    Ok(sizes.filter(|sizes| sizes.flops() >= MIN_FLOPS && plan::is_there()).map(|sizes| (device_idx, sizes)))
}

/// Whether the environment lets products be tuned.
fn is_wanted() -> bool {
    static WANTED: OnceLock<bool> = OnceLock::new();
    *WANTED.get_or_init(|| std::env::var("FLOWHN_TUNE_PRODUCTS").map_or(true, |value| value != "0"))
}

fn plans<T>(access: impl FnOnce(&mut Plans) -> T) -> T {
    static PLANS: OnceLock<Mutex<Plans>> = OnceLock::new();
    let table = PLANS.get_or_init(Mutex::default);
    access(&mut table.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_multiplies_in_the_type_of_the_factors() {
        let a = Tensor::from_slice(&[1f32, 2., 3., 4., 5., 6.]).view([2, 3]);
        let out = product(&a, &a.tr(), Kind::Float).unwrap();
        assert_eq!(Vec::<Vec<f32>>::try_from(out).unwrap(), [[14., 32.], [32., 77.]]);
        let refused = product(&a, &a.tr(), Kind::BFloat16).unwrap_err().to_string();
        assert!(refused.contains("BFloat16"), "{refused}");
        assert!(product(&a, &a, Kind::Float).is_err(), "sizes that do not fit");
    }
}
