#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod extent;
mod format;
mod read;
mod write;

pub use extent::{ALIGNMENT, Extent, regions};
pub use format::{BoxMap, Launch, Link, Place, Record, Region, Skipped, Value};
pub use read::Trace;
pub use write::Writer;

/// The file of records.
const LAUNCHES: &str = "launches.jsonl";
/// The file of bytes.
const DATA: &str = "data.bin";
