//! The kernels of this crate.

use flowhn_torch::kernel::rows::RowForm;
use flowhn_torch::kernel::{KernelSource, KernelSpec};

/// Copies and sums of tokens between a sequence and its branches.
pub(crate) static TOKENS: KernelSource =
    KernelSource { name: "tokens.cu", text: include_str!("../kernels/tokens.cu"), headers: &[] };

/// RMSNorm with the move of tokens and the residual addition beside it.
pub(crate) static ROUTED_NORM: KernelSource =
    KernelSource { name: "routed_norm.cu", text: include_str!("../kernels/routed_norm.cu"), headers: &[] };

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
            &routed_norm(RowForm::new(1, 512, 1), 0, false),
            &routed_norm(RowForm::new(2, 512, 1), 0, false),
            &routed_norm(RowForm::new(2, 512, 1), 0, true),
            &routed_norm(RowForm::new(3, 256, 1), 0, false),
            &routed_norm(RowForm::new(4, 1024, 1), 0, false),
            &routed_norm(RowForm::new(4, 1024, 1), 0, true),
            &routed_norm(RowForm::new(1, 512, 1), 1, false),
            &routed_norm(RowForm::new(2, 512, 1), 1, false),
            &routed_norm(RowForm::new(2, 512, 1), 1, true),
            &routed_norm(RowForm::new(3, 256, 1), 1, false),
            &routed_norm(RowForm::new(4, 1024, 1), 1, false),
            &routed_norm(RowForm::new(4, 1024, 1), 1, true),
        ],
    },
];

/// The macros of `routed_norm.cu`.
pub(crate) const fn routed_norm(form: RowForm, x_kind: i64, branch_grads: bool) -> [(&'static str, i64); 5] {
    let [x_kind, vectors, threads, blocks] = form.defines(x_kind);
    [x_kind, vectors, threads, blocks, ("BRANCH_GRADS", branch_grads as i64)]
}
