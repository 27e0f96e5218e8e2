//! Grouped-query causal attention over any subset of a sequence's tokens: rotary embedding by absolute position, packed
//! documents, sliding windows, a key-value cache, and the mixer that puts them together.
//!
//! [`attention`] is the operation, [`Mask`] says who may see whom, [`rotary`] turns queries and keys, [`KvCache`] remembers
//! keys and values, [`Clock`] says where a sequence stands that grows by single tokens, and [`AttnMixer`] is the branch's layer with its parameters.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod attention;
mod cache;
mod clock;
mod decode;
mod fused;
mod hopper;
mod kernels;
mod mask;
mod mixer;
mod positions;
mod rope;
mod rotary;
#[cfg(feature = "selftest")]
pub mod selftest;

pub use attention::attention;
pub use cache::KvCache;
pub use clock::Clock;
pub use flowhn_torch::{Error, Result};
pub use kernels::KERNELS;
pub use mask::{Mask, Order};
pub use mixer::{AttnConfig, AttnContext, AttnInit, AttnMixer, Bridge};
pub use positions::Positions;
pub use rope::{Rope, RopeScaling};
pub use rotary::{RotaryTable, rotary};

/// The example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
