//! The product of one token with a matrix, by a kernel of our own.

use tch::{Kind, Tensor};

use flowhn_torch::Result;
use flowhn_torch::kernel::rows::{rows_are_aligned, with_dense_rows};
use flowhn_torch::kernel::{Arg, Kernel};

use crate::kernels::LINEAR_ROW;
use crate::linear_bf16::with_width;

/// The product of one token, as in decoding: a matrix times a vector, whose time is that of reading the matrix. libtorch's takes twice
/// as long for small matrices; it keeps those whose rows are not aligned to 16 bytes.
pub(crate) fn one_token(x: &Tensor, weight_oi: &Tensor) -> Result<Tensor> {
    const WARPS: u32 = 2;
    let x = with_dense_rows(x)?;
    let (size, weight_size) = (x.size(), weight_oi.size());
    let fits = size.last() == weight_size.last() && weight_oi.stride()[1] == 1 && weight_oi.kind() == Kind::BFloat16;
    let [d_out, d_in] = [weight_size[0], weight_size[1]];
    if !fits || x.numel() == 0 || !rows_are_aligned(d_in, &[&x, weight_oi]) {
        return Ok(x.f_linear(weight_oi, None::<&Tensor>)?);
    }
    let y = Tensor::f_empty(with_width(&x, d_out), (x.kind(), x.device()))?;
    Kernel { source: &LINEAR_ROW, entry: "linear_row", defines: &[] }.launch(
        [(d_out as u32).div_ceil(WARPS), 1, 1],
        32 * WARPS,
        0,
        &[
            Arg::Tensor(&x),
            Arg::Tensor(weight_oi),
            Arg::Tensor(&y),
            Arg::I64(weight_oi.stride()[0]),
            Arg::I32(d_out as i32),
            Arg::I32(d_in as i32),
        ],
    )?;
    Ok(y)
}
