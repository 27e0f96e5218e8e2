//! libtorch's global switches.

use std::ffi::CStr;

use crate::{Result, ffi};

/// A global switch of libtorch. All of them belong to the process: set them once, early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flag {
    /// TF32 in cuBLAS products of f32 tensors.
    Tf32Cublas,
    /// TF32 in cuDNN.
    Tf32Cudnn,
    /// bf16 instead of f32 where cuBLAS reduces partial sums.
    Bf16ReducedPrecisionReduction,
    /// Only deterministic algorithms; operators that have none fail.
    Deterministic,
    /// Only deterministic algorithms in cuDNN.
    DeterministicCudnn,
    /// Whether deterministic mode also fills uninitialised memory.
    DeterministicFill,
    /// Flash attention in `scaled_dot_product_attention`.
    SdpFlash,
    /// Memory-efficient attention in `scaled_dot_product_attention`.
    SdpMemEfficient,
    /// Plain attention in `scaled_dot_product_attention`.
    SdpMath,
    /// cuDNN attention in `scaled_dot_product_attention`.
    SdpCudnn,
}

impl Flag {
    /// Turns the switch on or off.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if libtorch refuses.
    pub fn set(self, on: bool) -> Result<()> {
        // SAFETY: the name is a static C string; the shim keeps nothing.
        ffi::status(unsafe { ffi::flowhn_flag_set(self.name().as_ptr(), i32::from(on)) })
    }

    /// Whether the switch is on.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] if libtorch refuses.
    pub fn is_set(self) -> Result<bool> {
        let mut on = 0;
        // SAFETY: the name is a static C string, `on` a place for one int.
        ffi::status(unsafe { ffi::flowhn_flag_get(self.name().as_ptr(), &mut on) })?;
        Ok(on != 0)
    }

    fn name(self) -> &'static CStr {
        match self {
            Self::Tf32Cublas => c"tf32_cublas",
            Self::Tf32Cudnn => c"tf32_cudnn",
            Self::Bf16ReducedPrecisionReduction => c"bf16_reduced_precision_reduction",
            Self::Deterministic => c"deterministic",
            Self::DeterministicCudnn => c"deterministic_cudnn",
            Self::DeterministicFill => c"deterministic_fill",
            Self::SdpFlash => c"sdp_flash",
            Self::SdpMemEfficient => c"sdp_mem_efficient",
            Self::SdpMath => c"sdp_math",
            Self::SdpCudnn => c"sdp_cudnn",
        }
    }
}
