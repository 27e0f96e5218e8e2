//! How long a routing takes to solve and a plan to make.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use flowhn_benches::model_config;
use flowhn_split::{Policy, Routing, SplitSettings};

fn plan(c: &mut Criterion) {
    let shape = model_config(1, 64).block_shape(0);
    let mut group = c.benchmark_group("plan");
    for policy in Policy::all() {
        for seq_len in [1024usize, 65536] {
            let settings = vec![SplitSettings::new(policy); 6];
            let shapes = vec![shape; 6];
            group.bench_function(format!("{policy}/{seq_len}"), |bench| {
                bench.iter(|| {
                    let routing = Routing::new(black_box(seq_len), &settings, &shapes).expect("settings fit");
                    routing.plan(seq_len).expect("there are tokens")
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, plan);
criterion_main!(benches);
