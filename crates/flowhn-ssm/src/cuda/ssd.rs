//! SSD on CUDA: chunks of 64 tokens on the tensor cores for bf16, token by token for f32 and for single steps.
// b batch, l seq_len, h n_heads, p d_head, g n_groups, n d_state

use flowhn_torch::kernel::{Arg, kind_define};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply};
use tch::{Kind, Tensor};

use super::{ssd_chunked, ssd_recurrent};
use crate::args::Carry;
use crate::reference;
use crate::scan::DtActivation;
use crate::ssd::{Ssd, SsdOutput};

/// The largest state that the kernels are compiled for.
const MAX_STATE: i64 = 256;
/// Sequences up to this length run token by token where no backward follows: one launch that reads the state once.
const STEP_TOKENS: i64 = 4;

/// Runs SSD on checked arguments.
pub(crate) fn ssd(args: &Ssd, carry: Carry) -> Result<SsdOutput> {
    kind_define("ssd", "x_blhp", args.x_blhp)?;
    let d_state = args.b_blgn.size()[3];
    if d_state > MAX_STATE {
        let message = format!("d_state is {d_state}, CUDA takes at most {MAX_STATE}; use a smaller state or the CPU");
        return Err(Error::invalid("ssd", message));
    }
    if args.x_blhp.numel() == 0 {
        return reference::ssd_chunked(args);
    }
    let kind = args.x_blhp.kind();
    if [args.b_blgn, args.c_blgn].into_iter().any(|t| t.kind() != kind) {
        // b or c in f32 beside x in bf16: the exact path keeps the digits that were asked for.
        let [x, b, c] = [args.x_blhp, args.b_blgn, args.c_blgn].map(|t| t.to_kind(Kind::Float));
        let out = ssd(&Ssd { x_blhp: &x, b_blgn: &b, c_blgn: &c, ..*args }, carry)?;
        return Ok(SsdOutput { y_blhp: out.y_blhp.to_kind(kind), ..out });
    }
    let mut inputs = vec![args.x_blhp, args.dt_blh, args.a_h, args.b_blgn, args.c_blgn];
    let mut push = |tensor: Option<_>| {
        inputs.push(tensor?);
        Some(inputs.len() - 1)
    };
    let mut function = SsdFunction {
        d: push(args.d_h),
        dt_bias: push(args.dt_bias_h),
        initial_state: push(args.initial_state_bhpn),
        reset: push(args.reset_bl),
        n_inputs: 0,
        dt_activation: args.dt_activation,
        carry,
    };
    function.n_inputs = inputs.len();
    let mut outputs = apply(function, &inputs)?;
    let final_state_bhpn = outputs.remove(1);
    Ok(SsdOutput { y_blhp: outputs.remove(0), final_state_bhpn })
}

/// The custom function; optional inputs by their index.
struct SsdFunction {
    d: Option<usize>,
    dt_bias: Option<usize>,
    initial_state: Option<usize>,
    reset: Option<usize>,
    n_inputs: usize,
    dt_activation: DtActivation,
    carry: Carry,
}

impl Function for SsdFunction {
    const NAME: &'static str = "ssd";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let operands = self.operands(inputs);
        let recorded = ctx.is_recorded();
        let chunked = operands.x.kind() == Kind::BFloat16 && (recorded || operands.sizes.seq_len > STEP_TOKENS);
        let Sizes { batch, n_heads, d_head, d_state, .. } = operands.sizes;
        let state = || empty(&[batch, n_heads, d_head, d_state], Kind::Float, &operands.x);
        let final_state = self.carry.place(Self::NAME, ctx, inputs, self.initial_state, state)?;
        let Forward { y, saved } = match chunked {
            true => ssd_chunked::forward(&operands, &final_state, recorded)?,
            false => ssd_recurrent::forward(&operands, &final_state, recorded)?,
        };
        ctx.accept_undefined_grad(1);
        if recorded {
            inputs.iter().copied().chain(&saved).for_each(|tensor| ctx.save(tensor));
        }
        Ok(vec![y, final_state])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let (inputs, saved) = ctx.saved().split_at(self.n_inputs);
        let inputs: Vec<&Tensor> = inputs.iter().collect();
        let operands = self.operands(&inputs);
        let grad_y = dense(&grads[0]);
        let grad_state = grads[1].defined().then(|| grads[1].contiguous());
        let wants_initial = self.initial_state.is_some_and(|idx| ctx.needs_grad(idx));
        let grads = match saved {
            [checkpoints] => ssd_recurrent::backward(&operands, checkpoints, &grad_y, grad_state.as_ref())?,
            [states, steps] => {
                let dx = ctx.grad_place(0, inputs[0])?;
                ssd_chunked::backward(&operands, [states, steps], &grad_y, grad_state.as_ref(), dx, wants_initial)?
            }
            _ => unreachable!("a forward saves checkpoints, or states and steps"),
        };
        let mut out: Vec<Option<Tensor>> = (0..inputs.len()).map(|_| None).collect();
        let [a, d, dt_bias] = grads.per_head;
        let always = [grads.x, grads.dt, a, grads.b, grads.c];
        always.into_iter().enumerate().for_each(|(idx, grad)| out[idx] = Some(grad));
        for (idx, grad) in [(self.d, Some(d)), (self.dt_bias, Some(dt_bias)), (self.initial_state, grads.initial_state)]
        {
            if let Some(idx) = idx {
                out[idx] = grad;
            }
        }
        Ok(out)
    }
}

