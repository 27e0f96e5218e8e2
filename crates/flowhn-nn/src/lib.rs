//! The layers that every branch of a FlowHN block shares: named parameters and their initial values, linear maps,
//! normalisation, the SwiGLU MLP, the embedding, and the LM head with its cross-entropy.
#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod init;
mod linear;
mod params;
pub mod simd;

pub use flowhn_torch::{Error, Result};
pub use init::Init;
pub use linear::{Bias, Linear};
pub use params::{Decay, Param, Params, Path, Weight};
