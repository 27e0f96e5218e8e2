//! Every kernel compiles for every architecture, and every variant for the one it is tuned for; listed ones do not spill. No GPU is needed.

use flowhn_torch::testing::check_kernels;

/// The variants of the shapes that `flowhn bench kernels` and `flowhn bench decode` time.
const TUNED: &[&str] = &[
    "rotary X_KIND=1",
    "decode_append X_KIND=1",
    "decode_attention X_KIND=1 LANES=8 GROUP=4",
    "attention_forward",
    "attention_dq",
    "attention_dkv",
];

#[test]
fn kernels_compile_everywhere_and_tuned_ones_do_not_spill() {
    check_kernels(flowhn_attn::KERNELS, TUNED);
}
