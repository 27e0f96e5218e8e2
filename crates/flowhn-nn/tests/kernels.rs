//! Every kernel compiles for every architecture, and every variant for the one it is tuned for; listed ones do not spill. No GPU is needed.

use flowhn_torch::testing::check_kernels;

/// The variants of the shapes that `flowhn bench kernels` times, and forms of the norms for other widths.
const TUNED: &[&str] = &[
    "rms_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=1 MAX_THREADS=512 MIN_BLOCKS=2",
    "rms_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=512 MIN_BLOCKS=2",
    "rms_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=3 MAX_THREADS=256 MIN_BLOCKS=3",
    "rms_norm_backward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=512 MIN_BLOCKS=1",
    "rms_norm_backward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=256 MIN_BLOCKS=2",
    "residual_norm_backward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=512 MIN_BLOCKS=1",
    "residual_norm_backward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=256 MIN_BLOCKS=2",
    "gated_rms_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=1 MAX_THREADS=512 MIN_BLOCKS=2",
    "gated_rms_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=256 MIN_BLOCKS=4",
    "gated_rms_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=3 MAX_THREADS=256 MIN_BLOCKS=2",
    "gated_rms_norm_backward X_KIND=1 ROWS_ALIGNED=1 VECS=1 MAX_THREADS=512 MIN_BLOCKS=1",
    "gated_rms_norm_backward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=256 MIN_BLOCKS=1",
    "gated_rms_norm_backward X_KIND=1 ROWS_ALIGNED=1 VECS=3 MAX_THREADS=256 MIN_BLOCKS=1",
    "swiglu_forward X_KIND=1",
    "swiglu_backward X_KIND=1",
    "cross_entropy_rows X_KIND=1",
    "linear_row",
    "gated_product",
    "gated_product_grad",
    "lm_head_product STORE=1",
    "lm_head_product STORE=0",
    "lm_head_origins GRAD=1",
    "lm_head_finish GRAD=1",
    "embedding_backward X_KIND=1",
    "fp8_cast FORMAT=0",
    "fp8_cast FORMAT=1",
    "swiglu_forward_fp8 FORMAT=0",
    "swiglu_backward_fp8 FORMAT=1",
    "rms_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=1024 MIN_BLOCKS=1 FP8_ROWS=32",
    "gated_rms_norm_forward X_KIND=1 ROWS_ALIGNED=1 VECS=2 MAX_THREADS=1024 MIN_BLOCKS=1 FP8_ROWS=32",
];

#[test]
fn kernels_compile_everywhere_and_tuned_ones_do_not_spill() {
    check_kernels(flowhn_nn::KERNELS, TUNED);
}
