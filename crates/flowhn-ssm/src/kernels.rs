//! The kernels of this crate.

use flowhn_torch::kernel::{Defines, KernelSource, KernelSpec};

use crate::cuda::conv::ConvVariant;
use crate::cuda::scan_shape::ScanVariant;

/// What the kernels of the selective scan share.
const SELECTIVE_SCAN_HEADERS: &[(&str, &str)] =
    &[("selective_scan_tile.cuh", include_str!("../kernels/selective_scan_tile.cuh"))];

/// [`selective_scan`](crate::selective_scan) forward.
pub(crate) static SELECTIVE_SCAN_FORWARD: KernelSource = KernelSource {
    name: "selective_scan_forward.cu",
    text: include_str!("../kernels/selective_scan_forward.cu"),
    headers: SELECTIVE_SCAN_HEADERS,
};

/// The states at the borders of its segments, both ways.
pub(crate) static SELECTIVE_SCAN_CARRY: KernelSource = KernelSource {
    name: "selective_scan_carry.cu",
    text: include_str!("../kernels/selective_scan_carry.cu"),
    headers: SELECTIVE_SCAN_HEADERS,
};

/// Its backward.
pub(crate) static SELECTIVE_SCAN_BACKWARD: KernelSource = KernelSource {
    name: "selective_scan_backward.cu",
    text: include_str!("../kernels/selective_scan_backward.cu"),
    headers: SELECTIVE_SCAN_HEADERS,
};

/// [`causal_conv1d`](crate::causal_conv1d), both ways.
pub(crate) static CAUSAL_CONV1D: KernelSource =
    KernelSource { name: "causal_conv1d.cu", text: include_str!("../kernels/causal_conv1d.cu"), headers: &[] };

/// The convolution of the mixers, forward and backward, and the ends of what it can do.
const CAUSAL_CONV1D_VARIANTS: &[Defines<'static>] = &[
    &ConvVariant::mixer(1, 4).defines(),
    &ConvVariant::mixer(0, 4).defines(),
    &ConvVariant { resets: true, ..ConvVariant::mixer(1, 4) }.defines(),
    &ConvVariant { d_conv: 1, vec: 1, silu: false, ..ConvVariant::mixer(1, 1) }.defines(),
    &ConvVariant { d_conv: 7, vec: 2, ..ConvVariant::mixer(0, 2) }.defines(),
];

/// The scan as Mamba-1 uses it, packed, and with everything that makes it slower: odd widths, many states, no gate.
const SELECTIVE_SCAN_VARIANTS: &[Defines<'static>] = &[
    &ScanVariant::mamba(1).defines(),
    &ScanVariant::mamba(0).defines(),
    &ScanVariant { reset: true, kinds: [1, 1, 1, 0, 0], ..ScanVariant::mamba(1) }.defines(),
    &ScanVariant {
        paired_channels: false,
        paired_states: false,
        softplus: false,
        gated: false,
        n_slices: 4,
        ..ScanVariant::mamba(1)
    }
    .defines(),
];

/// The same for the backward, and behind them blocks of three teams, which are used on Hopper alone.
const SELECTIVE_SCAN_BACKWARD_VARIANTS: &[Defines<'static>] = &[
    SELECTIVE_SCAN_VARIANTS[0],
    SELECTIVE_SCAN_VARIANTS[1],
    SELECTIVE_SCAN_VARIANTS[2],
    SELECTIVE_SCAN_VARIANTS[3],
    &ScanVariant { n_teams: 3, ..ScanVariant::mamba(1) }.defines(),
    &ScanVariant { n_teams: 3, ..ScanVariant::mamba(0) }.defines(),
    &ScanVariant { n_teams: 3, reset: true, ..ScanVariant::mamba(1) }.defines(),
    &ScanVariant {
        n_teams: 3,
        paired_channels: false,
        paired_states: false,
        softplus: false,
        gated: false,
        ..ScanVariant::mamba(1)
    }
    .defines(),
];

/// What the kernels of SSD on the tensor cores share.
const SSD_HEADERS: &[(&str, &str)] = &[("ssd_tile.cuh", include_str!("../kernels/ssd_tile.cuh"))];

/// Step sizes and decays of [`ssd`](crate::ssd).
pub(crate) static SSD_STEPS: KernelSource =
    KernelSource { name: "ssd_steps.cu", text: include_str!("../kernels/ssd_steps.cu"), headers: SSD_HEADERS };

/// [`ssd`](crate::ssd) forward.
pub(crate) static SSD_FORWARD: KernelSource =
    KernelSource { name: "ssd_forward.cu", text: include_str!("../kernels/ssd_forward.cu"), headers: SSD_HEADERS };

/// What its kernels for Hopper share.
const SSD_SM90_HEADERS: &[(&str, &str)] = &[
    ("ssd_tile.cuh", include_str!("../kernels/ssd_tile.cuh")),
    ("ssd_panels.cuh", include_str!("../kernels/ssd_panels.cuh")),
];

/// [`SSD_FORWARD`] for Hopper.
pub(crate) static SSD_FORWARD_SM90: KernelSource = KernelSource {
    name: "ssd_forward_sm90.cu",
    text: include_str!("../kernels/ssd_forward_sm90.cu"),
    headers: SSD_SM90_HEADERS,
};

