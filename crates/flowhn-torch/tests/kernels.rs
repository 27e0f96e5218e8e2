//! Every kernel compiles for every architecture, and every variant for the one it is tuned for; listed ones do not spill. No GPU is needed.

use flowhn_torch::testing::check_kernels;

/// What must not take registers from others, or is short.
const TUNED: &[&str] = &["timeline_mark", "column_sums"];

#[test]
fn kernels_compile_everywhere_and_tuned_ones_do_not_spill() {
    check_kernels(flowhn_torch::kernel::KERNELS, TUNED);
}
