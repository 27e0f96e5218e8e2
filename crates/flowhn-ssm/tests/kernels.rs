//! Every kernel compiles for every architecture, and every variant for the one it is tuned for; listed ones do not spill. No GPU is needed.

use flowhn_torch::testing::check_kernels;

/// The variants of the shapes that `flowhn bench kernels` times.
const TUNED: &[&str] = &[
    "selective_scan_forward X_KIND=1 DT_KIND=1 GATED=1",
    "selective_scan_backward X_KIND=1 DT_KIND=1 GATED=1 RESET=0",
    "causal_conv1d_forward X_KIND=1 D_CONV=4",
    "causal_conv1d_backward X_KIND=1 D_CONV=4",
    "ssd_steps DT_KIND=1",
    "ssd_state P_TILE=64 N_TILE=128",
    "ssd_carry P_TILE=64 N_TILE=128",
    "ssd_forward_sm90",
    "ssd_state_sm90 REVERSE=0",
    "ssd_state_sm90 REVERSE=1",
    "ssd_backward_sm90 DT_KIND=0",
    "ssd_backward_sm90 DT_KIND=1",
];

#[test]
fn kernels_compile_everywhere_and_tuned_ones_do_not_spill() {
    check_kernels(flowhn_ssm::KERNELS, TUNED);
}
