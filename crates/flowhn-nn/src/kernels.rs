//! The kernels of this crate.

use flowhn_torch::kernel::rows::RowAccess::{Elements, Vectors};
use flowhn_torch::kernel::rows::RowForm;
use flowhn_torch::kernel::{KernelSource, KernelSpec};

use crate::cuda::head::RowVariant;
use crate::cuda::{embedding, gated_mlp, head};

/// [`rms_norm`](crate::rms_norm), also after a residual addition.
pub(crate) static RMS_NORM: KernelSource =
    KernelSource { name: "rms_norm.cu", text: include_str!("../kernels/rms_norm.cu"), headers: &[] };

/// [`gated_rms_norm`](crate::gated_rms_norm).
pub(crate) static GATED_RMS_NORM: KernelSource =
    KernelSource { name: "gated_rms_norm.cu", text: include_str!("../kernels/gated_rms_norm.cu"), headers: &[] };

/// [`swiglu`](crate::swiglu).
pub(crate) static SWIGLU: KernelSource =
    KernelSource { name: "swiglu.cu", text: include_str!("../kernels/swiglu.cu"), headers: &[] };

/// Rows that a thread of [`SWIGLU`] takes.
pub(crate) const SWIGLU_ROWS: u32 = 2;

/// The softmax, loss and gradient between the products of [`linear_cross_entropy`](crate::linear_cross_entropy).
pub(crate) static CROSS_ENTROPY: KernelSource =
    KernelSource { name: "cross_entropy.cu", text: include_str!("../kernels/cross_entropy.cu"), headers: &[] };

/// The tiles of our own products, and what these share.
const PRODUCT_TILES: (&str, &str) = ("product_tiles.cuh", include_str!("../kernels/product_tiles.cuh"));
const PRODUCT_HEADERS: &[(&str, &str)] =
    &[PRODUCT_TILES, ("product_sm90.cuh", include_str!("../kernels/product_sm90.cuh"))];

/// The first product of [`linear_cross_entropy`](crate::linear_cross_entropy) on Hopper, which leaves exponentials.
pub(crate) static LM_HEAD_PRODUCT: KernelSource = KernelSource {
    name: "lm_head_sm90.cu",
    text: include_str!("../kernels/lm_head_sm90.cu"),
    headers: PRODUCT_HEADERS,
};

/// What precedes and follows [`LM_HEAD_PRODUCT`].
pub(crate) static LM_HEAD_ROWS: KernelSource = KernelSource {
    name: "lm_head_rows.cu",
    text: include_str!("../kernels/lm_head_rows.cu"),
    headers: &[PRODUCT_TILES],
};

/// The first product of [`SwiGluMlp`](crate::SwiGluMlp) on Hopper, which leaves the activation as well.
pub(crate) static GATED_PRODUCT: KernelSource = KernelSource {
    name: "gated_product_sm90.cu",
    text: include_str!("../kernels/gated_product_sm90.cu"),
    headers: PRODUCT_HEADERS,
};

/// The second product of [`SwiGluMlp`](crate::SwiGluMlp) and its activation on Hopper, backward.
pub(crate) static GATED_PRODUCT_GRAD: KernelSource = KernelSource {
    name: "gated_product_grad_sm90.cu",
    text: include_str!("../kernels/gated_product_grad_sm90.cu"),
    headers: PRODUCT_HEADERS,
};

/// A product with a number on the device, rounded to another type.
pub(crate) static SCALED_CAST: KernelSource =
    KernelSource { name: "scaled_cast.cu", text: include_str!("../kernels/scaled_cast.cu"), headers: &[] };

/// Rounding to fp8.
pub(crate) static FP8_CAST: KernelSource =
    KernelSource { name: "fp8_cast.cu", text: include_str!("../kernels/fp8_cast.cu"), headers: &[] };

/// [`swiglu`](crate::swiglu) and its gradient, rounded to fp8.
pub(crate) static SWIGLU_FP8: KernelSource =
    KernelSource { name: "swiglu_fp8.cu", text: include_str!("../kernels/swiglu_fp8.cu"), headers: &[] };

/// The scales of [`FP8_CAST`].
pub(crate) static FP8_SCALES: KernelSource =
    KernelSource { name: "fp8_scales.cu", text: include_str!("../kernels/fp8_scales.cu"), headers: &[] };

/// [`embedding`](crate::embedding).
pub(crate) static EMBEDDING: KernelSource =
    KernelSource { name: "embedding.cu", text: include_str!("../kernels/embedding.cu"), headers: &[] };

/// A [`Linear`](crate::Linear) of one token.
pub(crate) static LINEAR_ROW: KernelSource =
    KernelSource { name: "linear_row.cu", text: include_str!("../kernels/linear_row.cu"), headers: &[] };

