//! What a decoder refuses; that it equals the full forward is in `tests/selftest.rs`.

use flowhn_model::selftest::small::{VOCAB, Variant, ids};
use tch::Device::Cpu;

const FLOW: Variant = Variant { block: "flow", mixer: "mamba1", attn: "" };

#[test]
fn bad_feeds_are_refused_and_leave_the_decoder_alone() {
    let model = FLOW.model("policy = \"ae_split\"", Cpu).unwrap();
    let mut decoder = model.decoder(2).unwrap();
    assert!(decoder.feed(&ids(1, 4, 0, Cpu)).unwrap_err().to_string().contains("[2, m]"));
    assert!(decoder.feed(&(ids(2, 4, 0, Cpu) + 1000)).unwrap_err().to_string().contains("outside the vocabulary"));
    assert!(decoder.feed(&ids(2, 4, 0, Cpu).narrow(1, 0, 0)).is_err());
    assert_eq!(decoder.position(), 0);
    assert_eq!(decoder.feed(&ids(2, 4, 0, Cpu)).unwrap().size(), [2, VOCAB]);
    assert!(model.decoder(0).is_err());
    let released = Variant { block: "released", ..FLOW };
    let released = released.model("policy = \"fa_split\"\nreleased = true", Cpu).unwrap();
    assert!(released.decoder(1).unwrap_err().to_string().contains("released = true"));
}
