//! One released block between a tiny embedding and head, forward and forward + backward, for each mixer of tokens.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flowhn_benches::{BATCH, SEQ_LEN, ids, model_config, set_up};
use flowhn_model::Model;
use tch::Device;

fn block(c: &mut Criterion) {
    set_up();
    let model = Model::new(&model_config(1, 64), Device::Cpu, 0).expect("the configuration fits");
    let ids = ids(64);
    let mut group = c.benchmark_group("block");
    group.sample_size(20).throughput(Throughput::Elements((BATCH * SEQ_LEN) as u64));
    group.bench_function("forward", |bench| {
        bench.iter(|| tch::no_grad(|| model.loss(&ids, &ids, None)).expect("ids are tokens"));
    });
    group.bench_function("forward_backward", |bench| {
        bench.iter(|| model.loss(&ids, &ids, None).expect("ids are tokens").backward());
    });
    group.finish();
}

criterion_group!(benches, block);
criterion_main!(benches);
