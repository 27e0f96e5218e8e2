#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod balance;
mod bytes;
pub mod cost;
mod error;
pub mod mixing;
pub mod plan;
pub mod policy;
pub mod routing;
mod settings;
mod shape;

pub use bytes::{BlockBytes, Element};
pub use cost::{BlockFlops, Flops, ModelFlops, ScoreCount};
pub use error::{Error, Result};
pub use plan::{BlockPlan, Branch, Owner, Span, SplitPlan};
pub use policy::{POLICIES, Policy, Sharing, SplitPolicy, SplitRequest};
pub use routing::{BlockRoute, Routing, policy_per_block};
pub use settings::{AttnFrac, Cycle, SplitSettings, Window};
pub use shape::{
    AttnShape, BlockForm, BlockParams, BlockShape, Bridge, FuseShape, Fusion, MlpShape, ModelShape, SsmShape,
};
