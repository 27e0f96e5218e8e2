//! What a token cannot see does not move its logits by a single bit.

mod common;

use common::{POLICIES, SEQ_LEN, VOCAB, ids, max_rel, model, variants};
use tch::{Tensor, no_grad};

#[test]
fn changing_a_token_leaves_earlier_logits_bit_identical() {
    for (block, mixer, extra) in variants() {
        for split in POLICIES {
            let model = model(split, block, mixer, extra);
            let before = ids(2, SEQ_LEN, 1);
            let want = no_grad(|| model.logits(&before, None)).unwrap();
            for pos in [1, 16, 30, SEQ_LEN as i64 - 1] {
                let after = before.copy();
                let changed = (after.narrow(1, pos, 1) + 1).remainder(VOCAB);
                after.narrow(1, pos, 1).copy_(&changed);
                let got = no_grad(|| model.logits(&after, None)).unwrap();
                let same = got.narrow(1, 0, pos).equal(&want.narrow(1, 0, pos));
                assert!(same, "{block} {mixer} {extra} {split}: token {pos} moved an earlier logit");
                assert!(!got.narrow(1, pos, 1).equal(&want.narrow(1, pos, 1)), "token {pos} moved nothing");
            }
        }
    }
}

#[test]
fn packed_documents_do_not_see_each_other() {
    let lengths = [13i64, 1, 20, 11];
    let document_of = |lengths: &[i64]| {
        let each: Vec<Tensor> =
            (0i64..).zip(lengths).map(|(i, &n)| Tensor::full([n], i, (tch::Kind::Int64, tch::Device::Cpu))).collect();
        Tensor::cat(&each, 0).unsqueeze(0)
    };
    for (block, mixer, extra) in variants() {
        for split in POLICIES {
            let model = model(split, block, mixer, extra);
            let pack = ids(1, SEQ_LEN, 9);
            let segments = document_of(&lengths);
            let want = no_grad(|| model.logits(&pack, Some(&segments))).unwrap();
            let mut start = 0;
            for len in lengths {
                let alone = pack.narrow(1, start, len);
                let input = flowhn_model::Input::new(&alone).at(start as usize);
                let got = no_grad(|| model.forward(&input)).unwrap().logits;
                let error = max_rel(&got, &want.narrow(1, start, len));
                assert!(error <= 1e-5, "{block} {mixer} {extra} {split}, document at {start}: {error:.2e}");
                start += len;
            }
            // Other documents around the third change none of its bits.
            let other = ids(1, SEQ_LEN, 4);
            other.narrow(1, 14, 20).copy_(&pack.narrow(1, 14, 20));
            let moved = no_grad(|| model.logits(&other, Some(&segments))).unwrap();
            assert!(moved.narrow(1, 14, 20).equal(&want.narrow(1, 14, 20)), "{block} {mixer} {extra} {split}");
        }
    }
}
