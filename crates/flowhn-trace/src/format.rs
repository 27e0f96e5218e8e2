//! The lines of a trace.

use serde::{Deserialize, Serialize};

/// One line of `launches.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// A launch with all it needs.
    Launch(Launch),
    /// A launch that took place and was not recorded.
    Skipped(Skipped),
}

/// One launch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Source and entry, `ssd_forward.cu/ssd_forward`.
    pub kernel: String,
    /// The macros that made the variant, `X_KIND=1 WARPS=4`.
    pub variant: String,
    /// The file of its machine code.
    pub cubin: String,
    /// The name of the function in it.
    pub entry: String,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Threads of a block, all in x.
    pub block: u32,
    /// Dynamic shared memory of a block. Past 48 KiB the function has to be given leave first.
    pub shared_bytes: usize,
    /// The memory that its tensors reach.
    pub regions: Vec<Region>,
    /// The addresses in that memory.
    pub links: Vec<Link>,
    /// Its arguments in order.
    pub args: Vec<Value>,
}

/// A piece of memory that one or several tensors of a launch reach, with no byte more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Its address modulo [`ALIGNMENT`](crate::ALIGNMENT).
    pub misalignment: u64,
    /// How many bytes it has.
    pub n_bytes: u64,
    /// Where they begin in `data.bin`.
    pub at: u64,
    /// Whether all it held was what marks memory that nobody has written, so that a kernel may write to it and not read.
    pub unwritten: bool,
}

/// A place in a launch's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Place {
    /// The number of its region.
    pub region: usize,
    /// Bytes from the region's start.
    pub offset: u64,
}

/// An address in a table of them: 8 bytes, low bytes first, which are 0 in `data.bin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Link {
    /// Where it stands.
    pub at: Place,
    /// What it is the address of.
    pub to: Place,
}

/// An argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Value {
    /// The address of a tensor's first element.
    Address(Place),
    /// A map of 128 bytes for Hopper's copy engine.
    Boxes {
        /// The tensor's first element.
        matrix: Place,
        /// What else the map is made from.
        map: BoxMap,
    },
    /// Anything passed by value, a null pointer too: what the driver reads, low bytes first.
    Bits(u64),
}

/// A bf16 tensor of two to four axes and the boxes in which it is copied, in the words of `cuTensorMapEncodeTiled`: axes begin with the one
/// whose elements are neighbours; those that are not there have one element. Boxes take neighbouring elements, swizzled by 128 bytes, and
/// parts of them outside the tensor are read as 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BoxMap {
    /// How many axes are there.
    pub n_axes: u32,
    /// Elements of each axis.
    pub size: [u64; 4],
    /// Bytes from an element of each axis but the first to the next.
    pub strides: [u64; 3],
    /// Elements of a box in each axis.
    pub box_size: [u32; 4],
}

/// A launch that took place and was not recorded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Source and entry.
    pub kernel: String,
    /// The macros that made the variant.
    pub variant: String,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Why.
    pub reason: String,
}
