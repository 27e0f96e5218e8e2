//! [`swiglu`](crate::swiglu) on CUDA.

use tch::Tensor;

use flowhn_torch::kernel::rows::{Rows, aligned};
use flowhn_torch::kernel::{Arg, Kernel, kind_define};
use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result};

use crate::kernels::{SWIGLU, SWIGLU_ROWS};

pub(crate) struct SwiGluCuda;

impl Function for SwiGluCuda {
    const NAME: &'static str = "swiglu";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let rows = Rows::new(Self::NAME, inputs)?;
        let gate_up = rows.tensor(0);
        let mut shape = gate_up.size();
        let f = half_of_last(&mut shape);
        let y = Tensor::f_empty(shape, (gate_up.kind(), gate_up.device()))?;
        let [outer, stride] = rows.strides(0);
        launch(
            "swiglu_forward",
            &rows,
            f,
            &[
                Arg::Tensor(gate_up),
                Arg::Tensor(&y),
                outer,
                stride,
                Arg::I32(rows.n_rows()),
                rows.inner(),
                Arg::I32(f as i32),
                aligned(f, &[gate_up, &y]),
            ],
        )?;
        if ctx.is_recorded() {
            ctx.save(inputs[0]);
        }
        Ok(vec![y])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(Self::grad(&ctx.saved()[0], &grads[0])?)])
    }
}

impl SwiGluCuda {
    /// The gradient of `gate_up` from that of the output.
    pub(crate) fn grad(gate_up: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let rows = Rows::new(Self::NAME, &[gate_up, dy])?;
        let (gate_up, dy) = (rows.tensor(0), rows.tensor(1));
        let f = half_of_last(&mut gate_up.size());
        let grad = Tensor::f_empty(gate_up.size(), (gate_up.kind(), gate_up.device()))?;
        let ([outer, stride], [dy_outer, dy_stride]) = (rows.strides(0), rows.strides(1));
        launch(
            "swiglu_backward",
            &rows,
            f,
            &[
                Arg::Tensor(gate_up),
                Arg::Tensor(dy),
                Arg::Tensor(&grad),
                outer,
                stride,
                dy_outer,
                dy_stride,
                Arg::I32(rows.n_rows()),
                rows.inner(),
                Arg::I32(f as i32),
                aligned(f, &[gate_up, dy, &grad]),
            ],
        )?;
        Ok(grad)
    }
}

/// A thread takes 8 columns of `SWIGLU_ROWS` rows.
fn launch(entry: &'static str, rows: &Rows, f: i64, args: &[Arg]) -> Result<()> {
    let vectors = (f as u32).div_ceil(8);
    let block = vectors.next_multiple_of(32).min(256);
    let defines = [("X_KIND", kind_define(SwiGluCuda::NAME, "gate_up", rows.tensor(0))?), ("ROWS", SWIGLU_ROWS.into())];
    let grid = [(rows.n_rows() as u32).div_ceil(SWIGLU_ROWS), vectors.div_ceil(block), 1];
    Kernel { source: &SWIGLU, entry, defines: &defines }.launch(grid, block, 0, args)
}

/// Halves the last axis and returns its new size.
fn half_of_last(shape: &mut [i64]) -> i64 {
    let Some(last) = shape.last_mut() else { return 0 };
    *last /= 2;
    *last
}
