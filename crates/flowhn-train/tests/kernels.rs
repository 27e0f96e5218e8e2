//! Every kernel compiles for every architecture, and does not spill on the one it is tuned for. No GPU is needed.

use flowhn_torch::testing::check_kernels;

const TUNED: &[&str] = &["adamw_squares", "adamw_update"];

#[test]
fn kernels_compile_everywhere_and_tuned_ones_do_not_spill() {
    check_kernels(flowhn_train::KERNELS, TUNED);
}
