//! The two formats of 8-bit floats.

use tch::Kind;

/// An 8-bit float: a sign, and exponent and mantissa as the name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// Three bits of mantissa, the largest number 448, no infinity: for activations and weights.
    E4M3,
    /// Two bits of mantissa, the largest number 57344: for gradients, which range further.
    E5M2,
}

impl Format {
    /// libtorch's name of it.
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::E4M3 => Kind::Float8e4m3fn,
            Self::E5M2 => Kind::Float8e5m2,
        }
    }

    /// The largest number.
    pub(crate) fn largest(self) -> f64 {
        match self {
            Self::E4M3 => 448.,
            Self::E5M2 => 57_344.,
        }
    }

    /// What `fp8_cast.cu` calls it.
    pub(crate) fn define(self) -> i64 {
        match self {
            Self::E4M3 => 0,
            Self::E5M2 => 1,
        }
    }
}
