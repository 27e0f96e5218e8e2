//! Inputs that every test file makes the same way.
#![allow(dead_code, reason = "each test file uses its own part")]

use tch::{Device, Kind, Tensor};

/// Normal values that depend on the seed alone, in f64.
pub fn normal(seed: i64, shape: &[i64]) -> Tensor {
    let n: i64 = shape.iter().product();
    // A sum of four low-discrepancy sequences is close enough to normal, and needs no global generator that tests would share.
    let index = Tensor::arange(n, (Kind::Double, Device::Cpu)) + 1.;
    let part = |i: i64| {
        let irrational = f64::from(2 + (seed * 4 + i) as i32 * 3 % 101).sqrt() + 0.618_033_988_749_895 * (i + 1) as f64;
        let fraction = (&index * irrational).frac();
        fraction - 0.5
    };
    ((part(0) + part(1) + part(2) + part(3)) * 1.732).reshape(shape)
}

/// A mask with about one reset in `every` tokens; position 0 of the first sequence among them.
pub fn resets(batch: i64, seq_len: i64, every: i64) -> Tensor {
    let index = Tensor::arange(batch * seq_len, (Kind::Int64, Device::Cpu)).view([batch, seq_len]);
    (index * 7).remainder(every).eq(0)
}

/// A tensor with the same values in another layout: every second channel of a larger tensor, tokens outermost.
pub fn strided(t: &Tensor) -> Tensor {
    let apart = Tensor::stack(&[t, &t.zeros_like()], -1).flatten(-2, -1);
    let tokens_first = apart.transpose(0, 1).contiguous().transpose(0, 1);
    let last = tokens_first.dim() as i64 - 1;
    tokens_first.slice(last, 0, None, 2)
}
