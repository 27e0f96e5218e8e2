//! Causal depthwise convolution + SiLU at the width of the small model.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flowhn_benches::{BATCH, D_MODEL, SEQ_LEN, set_up};
use flowhn_ssm::{Activation, CausalConv1d, causal_conv1d};
use tch::{Device, Kind, Tensor};

fn conv(c: &mut Criterion) {
    set_up();
    let e = 2 * D_MODEL;
    let randn = |size: &[i64]| Tensor::randn(size, (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let (x, weight, bias) = (randn(&[BATCH, SEQ_LEN, e]), randn(&[e, 4]), randn(&[e]));
    let run = || {
        let input =
            CausalConv1d { bias_e: Some(&bias), activation: Activation::Silu, ..CausalConv1d::new(&x, &weight) };
        causal_conv1d(&input).expect("shapes fit").y_ble
    };
    let mut group = c.benchmark_group("causal_conv1d");
    group.sample_size(20).throughput(Throughput::Bytes((2 * 4 * BATCH * SEQ_LEN * e) as u64));
    group.bench_function("forward", |bench| bench.iter(|| tch::no_grad(run)));
    group.bench_function("forward_backward", |bench| bench.iter(|| run().sum(Kind::Float).backward()));
    group.finish();
}

criterion_group!(benches, conv);
criterion_main!(benches);
