//! Where the two branches of a parallel hybrid block part and meet again: gather and merge of routed tokens, and the fusion
//! modules that turn two branches' outputs into one.
//!
//! A [`Route`] says which tokens of a sequence one branch reads. [`split`] hands both branches their tokens (views where a
//! branch owns one span), [`merge`] puts the outputs back in order with one copy, and a [`Fusion`] does what follows.
//!
//! Pairs and triples of steps that follow each other have names of their own, because a CUDA kernel does them in one pass:
//! [`gather_norm`], [`split_norm`] and [`split_norm_tokens`] (the branches' tokens, then the norm that opens a branch),
//! [`merge_residual`] and [`merge_residual_norm`] (merge, residual add, the norm that follows), [`merge_sums`] (the branches' last
//! additions, then merge).
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod cuda;
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
pub use gather::{SplitNormed, SplitTokens, gather, gather_norm, split, split_norm, split_norm_tokens, split_residual};
pub use kernels::KERNELS;
pub use merge::{merge, merge_residual, merge_residual_norm, merge_sums};
pub use route::Route;

/// The example of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
