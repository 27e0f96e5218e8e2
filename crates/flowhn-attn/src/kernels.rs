//! The kernels of this crate.

use flowhn_torch::kernel::{Defines, KernelSource, KernelSpec};

use crate::hopper;

/// [`rotary`](crate::rotary), there and back.
pub(crate) static ROTARY: KernelSource =
    KernelSource { name: "rotary.cu", text: include_str!("../kernels/rotary.cu"), headers: &[] };

/// [`Clock::tick`](crate::Clock::tick).
pub(crate) static DECODE_CLOCK: KernelSource =
    KernelSource { name: "decode_clock.cu", text: include_str!("../kernels/decode_clock.cu"), headers: &[] };

/// What a step adds to a [`KvCache`](crate::KvCache).
pub(crate) static DECODE_APPEND: KernelSource =
    KernelSource { name: "decode_append.cu", text: include_str!("../kernels/decode_append.cu"), headers: &[] };

/// What a step reads of a [`KvCache`](crate::KvCache).
pub(crate) static DECODE_ATTENTION: KernelSource =
    KernelSource { name: "decode_attention.cu", text: include_str!("../kernels/decode_attention.cu"), headers: &[] };

/// Variants of [`DECODE_ATTENTION`]: dtype, lanes, vectors, heads of a block, keys of a turn, stages, alignment.
macro_rules! decode_attention {
    ($([$kind:literal, $lanes:literal, $vectors:literal, $group:literal, $turn:literal, $stages:literal, $aligned:literal]),* $(,)?) => {
        &[$(&[
            ("X_KIND", $kind),
            ("LANES", $lanes),
            ("VECTORS", $vectors),
            ("GROUP", $group),
            ("TURN", $turn),
            ("STAGES", $stages),
            ("ROWS_ALIGNED", $aligned),
        ]),*]
    };
}

/// Heads of 64 and 128 with one to eight queries a key head, the widest, and rows that are not aligned.
const DECODE_ATTENTION_VARIANTS: &[Defines<'static>] = decode_attention![
    [0, 8, 1, 4, 2, 2, 1],
    [0, 8, 1, 1, 2, 2, 1],
    [0, 8, 1, 8, 2, 2, 1],
    [0, 16, 1, 4, 2, 2, 1],
    [0, 1, 1, 2, 2, 2, 0],
    [0, 32, 4, 2, 1, 2, 1],
    [1, 8, 1, 1, 2, 4, 1],
    [1, 8, 1, 3, 2, 4, 1],
    [1, 8, 1, 8, 2, 4, 1],
    [1, 16, 1, 1, 2, 4, 1],
    [1, 16, 1, 4, 2, 4, 1],
    [1, 16, 1, 8, 2, 4, 1],
    [1, 32, 4, 2, 1, 2, 0],
    [1, 8, 1, 4, 2, 4, 1],
];

/// What the kernels of attention on Hopper share.
const HOPPER_HEADERS: &[(&str, &str)] = &[("attention_sm90.cuh", include_str!("../kernels/attention_sm90.cuh"))];

/// Attention on Hopper.
pub(crate) static ATTENTION_FORWARD: KernelSource = KernelSource {
    name: "attention_forward_sm90.cu",
    text: include_str!("../kernels/attention_forward_sm90.cu"),
    headers: HOPPER_HEADERS,
};

/// The gradient of its queries.
pub(crate) static ATTENTION_DQ: KernelSource = KernelSource {
    name: "attention_dq_sm90.cu",
    text: include_str!("../kernels/attention_dq_sm90.cu"),
    headers: HOPPER_HEADERS,
};

/// Those of its keys and values.
pub(crate) static ATTENTION_DKV: KernelSource = KernelSource {
    name: "attention_dkv_sm90.cu",
    text: include_str!("../kernels/attention_dkv_sm90.cu"),
    headers: HOPPER_HEADERS,
};

/// What queries see within documents and windows.
pub(crate) static SPANS: KernelSource =
    KernelSource { name: "spans.cu", text: include_str!("../kernels/spans.cu"), headers: &[] };

/// Every kernel of this crate with the variants in use; a test compiles them all.
pub const KERNELS: &[KernelSpec] = &[
    KernelSpec { source: &ROTARY, variants: &[&[("X_KIND", 0)], &[("X_KIND", 1)]] },
    KernelSpec { source: &ATTENTION_FORWARD, variants: hopper::FORWARD_VARIANTS },
    KernelSpec { source: &ATTENTION_DQ, variants: hopper::DQ_VARIANTS },
    KernelSpec { source: &ATTENTION_DKV, variants: hopper::DKV_VARIANTS },
    KernelSpec { source: &SPANS, variants: &[&[]] },
    KernelSpec { source: &DECODE_CLOCK, variants: &[&[]] },
    KernelSpec {
        source: &DECODE_APPEND,
        variants: &[
            &[("X_KIND", 0), ("ROTARY", 0)],
            &[("X_KIND", 0), ("ROTARY", 1)],
            &[("X_KIND", 1), ("ROTARY", 0)],
            &[("X_KIND", 1), ("ROTARY", 1)],
        ],
    },
    KernelSpec { source: &DECODE_ATTENTION, variants: DECODE_ATTENTION_VARIANTS },
];
