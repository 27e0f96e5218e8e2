//! A whole training step of the small model: forward, backward, clip, AdamW; elements are tokens.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flowhn_benches::{BATCH, SEQ_LEN, ids, model_config, set_up};
use flowhn_model::Model;
use flowhn_train::optim::{AdamW, AdamWOptions, StateType};
use tch::Device;

fn step(c: &mut Criterion) {
    set_up();
    let model = Model::new(&model_config(4, 8192), Device::Cpu, 0).expect("the configuration fits");
    let state = StateType::Fp32;
    let options = AdamWOptions { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_norm: 1., state };
    let mut optimizer = AdamW::of_params(model.params(), options).expect("parameters are leaves");
    let ids = ids(8192);
    let mut group = c.benchmark_group("train_step");
    group.sample_size(20).throughput(Throughput::Elements((BATCH * SEQ_LEN) as u64));
    group.bench_function("released_fa_split_fp32", |bench| {
        bench.iter(|| {
            optimizer.zero_grad().expect("gradients are there");
            model.loss(&ids, &ids, None).expect("ids are tokens").backward();
            optimizer.step(1e-3).expect("gradients are there")
        });
    });
    group.finish();
}

criterion_group!(benches, step);
criterion_main!(benches);
