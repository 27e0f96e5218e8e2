//! Inputs that are the same in every run and every thread.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use flowhn_fuse::Route;

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

/// The two routes that share out a sequence in runs of these lengths, attention first.
pub fn routes(runs: &[usize]) -> (Route, Route) {
    let mut spans: [Vec<Range<usize>>; 2] = [Vec::new(), Vec::new()];
    let mut start = 0;
    for (i, len) in runs.iter().enumerate() {
        spans[i % 2].push(start..start + len);
        start += len;
    }
    let [attn, ssm] = spans.map(|spans| Route::new(start, &spans, Device::Cpu).unwrap());
    (attn, ssm)
}
