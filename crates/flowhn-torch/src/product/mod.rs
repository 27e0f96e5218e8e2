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

use crate::{Error, Result, op};
use plan::{Plan, Sizes};

/// Products of fewer FLOPs are left to libtorch: what could be gained is less than what launches differ by.
const MIN_FLOPS: f64 = 1e9;
/// Sizes to choose for; a program that meets more of them spends more on choices than these give back.
const MAX_CHOICES: usize = 256;
/// Products of some sizes whose results tell nothing, as zeros do, before libtorch's way is taken for good.
const MAX_POSTPONED: usize = 8;
/// The number by which the dispatcher knows `Kind::Float`.
const FLOAT: op::Arg<'static> = op::Arg::Int(6);

/// What is known of the products of some sizes.
#[derive(Clone)]
enum Known {
    /// The fastest way, and whether it has libtorch's bits where it adds to what is there.
    Plan { plan: Arc<Plan>, adds: bool },
    /// libtorch's own is the fastest.
    Libtorch,
    /// So many results told nothing.
    Postponed(usize),
}

type Plans = HashMap<Sizes, Known>;

/// `a b` of `a: [m, k]` and `b: [k, n]` in `kind`: that of the factors or, for bf16 factors on CUDA, f32, which is what the products are added
/// up in.
///
/// The first product of its sizes that is enqueued outside of a captured graph waits for the device while ways to do it are compared and
/// timed: about a hundred times what the product takes, up to 17 times more for each 64 MiB of its result, with at most 96 MiB of memory besides.
/// So this is for sizes that come again and again, as those of training do. `FLOWHN_TUNE_PRODUCTS=0` in the environment leaves all products to
/// libtorch. The bits are libtorch's either way, as compared on that first product, alone and added to other numbers. Nothing is recorded for autograd: this belongs inside of a [`Function`](crate::Function), or under `no_grad`.
///
/// # Errors
/// [`Error::Torch`] if the factors do not fit each other or libtorch has no such product;
/// [`Error::Kernel`] if cuBLASLt refuses what it did before.
pub fn product(a: &Tensor, b: &Tensor, kind: Kind) -> Result<Tensor> {
    let size = |factor: &Tensor, axis: usize| factor.size().get(axis).copied().unwrap_or(1);
    let out = Tensor::f_empty([size(a, 0), size(b, 1)], (kind, a.device()))?;
    product_into(a, b, &out, Sum::New)?;
    Ok(out)
}

/// Whether a product replaces or joins what is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// The product alone.
    New,
    /// What is there, and the product.
    Old,
}

/// [`product`] into `out: [m, n]`, whose type it takes. Ways to do it are timed where the result is new, and taken for both.
///
/// # Errors
/// As [`product`].
pub fn product_into(a: &Tensor, b: &Tensor, out: &Tensor, sum: Sum) -> Result<()> {
    let Some((device_idx, sizes)) = tunable(a, b, out) else { return by_libtorch(a, b, out, sum) };
    let n_postponed = match plans(|plans| plans.get(&sizes).cloned()) {
        Some(Known::Plan { plan, adds }) if adds || sum == Sum::New => return plan.run(device_idx, a, b, out, sum),
        Some(Known::Plan { .. } | Known::Libtorch) => return by_libtorch(a, b, out, sum),
        Some(Known::Postponed(n)) => n,
        None => 0,
    };
    by_libtorch(a, b, out, sum)?;
    if plans(|plans| plans.len()) >= MAX_CHOICES || sum == Sum::Old || plan::is_capturing(device_idx)? {
        return Ok(());
    }
    let known = choose::choose(device_idx, &sizes, a, b, out)?.unwrap_or(match n_postponed + 1 {
        MAX_POSTPONED => Known::Libtorch,
        n => Known::Postponed(n),
    });
    plans(|plans| plans.insert(sizes, known));
    Ok(())
}

fn by_libtorch(a: &Tensor, b: &Tensor, out: &Tensor, sum: Sum) -> Result<()> {
    let [factor_a, factor_b, result] = [a, b, out].map(op::Arg::Tensor);
    match (a.kind() == out.kind(), sum) {
        (true, Sum::New) => drop(a.f_mm_out(out, b)?),
        (true, Sum::Old) => drop(out.shallow_clone().f_addmm_(a, b)?),
        (false, Sum::New) => {
            drop(op::call("aten::mm", "dtype_out", &[factor_a, factor_b, dtype(out.kind())?, result])?);
        }
        (false, Sum::Old) => {
            let one = || op::Arg::Int(1);
            let args = [op::Arg::Tensor(out), factor_a, factor_b, dtype(out.kind())?, one(), one(), result];
            drop(op::call("aten::addmm", "dtype_out", &args)?);
        }
    }
    Ok(())
}

/// The only type besides the factors' own.
fn dtype(kind: Kind) -> Result<op::Arg<'static>> {
    match kind {
        Kind::Float => Ok(FLOAT),
        other => Err(Error::invalid("product", format!("results in {other:?} from factors of another type"))),
    }
}

/// The device and sizes of a product that is worth a choice and that cuBLASLt takes as it lies.
fn tunable(a: &Tensor, b: &Tensor, out: &Tensor) -> Option<(usize, Sizes)> {
    let Device::Cuda(device_idx) = a.device() else { return None };
    let fits = [a, b].iter().all(|factor| factor.kind() == Kind::BFloat16)
        && matches!(out.kind(), Kind::BFloat16 | Kind::Float)
        && [b, out].iter().all(|tensor| tensor.device() == a.device())
        && is_wanted();
    let is_aligned = [a, b, out].into_iter().all(plan::is_aligned);
    let sizes = if fits && is_aligned { Sizes::of(device_idx, a, b, out) } else { None };
    sizes.filter(|sizes| sizes.flops() >= MIN_FLOPS && plan::is_there()).map(|sizes| (device_idx, sizes))
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
        let sum = Tensor::ones([2, 2], (Kind::Float, Device::Cpu));
        product_into(&a, &a.tr(), &sum, Sum::Old).unwrap();
        assert_eq!(Vec::<Vec<f32>>::try_from(sum).unwrap(), [[15., 33.], [33., 78.]]);
    }
}
