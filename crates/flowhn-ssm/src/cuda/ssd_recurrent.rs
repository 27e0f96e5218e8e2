//! SSD token by token: exact to f32, and one launch for a step of decoding.

use flowhn_torch::Result;
use flowhn_torch::kernel::{Arg, Kernel, kind_define};
use tch::{Kind, Tensor};

use super::ssd::{Forward, Grads, Operands, empty, strided};
use super::ssd_chunked::Sums;
use crate::kernels::SSD_RECURRENT;

/// Tokens from one saved state to the next.
const CHECKPOINT: i64 = 32;
/// Warps of a block forward.
const WARPS: i64 = 8;
/// Rows of the state in a warp, by the number of tokens: a few for single steps, so that a small batch fills the chip; for
/// sequences more, as reading `b` and `c` less often counts for more.
const ROWS: [(i64, i64); 2] = [(4, 4), (i64::MAX, 8)];

/// Writes the state after the last token into `final_state`.
pub(super) fn forward(operands: &Operands, final_state: &Tensor, recorded: bool) -> Result<Forward> {
    let Operands { sizes, x, .. } = operands;
    let y = empty(&x.size(), x.kind(), x)?;
    let n_checkpoints = (sizes.seq_len as u64).div_ceil(CHECKPOINT as u64) as i64;
    let checkpoints = match recorded {
        true => Some(empty(&[sizes.batch, n_checkpoints, sizes.n_heads, sizes.d_head, sizes.d_state], Kind::Float, x)?),
        false => None,
    };
    let rows = ROWS.iter().find(|(most, _)| sizes.seq_len <= *most).map_or(8, |(_, rows)| *rows);
    let row_blocks = (sizes.d_head as u64).div_ceil((WARPS * rows) as u64) as i64;
    let args = [
        &strided(x)[..],
        &strided(&operands.dt),
        &[Arg::Tensor(&operands.a)],
        &strided(&operands.b),
        &strided(&operands.c),
        &[Arg::opt(operands.d.as_ref()), Arg::opt(operands.dt_bias.as_ref())],
        &[Arg::opt(operands.initial_state.as_ref()), Arg::opt(operands.reset.as_ref())],
        &[Arg::Tensor(&y), Arg::opt(checkpoints.as_ref()), Arg::Tensor(final_state)],
        &sizes.args(),
        &[Arg::I32(row_blocks as i32), operands.activate()],
    ];
    let n_blocks = sizes.batch * sizes.n_heads * row_blocks;
    Kernel { source: &SSD_RECURRENT, entry: "ssd_recurrent", defines: &defines(operands, rows)? }.launch(
        [n_blocks as u32, 1, 1],
        (WARPS * 32) as u32,
        0,
        &args.concat(),
    )?;
    Ok(Forward { y, saved: checkpoints.into_iter().collect() })
}

/// Gradients of f32 inputs.
pub(super) fn backward(
    operands: &Operands,
    states: &Tensor,
    grad_y: &Tensor,
    grad_state: Option<&Tensor>,
) -> Result<Grads> {
    let Operands { sizes, x, dt, b, .. } = operands;
    let (grad_x, grad_dt) = (empty(&x.size(), x.kind(), x)?, empty(&dt.size(), dt.kind(), x)?);
    let sums = Sums::new(operands, sizes.group_heads(), sizes.batch)?;
    // The kernel turns the gradient of the final state into that of the initial one.
    let shape = [sizes.batch, sizes.n_heads, sizes.d_head, sizes.d_state];
    let grad_states = grad_state.map_or_else(|| Tensor::zeros(shape, (Kind::Float, x.device())), Tensor::copy);
    let n_warps = if sizes.state_tile() <= 128 { 8 } else { 4 };
    let args = [
        &strided(x)[..],
        &strided(dt),
        &[Arg::Tensor(&operands.a)],
        &strided(b),
        &strided(&operands.c),
        &[Arg::opt(operands.d.as_ref()), Arg::opt(operands.dt_bias.as_ref()), Arg::opt(operands.reset.as_ref())],
        &strided(grad_y),
        &[Arg::Tensor(states), Arg::Tensor(&grad_states), Arg::Tensor(&grad_x), Arg::Tensor(&grad_dt)],
        &sums.args(),
        &[Arg::I32(sizes.batch as i32)],
        &sizes.args(),
        &[operands.activate()],
    ];
    Kernel { source: &SSD_RECURRENT, entry: "ssd_recurrent_backward", defines: &defines(operands, 8)? }.launch(
        [(sizes.batch * sizes.n_heads) as u32, 1, 1],
        n_warps * 32,
        backward_shared_bytes(sizes.state_tile() as usize),
        &args.concat(),
    )?;
    let (b, c, per_head) = sums.reduce()?;
    Ok(Grads { x: grad_x, dt: grad_dt, b, c, per_head, initial_state: Some(grad_states) })
}

/// The size of `Shared` in the kernel.
fn backward_shared_bytes(state_tile: usize) -> usize {
    let (warps, window) = if state_tile <= 128 { (8, 16) } else { (4, 8) };
    let checkpoint = CHECKPOINT as usize;
    let rows = warps * 3 * window + checkpoint + window;
    let scalars = 2 * checkpoint + 2 * warps * window + warps + 2 * window;
    (rows * state_tile + scalars) * size_of::<f32>()
}

fn defines(operands: &Operands, rows: i64) -> Result<[(&'static str, i64); 4]> {
    Ok([
        ("X_KIND", kind_define("ssd", "x_blhp", &operands.x)?),
        ("DT_KIND", operands.dt_kind()?),
        ("N_TILE", operands.sizes.state_tile()),
        ("ROWS", rows),
    ])
}
