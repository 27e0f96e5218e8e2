//! Every kernel compiles for every architecture, and every variant for the one it is tuned for; listed ones do not spill. No GPU is needed.

use flowhn_torch::testing::check_kernels;

/// The variants of the shapes that `flowhn bench kernels` times, and forms of the norms for other widths.
const TUNED: &[&str] = &[
    "routed_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=1",
    "routed_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=512",
    "routed_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=3",
    "routed_norm_backward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=512",
    "twin_norm_forward X_KIND=1 VECS=1",
    "twin_norm_backward X_KIND=1 VECS=1 MAX_THREADS=512 MIN_BLOCKS=1",
    "concat_sums X_KIND=1",
    "routed_norm_forward X_KIND=1 VECS=2 MAX_THREADS=1024 MIN_BLOCKS=1 FP8_ROWS=32",
    "merge_sums_fp8 FORMAT=0",
    "merge_residual X_KIND=1",
    "copy_tokens X_KIND=1",
];

#[test]
fn kernels_compile_everywhere_and_tuned_ones_do_not_spill() {
    check_kernels(flowhn_fuse::KERNELS, TUNED);
}
