//! The public API of the crate, in one binary: linking libtorch takes longer than the tests do.

mod attention;
mod cache;
mod common;
mod mixer;
mod rotary;
