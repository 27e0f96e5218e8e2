#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![deny(missing_docs)]
// A list with one range is what `ranges` returns for a branch in one piece.
#![cfg_attr(test, allow(clippy::single_range_in_vec_init))]

pub mod balance;
mod bytes;
pub mod cost;
mod error;
pub mod mixing;
pub mod plan;
pub mod policy;
mod report;
pub mod routing;
mod settings;
mod shape;

pub use bytes::{BlockBytes, Element};
pub use cost::{BlockFlops, Flops, ModelFlops, ScoreCount};
pub use error::{Error, Result};
pub use plan::{BlockPlan, Branch, Owner, Span, SplitPlan};
pub use policy::{POLICIES, Policy, Sharing, SplitPolicy, SplitRequest};
pub use report::{BlockReport, FlopsPerToken, KindFlops, PartFlops, PerToken, PlanReport, TotalFlops};
pub use routing::{BlockRoute, Routing, policy_per_block};
pub use settings::{AttnFrac, Cycle, SplitSettings, Window};
pub use shape::{
    AttnShape, BlockForm, BlockOptions, BlockParams, BlockShape, Bridge, FuseShape, Fusion, GateNorm, Join, MlpShape,
    ModelShape, SsmShape,
};
