//! What recomputing costs, and what it leaves alone.

use flowhn_model::selftest::small::{POLICIES, SEQ_LEN, VARIANTS, VOCAB, ids};
use flowhn_model::{Input, RecomputeEvery};
use flowhn_split::{ModelFlops, ScoreCount};
use flowhn_torch::testing::count_matmul_flops;
use tch::{Device, no_grad};

#[test]
fn blocks_are_counted_from_the_first() {
    let taken = |every| (0..6).filter(|&block_idx| RecomputeEvery(every).takes(block_idx)).collect::<Vec<_>>();
    assert_eq!(taken(0), [0; 0]);
    assert_eq!(taken(1), [0, 1, 2, 3, 4, 5]);
    assert_eq!(taken(2), [0, 2, 4]);
    assert_eq!(taken(7), [0]);
}

/// Every matrix product of a recomputed block's forward pass runs once more, and nothing else does.
#[test]
fn each_recomputed_block_runs_forward_once_more() {
    let batch = 2;
    let ids = ids(batch, SEQ_LEN, 3, Device::Cpu);
    for variant in VARIANTS {
        let mut model = variant.model(POLICIES[9], Device::Cpu).unwrap();
        let forward = count_matmul_flops(|| no_grad(|| model.forward(&Input::new(&ids)).unwrap())).unwrap().1;
        let blocks = forward - 2 * (batch as usize * SEQ_LEN) as u64 * 32 * VOCAB as u64;
        let mut step = |every| {
            model.set_recompute_every(RecomputeEvery(every));
            count_matmul_flops(|| model.backward(&ids, &ids, None, 1).unwrap()).unwrap().1
        };
        let kept = step(0);
        assert_eq!(kept, 3 * forward, "{variant:?}");
        let (all, half) = (step(1) - kept, step(2) - kept);
        assert_eq!(all, blocks, "{variant:?}");
        assert!(half > 0 && half < all, "{variant:?}: {half} of {all}");
    }
}

#[test]
fn counted_flops_of_recomputed_blocks_are_those_of_their_forward_pass() {
    let model = VARIANTS[0].model(POLICIES[9], Device::Cpu).unwrap();
    let flops = ModelFlops::new(&model.shape(), model.routing(), SEQ_LEN, ScoreCount::Causal).unwrap();
    assert_eq!(flops.recomputed(|_| false), 0);
    assert_eq!(flops.recomputed(|_| true), flops.forward() - flops.head);
    assert_eq!(flops.recomputed(|block_idx| block_idx == 2), flops.blocks[2].total());
}