/// [`SSD_STATE`] for Hopper.
pub(crate) static SSD_STATE_SM90: KernelSource = KernelSource {
    name: "ssd_state_sm90.cu",
    text: include_str!("../kernels/ssd_state_sm90.cu"),
    headers: SSD_SM90_HEADERS,
};

/// Its state alone, over the chunks of a sequence, both ways.
pub(crate) static SSD_STATE: KernelSource =
    KernelSource { name: "ssd_state.cu", text: include_str!("../kernels/ssd_state.cu"), headers: SSD_HEADERS };

/// What the two forms of its backward include, panels in the one for Hopper alone.
const SSD_BACKWARD_HEADERS: &[(&str, &str)] = &[
    ("ssd_tile.cuh", include_str!("../kernels/ssd_tile.cuh")),
    ("ssd_panels.cuh", include_str!("../kernels/ssd_panels.cuh")),
    ("ssd_backward.cuh", include_str!("../kernels/ssd_backward.cuh")),
];

/// Its backward inside the chunks.
pub(crate) static SSD_BACKWARD: KernelSource = KernelSource {
    name: "ssd_backward.cu",
    text: include_str!("../kernels/ssd_backward.cu"),
    headers: SSD_BACKWARD_HEADERS,
};

/// [`SSD_BACKWARD`] for Hopper.
pub(crate) static SSD_BACKWARD_SM90: KernelSource = KernelSource {
    name: "ssd_backward_sm90.cu",
    text: include_str!("../kernels/ssd_backward_sm90.cu"),
    headers: SSD_BACKWARD_HEADERS,
};

/// The sums that close its backward.
pub(crate) static SSD_REDUCE: KernelSource =
    KernelSource { name: "ssd_reduce.cu", text: include_str!("../kernels/ssd_reduce.cu"), headers: &[] };

/// Token by token: f32, and single steps.
pub(crate) static SSD_RECURRENT: KernelSource =
    KernelSource { name: "ssd_recurrent.cu", text: include_str!("../kernels/ssd_recurrent.cu"), headers: &[] };

/// Every kernel of this crate with the variants in use; a test compiles them all.
pub const KERNELS: &[KernelSpec] = &[
    KernelSpec { source: &CAUSAL_CONV1D, variants: CAUSAL_CONV1D_VARIANTS },
    KernelSpec { source: &SELECTIVE_SCAN_FORWARD, variants: SELECTIVE_SCAN_VARIANTS },
    KernelSpec { source: &SELECTIVE_SCAN_BACKWARD, variants: SELECTIVE_SCAN_BACKWARD_VARIANTS },
    KernelSpec {
        source: &SELECTIVE_SCAN_CARRY,
        variants: &[
            &ScanVariant::mamba(1).defines(),
            &ScanVariant { reverse: true, ..ScanVariant::mamba(1) }.defines(),
            &ScanVariant { reset: true, n_slices: 4, ..ScanVariant::mamba(0) }.defines(),
        ],
    },
    KernelSpec { source: &SSD_STEPS, variants: &[&[("DT_KIND", 1)], &[("DT_KIND", 0)]] },
    // Heads of 64 with a state of 128, as Mamba-2 uses them; then the largest state, and small odd sizes.
    KernelSpec {
        source: &SSD_FORWARD,
        variants: &[
            &[("P_TILE", 64), ("N_TILE", 128), ("ALIGNED", 1)],
            &[("P_TILE", 64), ("N_TILE", 256), ("ALIGNED", 1)],
            &[("P_TILE", 32), ("N_TILE", 64), ("ALIGNED", 0)],
        ],
    },
    KernelSpec {
        source: &SSD_STATE,
        variants: &[
            &[("P_TILE", 64), ("N_TILE", 128), ("ALIGNED", 1), ("REVERSE", 0)],
            &[("P_TILE", 64), ("N_TILE", 128), ("ALIGNED", 1), ("REVERSE", 1)],
            &[("P_TILE", 32), ("N_TILE", 64), ("ALIGNED", 0), ("REVERSE", 1)],
        ],
    },
    KernelSpec {
        source: &SSD_BACKWARD,
        variants: &[
            &[("P_TILE", 64), ("N_TILE", 128), ("ALIGNED", 1), ("DT_KIND", 1)],
            &[("P_TILE", 64), ("N_TILE", 256), ("ALIGNED", 1), ("DT_KIND", 1)],
            &[("P_TILE", 32), ("N_TILE", 64), ("ALIGNED", 0), ("DT_KIND", 0)],
        ],
    },
    KernelSpec { source: &SSD_FORWARD_SM90, variants: &[&[]] },
    KernelSpec { source: &SSD_STATE_SM90, variants: &[&[("REVERSE", 0)], &[("REVERSE", 1)]] },
    KernelSpec { source: &SSD_BACKWARD_SM90, variants: &[&[("DT_KIND", 1)], &[("DT_KIND", 0)]] },
    KernelSpec { source: &SSD_REDUCE, variants: &[&[("OUT_KIND", 1)], &[("OUT_KIND", 0)]] },
    KernelSpec {
        source: &SSD_RECURRENT,
        variants: &[
            &[("X_KIND", 0), ("DT_KIND", 0), ("N_TILE", 128), ("ROWS", 8)],
            &[("X_KIND", 0), ("DT_KIND", 0), ("N_TILE", 256), ("ROWS", 8)],
            &[("X_KIND", 1), ("DT_KIND", 1), ("N_TILE", 128), ("ROWS", 4)],
        ],
    },
];
