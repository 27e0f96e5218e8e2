//! The selective scan on CUDA: one fused kernel forward and one backward, with segments of the sequence side by side where channels
//! and batch alone do not fill the device.
// b batch, l seq_len, e d_inner, n d_state, s segments, c chunks

use flowhn_torch::kernel::{Arg, Kernel, KernelSource};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply};
use tch::{Kind, Tensor};

use super::scan_shape::{Operands, Pass, rows_are_near};
use crate::args::Carry;
use crate::kernels::{SELECTIVE_SCAN_BACKWARD, SELECTIVE_SCAN_CARRY, SELECTIVE_SCAN_FORWARD};
use crate::scan::{DtActivation, SelectiveScan, SelectiveScanOutput};

/// The name in errors and on the autograd tape.
pub(super) const OP: &str = "selective_scan";
/// Threads of a block that adds up what the blocks of the backward kernel leave.
const SUM_THREADS: i64 = 256;

/// Runs the scan on checked arguments with at least one element.
pub(crate) fn selective_scan(args: &SelectiveScan, carry: Carry) -> Result<SelectiveScanOutput> {
    let mut inputs = vec![args.x_ble, args.dt_ble, args.a_en, args.b_bln, args.c_bln];
    let mut optional = |tensor| {
        inputs.push(tensor?);
        Some(inputs.len() - 1)
    };
    let function = Scan {
        d: optional(args.d_e),
        z: optional(args.z_ble),
        dt_bias: optional(args.dt_bias_e),
        initial_state: optional(args.initial_state_ben),
        reset: optional(args.reset_bl),
        softplus: args.dt_activation == DtActivation::Softplus,
        carry,
    };
    let mut outputs = apply(function, &inputs)?;
    let final_state_ben = outputs.remove(1);
    Ok(SelectiveScanOutput { y_ble: outputs.remove(0), final_state_ben })
}

/// The custom function; optional inputs by their index.
struct Scan {
    d: Option<usize>,
    z: Option<usize>,
    dt_bias: Option<usize>,
    initial_state: Option<usize>,
    reset: Option<usize>,
    softplus: bool,
    carry: Carry,
}

impl Function for Scan {
    const NAME: &'static str = OP;

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let operands = self.operands(inputs)?;
        let shape = operands.shape();
        let empty = |size: &[i64], kind| Tensor::f_empty(size, (kind, inputs[0].device()));
        let y = empty(&shape.x(), inputs[0].kind())?;
        let state = || Ok(empty(&shape.state(), Kind::Float)?);
        let final_state = self.carry.place(OP, ctx, inputs, self.initial_state, state)?;
        let chunk_states = ctx.is_recorded().then(|| empty(&shape.chunk_states(), Kind::Float)).transpose()?;

        let (n_segments, segment_len) = operands.segments();
        let initial = self.initial_state.map(|idx| inputs[idx].f_contiguous()).transpose()?;
        let start = match n_segments {
            1 => initial,
            _ => Some(carry(&operands, Pass::CarryForward, initial.as_ref(), n_segments, segment_len)?),
        };
        let mut args = vec![Arg::Tensor(&y), Arg::Tensor(&final_state), Arg::opt(chunk_states.as_ref())];
        operands.push_activations(&mut args);
        operands.push_parameters(&mut args);
        args.push(Arg::opt(start.as_ref()));
        operands.push_reset(&mut args);
        operands.push_sizes(&mut args, segment_len);
        kernel(&SELECTIVE_SCAN_FORWARD, "selective_scan_forward", &operands.defines(Pass::Forward)?).launch(
            operands.grid(Pass::Forward, n_segments),
            operands.block(Pass::Forward),
            operands.shared_bytes(Pass::Forward),
            &args,
        )?;
        ctx.accept_undefined_grad(1);
        if let Some(chunk_states) = chunk_states {
            inputs.iter().for_each(|input| ctx.save(input));
            ctx.save(&chunk_states);
        }
        Ok(vec![y, final_state])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let saved: Vec<&Tensor> = ctx.saved().iter().collect();
        let (chunk_states, inputs) = saved.split_last().expect("the forward saved the states after the inputs");
        let operands = self.operands(inputs)?.with_grad(&grads[0])?;
        let shape = operands.shape();
        let empty = |size: &[i64], kind| Tensor::f_empty(size, (kind, inputs[0].device()));
        let like = |idx: usize| empty(&inputs[idx].size(), inputs[idx].kind());
        let wanted = |idx: Option<usize>| idx.filter(|&idx| ctx.needs_grad(idx));
        let (dx, ddt, da, db, dc) = (like(0)?, like(1)?, like(2)?, like(3)?, like(4)?);
        let dz = self.z.map(|idx| ctx.grad_place(idx, inputs[idx])).transpose()?;
        if dz.as_ref().is_some_and(|dz| !rows_are_near(dz)) {
            return Err(Error::invalid(
                OP,
                "rows of the gradient of z_ble are 4 GiB apart or more; make z_ble contiguous",
            ));
        }
        let dz_stride = dz.as_ref().map_or_else(|| vec![0, 0], Tensor::stride);
        let dd = wanted(self.d).map(like).transpose()?;
        let ddt_bias = wanted(self.dt_bias).map(like).transpose()?;
        let dinitial = wanted(self.initial_state).map(like).transpose()?;

