//! Selective scan and SSD, forward and forward + backward, at the widths of the small model.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flowhn_benches::{BATCH, D_MODEL, SEQ_LEN, set_up};
use flowhn_ssm::{DtActivation, SelectiveScan, Ssd, selective_scan, ssd};
use tch::{Device, Kind, Tensor};

fn randn(size: &[i64]) -> Tensor {
    Tensor::randn(size, (Kind::Float, Device::Cpu)).set_requires_grad(true)
}

fn scan(c: &mut Criterion) {
    set_up();
    let (e, n) = (2 * D_MODEL, 16);
    let [x, dt, z] = std::array::from_fn(|_| randn(&[BATCH, SEQ_LEN, e]));
    let [b, cc] = std::array::from_fn(|_| randn(&[BATCH, SEQ_LEN, n]));
    let (a, d) = (-Tensor::rand([e, n], (Kind::Float, Device::Cpu)) * 16., randn(&[e]));
    let run = || {
        let input = SelectiveScan {
            d_e: Some(&d),
            z_ble: Some(&z),
            dt_activation: DtActivation::Softplus,
            ..SelectiveScan::new(&x, &dt, &a, &b, &cc)
        };
        selective_scan(&input).expect("shapes fit").y_ble
    };
    let mut group = c.benchmark_group("selective_scan");
    group.sample_size(20).throughput(Throughput::Elements((BATCH * SEQ_LEN * e * n) as u64));
    group.bench_function("forward", |bench| bench.iter(|| tch::no_grad(run)));
    group.bench_function("forward_backward", |bench| bench.iter(|| run().sum(Kind::Float).backward()));
    group.finish();
}

fn ssd_chunks(c: &mut Criterion) {
    let (h, p, n) = (8, 32, 64);
    let (x, dt) = (randn(&[BATCH, SEQ_LEN, h, p]), randn(&[BATCH, SEQ_LEN, h]));
    let [b, cc] = std::array::from_fn(|_| randn(&[BATCH, SEQ_LEN, 1, n]));
    let a = -Tensor::rand([h], (Kind::Float, Device::Cpu)) * 16.;
    let run = || {
        let input = Ssd { dt_activation: DtActivation::Softplus, chunk_len: 64, ..Ssd::new(&x, &dt, &a, &b, &cc) };
        ssd(&input).expect("shapes fit").y_blhp
    };
    let mut group = c.benchmark_group("ssd");
    group.sample_size(20).throughput(Throughput::Elements((BATCH * SEQ_LEN * h * p * n) as u64));
    group.bench_function("forward", |bench| bench.iter(|| tch::no_grad(run)));
    group.bench_function("forward_backward", |bench| bench.iter(|| run().sum(Kind::Float).backward()));
    group.finish();
}

criterion_group!(benches, scan, ssd_chunks);
criterion_main!(benches);