/// Every kernel of this crate with the variants in use; a test compiles them all.
pub const KERNELS: &[KernelSpec] = &[
    KernelSpec {
        source: &CROSS_ENTROPY,
        variants: &[
            &RowVariant::new(1, 65_536, true).defines(),
            &RowVariant::new(1, 32_000, true).defines(),
            &RowVariant::new(1, 8192, true).defines(),
            &RowVariant::new(1, 128_256, true).defines(),
            &RowVariant::new(1, 65_536, false).defines(),
            &RowVariant::new(0, 65_536, true).defines(),
            &RowVariant::new(0, 32_000, true).defines(),
            &RowVariant::new(0, 65_536, false).defines(),
        ],
    },
    KernelSpec { source: &LM_HEAD_PRODUCT, variants: &[&head::STORE, &head::SUMS_ONLY] },
    KernelSpec { source: &GATED_PRODUCT, variants: &[&gated_mlp::KEEP, &gated_mlp::ACTIVATION_ONLY] },
    KernelSpec { source: &GATED_PRODUCT_GRAD, variants: &[&gated_mlp::BACKWARD_DEFINES] },
    KernelSpec { source: &LINEAR_ROW, variants: &[&[]] },
    KernelSpec { source: &LM_HEAD_ROWS, variants: &[&head::GRAD, &head::LOSSES_ONLY] },
    KernelSpec {
        source: &SCALED_CAST,
        variants: &[
            &[("IN_KIND", 0), ("OUT_KIND", 0)],
            &[("IN_KIND", 0), ("OUT_KIND", 1)],
            &[("IN_KIND", 1), ("OUT_KIND", 1)],
        ],
    },
    KernelSpec { source: &FP8_CAST, variants: &[&[("FORMAT", 0)], &[("FORMAT", 1)]] },
    KernelSpec { source: &FP8_SCALES, variants: &[&[]] },
    KernelSpec { source: &SWIGLU_FP8, variants: &[&[("FORMAT", 0)], &[("FORMAT", 1)]] },
    KernelSpec {
        source: &EMBEDDING,
        variants: &[
            &embedding::defines(0, 8),
            &embedding::defines(1, 8),
            &embedding::defines(0, 4),
            &embedding::defines(1, 4),
            &embedding::defines(0, 1),
            &embedding::defines(1, 1),
        ],
    },
    KernelSpec {
        source: &RMS_NORM,
        variants: &[
            &RowForm::new(1, 512, 2).defines(0, Vectors),
            &RowForm::new(1, 512, 2).defines(0, Elements),
            &RowForm::new(2, 512, 2).defines(0, Vectors),
            &RowForm::new(2, 512, 2).defines(0, Elements),
            &RowForm::new(3, 256, 3).defines(0, Vectors),
            &RowForm::new(3, 256, 3).defines(0, Elements),
            &RowForm::new(2, 512, 1).defines(0, Vectors),
            &RowForm::new(2, 512, 1).defines(0, Elements),
            &RowForm::new(2, 256, 2).defines(0, Vectors),
            &RowForm::new(2, 256, 2).defines(0, Elements),
            &RowForm::new(4, 1024, 1).defines(0, Vectors),
            &RowForm::new(4, 1024, 1).defines(0, Elements),
            &RowForm::new(1, 512, 2).defines(1, Vectors),
            &RowForm::new(1, 512, 2).defines(1, Elements),
            &RowForm::new(2, 512, 2).defines(1, Vectors),
            &RowForm::new(2, 512, 2).defines(1, Elements),
            &RowForm::new(3, 256, 3).defines(1, Vectors),
            &RowForm::new(3, 256, 3).defines(1, Elements),
            &RowForm::new(2, 512, 1).defines(1, Vectors),
            &RowForm::new(2, 512, 1).defines(1, Elements),
            &RowForm::new(2, 256, 2).defines(1, Vectors),
            &RowForm::new(2, 256, 2).defines(1, Elements),
            &RowForm::new(1, 512, 2).fp8_defines(),
            &RowForm::new(2, 1024, 1).fp8_defines(),
            &RowForm::new(3, 256, 3).fp8_defines(),
            &RowForm::new(4, 1024, 1).defines(1, Elements),
            &RowForm::new(4, 1024, 1).defines(1, Vectors),
        ],
    },
    KernelSpec {
        source: &GATED_RMS_NORM,
        variants: &[
            &RowForm::new(1, 512, 2).defines(0, Vectors),
            &RowForm::new(1, 512, 2).defines(0, Elements),
            &RowForm::new(3, 256, 2).defines(0, Vectors),
            &RowForm::new(3, 256, 2).defines(0, Elements),
            &RowForm::new(2, 256, 4).defines(0, Vectors),
            &RowForm::new(2, 256, 4).defines(0, Elements),
            &RowForm::new(1, 512, 1).defines(0, Vectors),
            &RowForm::new(1, 512, 1).defines(0, Elements),
            &RowForm::new(2, 256, 1).defines(0, Vectors),
            &RowForm::new(2, 256, 1).defines(0, Elements),
            &RowForm::new(3, 256, 1).defines(0, Vectors),
            &RowForm::new(3, 256, 1).defines(0, Elements),
            &RowForm::new(4, 1024, 1).defines(0, Vectors),
            &RowForm::new(4, 1024, 1).defines(0, Elements),
            &RowForm::new(1, 512, 2).defines(1, Vectors),
            &RowForm::new(1, 512, 2).defines(1, Elements),
            &RowForm::new(3, 256, 2).defines(1, Vectors),
            &RowForm::new(3, 256, 2).defines(1, Elements),
            &RowForm::new(2, 256, 4).defines(1, Vectors),
            &RowForm::new(2, 256, 4).defines(1, Elements),
            &RowForm::new(1, 512, 1).defines(1, Vectors),
            &RowForm::new(1, 512, 1).defines(1, Elements),
            &RowForm::new(2, 256, 1).defines(1, Vectors),
            &RowForm::new(2, 256, 1).defines(1, Elements),
            &RowForm::new(3, 256, 1).defines(1, Vectors),
            &RowForm::new(3, 256, 1).defines(1, Elements),
            &RowForm::new(1, 512, 2).fp8_defines(),
            &RowForm::new(3, 256, 2).fp8_defines(),
            &RowForm::new(2, 1024, 1).fp8_defines(),
            &RowForm::new(4, 1024, 1).defines(1, Elements),
            &RowForm::new(4, 1024, 1).defines(1, Vectors),
        ],
    },
    KernelSpec {
        source: &SWIGLU,
        variants: &[&[("X_KIND", 0), ("ROWS", SWIGLU_ROWS as i64)], &[("X_KIND", 1), ("ROWS", SWIGLU_ROWS as i64)]],
    },
];