impl SsdFunction {
    fn operands(&self, inputs: &[&Tensor]) -> Operands {
        let contiguous = |idx: Option<usize>| idx.map(|idx| inputs[idx].contiguous());
        let (x, b) = (inputs[0].size(), inputs[3].size());
        Operands {
            sizes: Sizes { batch: x[0], seq_len: x[1], n_heads: x[2], d_head: x[3], n_groups: b[2], d_state: b[3] },
            x: dense(inputs[0]),
            dt: inputs[1].shallow_clone(),
            a: inputs[2].contiguous(),
            b: dense(inputs[3]),
            c: dense(inputs[4]),
            d: contiguous(self.d),
            dt_bias: contiguous(self.dt_bias),
            initial_state: contiguous(self.initial_state),
            reset: contiguous(self.reset),
            activate: self.dt_activation == DtActivation::Softplus,
        }
    }
}

/// What a forward returns, and what it has for the backward where one follows: the checkpoints of the exact path, or states and
/// steps.
pub(super) struct Forward {
    pub(super) y: Tensor,
    pub(super) saved: Vec<Tensor>,
}

/// Gradients; `per_head` of `a`, `d` and the bias.
pub(super) struct Grads {
    pub(super) x: Tensor,
    pub(super) dt: Tensor,
    pub(super) b: Tensor,
    pub(super) c: Tensor,
    pub(super) per_head: [Tensor; 3],
    pub(super) initial_state: Option<Tensor>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) batch: i64,
    pub(super) seq_len: i64,
    pub(super) n_heads: i64,
    pub(super) d_head: i64,
    pub(super) n_groups: i64,
    pub(super) d_state: i64,
}

impl Sizes {
    /// `seq_len, n_heads, n_groups, d_head, d_state`, as every kernel takes them.
    pub(super) fn args(self) -> [Arg<'static>; 5] {
        [self.seq_len, self.n_heads, self.n_groups, self.d_head, self.d_state].map(|size| Arg::I32(size as i32))
    }

    pub(super) fn group_heads(self) -> i64 {
        self.n_heads / self.n_groups
    }

    /// Columns of the widest tile that a state needs: powers of two from 64 on.
    pub(super) fn state_tile(self) -> i64 {
        (self.d_state as u64).next_power_of_two().max(64) as i64
    }
}

/// The inputs as kernels read them: the last axes of `x`, `b`, `c` dense, parameters and states contiguous.
pub(super) struct Operands {
    pub(super) sizes: Sizes,
    pub(super) x: Tensor,
    pub(super) dt: Tensor,
    pub(super) a: Tensor,
    pub(super) b: Tensor,
    pub(super) c: Tensor,
    pub(super) d: Option<Tensor>,
    pub(super) dt_bias: Option<Tensor>,
    pub(super) initial_state: Option<Tensor>,
    pub(super) reset: Option<Tensor>,
    pub(super) activate: bool,
}

impl Operands {
    pub(super) fn dt_kind(&self) -> Result<i64> {
        kind_define("ssd", "dt_blh", &self.dt)
    }

    pub(super) fn activate(&self) -> Arg<'static> {
        Arg::I32(self.activate.into())
    }
}

/// A tensor of four axes and its first three strides; the last axis is dense.
pub(super) fn strided(tensor: &Tensor) -> [Arg<'_>; 4] {
    let stride = tensor.stride();
    [Arg::Tensor(tensor), Arg::I64(stride[0]), Arg::I64(stride[1]), Arg::I64(stride[2])]
}

/// The tensor itself, or a copy if its last axis has gaps.
fn dense(tensor: &Tensor) -> Tensor {
    match tensor.size().last() == Some(&1) || tensor.stride().last() == Some(&1) {
        true => tensor.shallow_clone(),
        false => tensor.contiguous(),
    }
}

/// A tensor on the device of `like`, to be filled.
pub(super) fn empty(sizes: &[i64], kind: Kind, like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_empty(sizes, (kind, like.device()))?)
}
