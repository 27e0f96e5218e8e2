//! Prefill and token-by-token decoding give the logits of the whole sequence.

mod common;

use common::{POLICIES, SEQ_LEN, ids, max_rel, model, variants};
use tch::{Tensor, no_grad};

/// Decodes with a prompt of `prompt` tokens and the rest one by one.
fn decoded(model: &flowhn_model::Model, ids: &Tensor, prompt: usize) -> Tensor {
    let (batch, len) = ids.size2().unwrap();
    let mut decoder = model.decoder(batch as usize).unwrap();
    let mut logits = vec![decoder.feed_all(&ids.narrow(1, 0, prompt as i64)).unwrap()];
    for pos in prompt as i64..len {
        logits.push(decoder.feed_all(&ids.narrow(1, pos, 1)).unwrap());
    }
    assert_eq!(decoder.position() as i64, len);
    Tensor::cat(&logits, 1)
}

#[test]
fn decoding_equals_the_full_forward() {
    for (block, mixer, extra) in variants() {
        for split in POLICIES {
            let model = model(split, block, mixer, extra);
            // Past the training length, where plans repeat.
            let ids = ids(2, SEQ_LEN + 20, 3);
            let want = no_grad(|| model.logits(&ids, None)).unwrap();
            for prompt in [1, 17, SEQ_LEN - 1, SEQ_LEN + 7] {
                let error = max_rel(&decoded(&model, &ids, prompt), &want);
                assert!(error <= 1e-4, "{block} {mixer} {extra} {split}, prompt {prompt}: {error:.2e}");
            }
        }
    }
}

#[test]
fn a_prompt_in_pieces_equals_the_prompt_at_once() {
    let model = model("policy = \"cyclic_split\"", "flow", "mamba1", "rope = true");
    let ids = ids(1, 40, 5);
    let mut decoder = model.decoder(1).unwrap();
    let mut pieces = Vec::new();
    let mut start = 0;
    for len in [3, 1, 11, 2, 23] {
        pieces.push(decoder.feed_all(&ids.narrow(1, start, len)).unwrap());
        start += len;
    }
    let want = no_grad(|| model.logits(&ids, None)).unwrap();
    let error = max_rel(&Tensor::cat(&pieces, 1), &want);
    assert!(error <= 1e-4, "{error:.2e}");
    assert!(decoder.cache_bytes() > 0);
}

#[test]
fn bad_feeds_are_refused_and_leave_the_decoder_alone() {
    let model = model("policy = \"ae_split\"", "flow", "mamba1", "");
    let mut decoder = model.decoder(2).unwrap();
    assert!(decoder.feed(&ids(1, 4, 0)).unwrap_err().to_string().contains("[2, m]"));
    assert!(decoder.feed(&(ids(2, 4, 0) + 1000)).unwrap_err().to_string().contains("outside the vocabulary"));
    assert!(decoder.feed(&ids(2, 4, 0).narrow(1, 0, 0)).is_err());
    assert_eq!(decoder.position(), 0);
    assert_eq!(decoder.feed(&ids(2, 4, 0)).unwrap().size(), [2, common::VOCAB]);
    assert!(model.decoder(0).is_err());
    let released = common::model("policy = \"fa_split\"\nreleased = true", "released", "mamba1", "");
    assert!(released.decoder(1).unwrap_err().to_string().contains("released = true"));
}
