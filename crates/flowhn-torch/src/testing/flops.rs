//! What libtorch's operators really compute.

use crate::{Result, ffi};

/// Runs `body` and counts the floating-point operations of the matrix products that libtorch's operators `mm`, `bmm`, `addmm` and
/// `baddbmm` compute on this thread meanwhile; a multiply-add counts 2.
///
/// ```
/// use flowhn_torch::testing::count_matmul_flops;
/// use tch::{Device, Kind, Tensor};
/// let (x, w) = (Tensor::ones([2, 5, 3], (Kind::Float, Device::Cpu)), Tensor::ones([7, 3], (Kind::Float, Device::Cpu)));
/// let (y, flops) = count_matmul_flops(|| x.linear(&w, None::<&Tensor>))?;
/// assert_eq!((y.size(), flops), (vec![2, 5, 7], 2 * 10 * 3 * 7));
/// # Ok::<(), flowhn_torch::Error>(())
/// ```
///
/// # Errors
/// [`crate::Error::Torch`] if libtorch refuses.
pub fn count_matmul_flops<T>(body: impl FnOnce() -> T) -> Result<(T, u64)> {
    let mut handle = 0;
    // SAFETY: `handle` is a place for one integer; the callback holds no data of ours.
    ffi::status(unsafe { ffi::flowhn_count_begin(&mut handle) })?;
    let counting = Counting(handle);
    let out = body();
    Ok((out, counting.end()?))
}

/// Ends the count also if the body panics.
struct Counting(u64);

impl Counting {
    fn end(self) -> Result<u64> {
        let mut flops = 0;
        // SAFETY: the handle came from `flowhn_count_begin`; `flops` is a place for one integer.
        let ended = ffi::status(unsafe { ffi::flowhn_count_end(self.0, &mut flops) });
        std::mem::forget(self);
        ended.map(|()| flops)
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let mut flops = 0;
        // SAFETY: as in `end`, which forgets the value and so comes here at most once.
        let _ = unsafe { ffi::flowhn_count_end(self.0, &mut flops) };
    }
}
