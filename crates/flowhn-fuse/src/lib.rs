//! Where the two branches of a parallel hybrid block part and meet again: gather and merge of routed tokens, and the fusion
//! modules that turn two branches' outputs into one.
//!
//! A [`Route`] says which tokens of a sequence one branch reads. [`split`] hands both branches their tokens (views where a
//! branch owns one span), [`merge`] puts the outputs back in order with one copy, and a [`Fusion`] does what follows.
//!
//! The names of the pairs are the interface that fused device kernels fill later: [`gather_norm`] (gather, then the branch's
//! first norm) and [`merge_residual`] (merge, then the residual add).
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod fusion;
mod gather;
mod kernels;
mod merge;
mod pieces;
mod route;
#[cfg(feature = "selftest")]
pub mod selftest;

pub use flowhn_torch::{Error, Result};
pub use fusion::{FUSIONS, FuseShape, Fusion, FusionKind, FusionSpec, Topology};
pub use gather::{gather, gather_norm, split};
pub use kernels::KERNELS;
pub use merge::{merge, merge_residual};
pub use route::Route;

/// The example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
