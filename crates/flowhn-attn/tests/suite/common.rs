//! Inputs that are the same in every run and every thread.

use tch::{Kind, Tensor};

/// Values spread over `-2..2`, from a hash of `seed` and the element's index.
pub fn noise(shape: &[i64], seed: u64, kind: Kind) -> Tensor {
    let values: Vec<f64> = (0..shape.iter().product::<i64>() as u64)
        .map(|i| {
            // SplitMix64's finaliser.
            let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(i.wrapping_mul(0xd1b5_4a32_d192_ed03));
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64 * 4. - 2.
        })
        .collect();
    Tensor::from_slice(&values).view(shape).to_kind(kind)
}

/// A copy that records what is done with it.
pub fn leaf(x: &Tensor) -> Tensor {
    x.detach().copy().set_requires_grad(true)
}

/// Integers in `0..n`, the same in every run.
pub fn pick(seed: u64, n: u64) -> u64 {
    let value = noise(&[1], seed, Kind::Double).double_value(&[0]);
    (((value + 2.) / 4. * n as f64) as u64).min(n - 1)
}
