//! The kernels of this crate.

use flowhn_torch::kernel::rows::RowAccess::{Elements, Vectors};
use flowhn_torch::kernel::rows::{RowAccess, RowForm};
use flowhn_torch::kernel::{KernelSource, KernelSpec};

/// Copies and sums of tokens between a sequence and its branches.
pub(crate) static TOKENS: KernelSource =
    KernelSource { name: "tokens.cu", text: include_str!("../kernels/tokens.cu"), headers: &[] };

/// RMSNorm with the move of tokens and the residual addition beside it.
pub(crate) static ROUTED_NORM: KernelSource =
    KernelSource { name: "routed_norm.cu", text: include_str!("../kernels/routed_norm.cu"), headers: &[] };

/// RMSNorm of every token for two branches.
pub(crate) static TWIN_NORM: KernelSource =
    KernelSource { name: "twin_norm.cu", text: include_str!("../kernels/twin_norm.cu"), headers: &[] };

/// Two sums and their merge, rounded to fp8.
pub(crate) static MERGE_FP8: KernelSource =
    KernelSource { name: "merge_fp8.cu", text: include_str!("../kernels/merge_fp8.cu"), headers: &[] };

/// The macros of [`MERGE_FP8`]: E4M3.
pub(crate) const MERGE_FP8_DEFINES: &[(&str, i64)] = &[("FORMAT", 0)];

/// Every kernel of this crate with the variants in use; a test compiles them all.
pub const KERNELS: &[KernelSpec] = &[
    KernelSpec {
        source: &TOKENS,
        variants: &[
            &[("X_KIND", 0), ("WORD", 1)],
            &[("X_KIND", 0), ("WORD", 2)],
            &[("X_KIND", 0), ("WORD", 4)],
            &[("X_KIND", 0), ("WORD", 8)],
            &[("X_KIND", 0), ("WORD", 16)],
            &[("X_KIND", 1), ("WORD", 16)],
        ],
    },
    KernelSpec {
        source: &ROUTED_NORM,
        variants: &[
            &norm(RowForm::new(1, 512, 1), 0, Vectors, false),
            &norm(RowForm::new(1, 512, 1), 0, Elements, false),
            &norm(RowForm::new(2, 512, 1), 0, Vectors, false),
            &norm(RowForm::new(2, 512, 1), 0, Elements, false),
            &norm(RowForm::new(2, 512, 1), 0, Vectors, true),
            &norm(RowForm::new(2, 512, 1), 0, Elements, true),
            &norm(RowForm::new(3, 256, 1), 0, Vectors, false),
            &norm(RowForm::new(3, 256, 1), 0, Elements, false),
            &norm(RowForm::new(4, 1024, 1), 0, Vectors, false),
            &norm(RowForm::new(4, 1024, 1), 0, Elements, false),
            &norm(RowForm::new(4, 1024, 1), 0, Vectors, true),
            &norm(RowForm::new(4, 1024, 1), 0, Elements, true),
            &norm(RowForm::new(1, 512, 1), 1, Vectors, false),
            &norm(RowForm::new(1, 512, 1), 1, Elements, false),
            &norm(RowForm::new(2, 512, 1), 1, Vectors, false),
            &norm(RowForm::new(2, 512, 1), 1, Elements, false),
            &norm(RowForm::new(2, 512, 1), 1, Vectors, true),
            &norm(RowForm::new(2, 512, 1), 1, Elements, true),
            &norm(RowForm::new(3, 256, 1), 1, Vectors, false),
            &norm(RowForm::new(3, 256, 1), 1, Elements, false),
            &norm(RowForm::new(4, 1024, 1), 1, Vectors, false),
            &norm(RowForm::new(4, 1024, 1), 1, Elements, false),
            &norm_fp8(RowForm::new(1, 512, 2)),
            &norm_fp8(RowForm::new(2, 1024, 1)),
            &norm_fp8(RowForm::new(3, 256, 2)),
            &norm(RowForm::new(4, 1024, 1), 1, Elements, true),
            &norm(RowForm::new(4, 1024, 1), 1, Vectors, true),
        ],
    },
    KernelSpec {
        source: &TWIN_NORM,
        variants: &[
            &norm(RowForm::new(1, 512, 2), 0, Vectors, false),
            &norm(RowForm::new(1, 512, 2), 0, Elements, false),
            &norm(RowForm::new(1, 512, 1), 0, Vectors, false),
            &norm(RowForm::new(1, 512, 1), 0, Elements, false),
            &norm(RowForm::new(1, 512, 1), 0, Vectors, true),
            &norm(RowForm::new(1, 512, 1), 0, Elements, true),
            &norm(RowForm::new(1, 512, 2), 1, Vectors, false),
            &norm(RowForm::new(1, 512, 2), 1, Elements, false),
            &norm(RowForm::new(1, 512, 1), 1, Vectors, false),
            &norm(RowForm::new(1, 512, 1), 1, Elements, false),
            &norm(RowForm::new(1, 512, 1), 1, Elements, true),
            &norm(RowForm::new(1, 512, 1), 1, Vectors, true),
        ],
    },
    KernelSpec { source: &MERGE_FP8, variants: &[MERGE_FP8_DEFINES] },
];

/// The macros of `routed_norm.cu` and `twin_norm.cu`.
pub(crate) const fn norm(
    form: RowForm,
    x_kind: i64,
    access: RowAccess,
    branch_grads: bool,
) -> [(&'static str, i64); 6] {
    let [x_kind, aligned, vectors, threads, blocks] = form.defines(x_kind, access);
    [x_kind, aligned, vectors, threads, blocks, ("BRANCH_GRADS", branch_grads as i64)]
}

/// The macros of the forward pass of `routed_norm.cu` that rounds.
pub(crate) const fn norm_fp8(form: RowForm) -> [(&'static str, i64); 7] {
    let [x_kind, aligned, vectors, threads, blocks, rows] = form.fp8_defines();
    [x_kind, aligned, vectors, threads, blocks, rows, ("BRANCH_GRADS", 0)]
}