        let (n_segments, segment_len) = operands.segments();
        let pass = operands.backward_pass(n_segments);
        let n_parts = shape.batch * n_segments;
        let state_parts = empty(&shape.state_parts(pass), Kind::Float)?;
        let rate_parts = empty(&[n_parts, shape.d_inner, shape.d_state], Kind::Float)?;
        let channel_parts = empty(&[n_parts, 2, shape.d_inner], Kind::Float)?;
        let final_grad = grads[1].defined().then(|| grads[1].f_contiguous()).transpose()?;
        let end_grad = match n_segments {
            1 => final_grad,
            _ => Some(carry(&operands, Pass::CarryBackward, final_grad.as_ref(), n_segments, segment_len)?),
        };
        let mut args = vec![
            Arg::Tensor(&dx),
            Arg::Tensor(&ddt),
            Arg::opt(dz.as_ref()),
            Arg::I64(dz_stride[0]),
            Arg::I64(dz_stride[1]),
            Arg::Tensor(&state_parts),
            Arg::Tensor(&rate_parts),
            Arg::Tensor(&channel_parts),
            Arg::opt(dinitial.as_ref()),
        ];
        operands.push_activations(&mut args);
        operands.push_parameters(&mut args);
        args.extend([Arg::Tensor(chunk_states), Arg::opt(end_grad.as_ref())]);
        operands.push_reset(&mut args);
        operands.push_sizes(&mut args, segment_len);
        let defines = operands.defines(pass)?;
        kernel(&SELECTIVE_SCAN_BACKWARD, "selective_scan_backward", &defines).launch(
            operands.grid(pass, n_segments),
            operands.block(pass),
            operands.shared_bytes(pass),
            &args,
        )?;

        let [n_blocks, batch, seq_len, width] = shape.state_parts(pass);
        let [blocks_of_sequence, ..] = blocks_of(SUM_THREADS, seq_len * width / 4);
        let [channel_blocks, ..] = blocks_of(SUM_THREADS, shape.d_inner * (shape.d_state + 2));
        kernel(&SELECTIVE_SCAN_BACKWARD, "selective_scan_sum", &defines).launch_early(
            [channel_blocks + blocks_of_sequence * batch as u32, 1, 1],
            SUM_THREADS as u32,
            0,
            &[
                Arg::Tensor(&db),
                Arg::Tensor(&dc),
                Arg::Tensor(&state_parts),
                Arg::I32(n_blocks as i32),
                Arg::I32(batch as i32),
                Arg::I64(seq_len),
                Arg::Tensor(&da),
                Arg::opt(dd.as_ref()),
                Arg::opt(ddt_bias.as_ref()),
                Arg::Tensor(&rate_parts),
                Arg::Tensor(&channel_parts),
                Arg::I32(n_parts as i32),
                Arg::I32(shape.d_inner as i32),
                Arg::I32(shape.d_state as i32),
                Arg::I32(channel_blocks as i32),
            ],
        )?;

        let mut out: Vec<Option<Tensor>> = [dx, ddt, da, db, dc].into_iter().map(Some).collect();
        out.resize_with(inputs.len(), || None);
        for (idx, grad) in [(self.d, dd), (self.z, dz), (self.dt_bias, ddt_bias), (self.initial_state, dinitial)] {
            if let Some(idx) = idx {
                out[idx] = grad;
            }
        }
        Ok(out)
    }
}

impl Scan {
    fn operands(&self, inputs: &[&Tensor]) -> Result<Operands> {
        let optional = |idx: Option<usize>| idx.map(|idx| inputs[idx]);
        Operands::new(
            [inputs[0], inputs[1], inputs[3], inputs[4]],
            optional(self.z),
            [Some(inputs[2]), optional(self.d), optional(self.dt_bias)],
            optional(self.reset),
            self.softplus,
        )
    }
}

/// The states at the borders of segments `[batch, n_segments, d_inner, d_state]`: before each segment from what enters the first,
/// or, backward, the gradients after each from what enters the last.
fn carry(
    operands: &Operands,
    pass: Pass,
    entering: Option<&Tensor>,
    n_segments: i64,
    segment_len: i64,
) -> Result<Tensor> {
    let shape = operands.shape();
    let empty = || {
        let size = [shape.batch, n_segments, shape.d_inner, shape.d_state];
        Tensor::f_empty(size, (Kind::Float, operands.device()))
    };
    let (states, decays) = (empty()?, empty()?);
    let defines = operands.defines(pass)?;
    let mut args = vec![Arg::Tensor(&states), Arg::Tensor(&decays)];
    operands.push_carry_activations(&mut args, pass);
    operands.push_reset(&mut args);
    operands.push_sizes(&mut args, segment_len);
    kernel(&SELECTIVE_SCAN_CARRY, "selective_scan_carry", &defines).launch(
        operands.grid(pass, n_segments),
        operands.block(pass),
        operands.shared_bytes(pass),
        &args,
    )?;
    let n_states = shape.d_inner * shape.d_state;
    let [n_blocks, ..] = blocks_of(128, n_states);
    kernel(&SELECTIVE_SCAN_CARRY, "selective_scan_link", &defines).launch(
        [n_blocks, shape.batch as u32, 1],
        128,
        0,
        &[
            Arg::Tensor(&states),
            Arg::Tensor(&decays),
            Arg::opt(entering),
            Arg::I32(n_segments as i32),
            Arg::I64(n_states),
        ],
    )?;
    Ok(states)
}

fn kernel<'a>(source: &'static KernelSource, entry: &'static str, defines: &'a [(&'static str, i64)]) -> Kernel<'a> {
    Kernel { source, entry, defines }
}

/// A grid of blocks of `n_threads` for `n` single threads.
fn blocks_of(n_threads: i64, n: i64) -> [u32; 3] {
    [((n + n_threads - 1) / n_threads) as u32, 1, 1]
}
