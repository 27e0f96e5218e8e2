//! The causal convolution on CUDA: one launch forward; backward one, and a small one that adds up the gradients of taps
//! and bias.
// b batch, l seq_len, e channels, k d_conv, j d_conv - 1

use flowhn_torch::kernel::rows::with_dense_rows;
use flowhn_torch::kernel::{Arg, Kernel, kind_define};
use flowhn_torch::{BackwardCtx, Error, ForwardCtx, Function, Result, apply};
use tch::{Kind, Tensor};

use crate::args::Carry;
use crate::conv::{Activation, CausalConv1d, CausalConv1dOutput};
use crate::kernels::CAUSAL_CONV1D;

/// The name in errors and on the autograd tape.
const OP: &str = "causal_conv1d";

/// The most taps that a thread keeps in its registers.
const MAX_D_CONV: i64 = 64;

/// So few taps that the forward takes a run at once, `ONE_GROUP`.
const SHORT_D_CONV: i64 = 4;

/// Warps that keep a large device busy; runs of tokens are cut shorter until there are as many.
const ENOUGH_WARPS: i64 = 3072;

/// Tokens that a thread loads at once (forward), or that are on their way to it (backward).
const AHEAD: i64 = 8;

/// Bytes from whose multiples parameters begin, so that a thread loads those of its channels in few words.
const PARAMETER_ALIGNMENT: usize = 16;

/// Runs the convolution on checked arguments with at least one element.
pub(crate) fn causal_conv1d(args: &CausalConv1d, carry: Carry) -> Result<CausalConv1dOutput> {
    let mut inputs = vec![args.x_ble, args.weight_ek];
    let mut optional = |tensor| {
        inputs.push(tensor?);
        Some(inputs.len() - 1)
    };
    let function = Conv {
        bias: optional(args.bias_e),
        initial_state: optional(args.initial_state_bje),
        reset: optional(args.reset_bl),
        activation: args.activation,
        carry,
    };
    let mut outputs = apply(function, &inputs)?;
    let final_state_bje = outputs.remove(1);
    Ok(CausalConv1dOutput { y_ble: outputs.remove(0), final_state_bje })
}

/// The custom function; optional inputs by their index.
struct Conv {
    bias: Option<usize>,
    initial_state: Option<usize>,
    reset: Option<usize>,
    activation: Activation,
    carry: Carry,
}

impl Function for Conv {
    const NAME: &'static str = OP;

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let operands = self.operands(inputs)?;
        let Shape { batch, seq_len, channels, d_conv } = operands.shape;
        let device = inputs[0].device();
        let y = Tensor::f_empty([batch, seq_len, channels], (inputs[0].kind(), device))?;
        let state = || Ok(Tensor::f_empty([batch, d_conv - 1, channels], (Kind::Float, device))?);
        let final_state = self.carry.place(OP, ctx, inputs, self.initial_state, state)?;

        let plan = operands.plan(&[&operands.x, &y], Pass::Forward);
        let mut args = operands.x_args();
        operands.push_parameters(&mut args);
        args.push(Arg::Tensor(&y));
        args.extend(strides(&y));
        args.push(Arg::Tensor(&final_state));
        plan.push_sizes(&mut args);
        plan.launch("causal_conv1d_forward", &args)?;
        ctx.accept_undefined_grad(1);
        if ctx.is_recorded() {
            inputs.iter().for_each(|input| ctx.save(input));
        }
        Ok(vec![y, final_state])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let inputs: Vec<&Tensor> = ctx.saved().iter().collect();
        let operands = self.operands(&inputs)?;
        let Shape { batch, channels, d_conv, .. } = operands.shape;
        let device = inputs[0].device();
        let f32_empty = |size: &[i64]| Tensor::f_empty(size, (Kind::Float, device));
        let wanted = |idx: Option<usize>| idx.filter(|&idx| ctx.needs_grad(idx));
        let dy = with_dense_rows(&grads[0])?;
        let dfinal = grads[1].defined().then_some(&grads[1]);

        let dx = ctx.needs_grad(0).then(|| ctx.grad_place(0, inputs[0])).transpose()?;
        let dinitial = wanted(self.initial_state).map(|_| f32_empty(&[batch, d_conv - 1, channels])).transpose()?;
        let dweight = ctx.needs_grad(1).then(|| f32_empty(&[channels, d_conv])).transpose()?;
        let dbias = wanted(self.bias).map(|_| f32_empty(&[channels])).transpose()?;

        let touched: Vec<&Tensor> = [Some(&operands.x), Some(&dy), dx.as_ref()].into_iter().flatten().collect();
        let plan = operands.plan(&touched, Pass::Backward);
        let has_parts = dweight.is_some() || dbias.is_some();
        let parts = has_parts.then(|| f32_empty(&[plan.n_parts(), d_conv + 1, channels])).transpose()?;
        let mut args = operands.x_args();
        args.push(Arg::Tensor(&dy));
        args.extend(strides(&dy));
        operands.push_parameters(&mut args);
        args.push(Arg::opt(dfinal));
        args.extend(dfinal.map_or_else(|| vec![0; 3], Tensor::stride).into_iter().map(Arg::I64));
        args.push(Arg::opt(dx.as_ref()));
        args.extend(dx.as_ref().map_or([0, 0].map(Arg::I64), strides));
        args.extend([Arg::opt(dinitial.as_ref()), Arg::opt(parts.as_ref())]);
        plan.push_sizes(&mut args);
        plan.launch("causal_conv1d_backward", &args)?;
        if let Some(parts) = &parts {
            let args = [
                Arg::Tensor(parts),
                Arg::opt(dweight.as_ref()),
                Arg::opt(dbias.as_ref()),
                Arg::I32(plan.n_parts() as i32),
                Arg::I32(channels as i32),
            ];
            let grid = [(channels as u32).div_ceil(32), d_conv as u32 + 1, 1];
            kernel("causal_conv1d_parts", &plan.variant.defines()).launch(grid, 256, 0, &args)?;
        }

        let in_kind = |grad: Tensor, idx: usize| grad.f_to_kind(inputs[idx].kind());
        let mut out: Vec<Option<Tensor>> = vec![dx, dweight.map(|grad| in_kind(grad, 1)).transpose()?];
        out.resize_with(inputs.len(), || None);
        if let (Some(idx), Some(dbias)) = (self.bias, dbias) {
            out[idx] = Some(in_kind(dbias, idx)?);
        }
        if let (Some(idx), Some(dinitial)) = (self.initial_state, dinitial) {
            out[idx] = Some(dinitial);
        }
        Ok(out)
    }
}

impl Conv {
    fn operands(&self, inputs: &[&Tensor]) -> Result<Operands> {
        let x = with_dense_rows(inputs[0])?;
        let (batch, seq_len, channels) = x.size3()?;
        let shape = Shape { batch, seq_len, channels, d_conv: inputs[1].size()[1] };
        if shape.d_conv > MAX_D_CONV {
            let message =
                format!("weight_ek has {} taps, the CUDA kernel at most {MAX_D_CONV}; use the CPU", shape.d_conv);
            return Err(Error::invalid(OP, message));
        }
        if i32::try_from(seq_len.max(channels)).is_err() {
            let message =
                format!("x_ble has shape {:?}; an axis of a CUDA tensor may have 2^31 - 1 elements", x.size());
            return Err(Error::invalid(OP, message));
        }
        let as_f32 = |idx: usize| -> Result<Tensor> {
            let tensor = inputs[idx].f_to_kind(Kind::Float)?.f_contiguous()?;
            Ok(match (tensor.data_ptr() as usize).is_multiple_of(PARAMETER_ALIGNMENT) {
                true => tensor,
                false => tensor.f_detach_copy()?,
            })
        };
        Ok(Operands {
            x_kind: kind_define(OP, "x_ble", &x)?,
            x,
            weight: as_f32(1)?,
            bias: self.bias.map(as_f32).transpose()?,
            initial_state: self.initial_state.map(|idx| inputs[idx].f_contiguous()).transpose()?,
            reset: self.reset.map(|idx| inputs[idx].f_contiguous()).transpose()?,
            silu: self.activation == Activation::Silu,
            shape,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    Forward,
    Backward,
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: i64,
    seq_len: i64,
    channels: i64,
    d_conv: i64,
}

/// The inputs as the kernels take them: channels of x side by side, parameters and state in f32.
struct Operands {
    x: Tensor,
    x_kind: i64,
    weight: Tensor,
    bias: Option<Tensor>,
    initial_state: Option<Tensor>,
    reset: Option<Tensor>,
    silu: bool,
    shape: Shape,
}

impl Operands {
    fn x_args(&self) -> Vec<Arg<'_>> {
        let mut args = vec![Arg::Tensor(&self.x)];
        args.extend(strides(&self.x));
        args
    }

    fn push_parameters<'a>(&'a self, args: &mut Vec<Arg<'a>>) {
        args.push(Arg::Tensor(&self.weight));
        args.extend([&self.bias, &self.initial_state, &self.reset].map(|tensor| Arg::opt(tensor.as_ref())));
    }

    /// How to run a kernel that reads or writes these activations.
    fn plan(&self, activations: &[&Tensor], pass: Pass) -> Plan {
        let Shape { batch, seq_len, channels, d_conv } = self.shape;
        // Many taps take the registers of many channels.
        let widest = match d_conv {
            ..=SHORT_D_CONV => 4,
            5..=8 => 2,
            _ => 1,
        };
        let vec = vector_len(activations, widest);
        let n_columns = (channels + 32 * vec - 1) / (32 * vec);
        // The forward's runs are what a thread loads at once, unless many taps reach back far.
        let mut run = if pass == Pass::Forward && d_conv <= SHORT_D_CONV { AHEAD } else { 128 };
        while run > 8 && n_columns * batch * (seq_len / run) < ENOUGH_WARPS {
            run /= 2;
        }
        let variant = ConvVariant {
            x_kind: self.x_kind,
            d_conv,
            vec,
            ahead: AHEAD,
            silu: self.silu,
            resets: self.reset.is_some(),
        };
        Plan { shape: self.shape, pass, variant, n_columns, run }
    }
}

/// One launch over all tokens and channels.
struct Plan {
    shape: Shape,
    pass: Pass,
    variant: ConvVariant,
    /// Blocks side by side along the channels.
    n_columns: i64,
    /// Tokens of a warp.
    run: i64,
}

impl Plan {
    /// Blocks one after the other along the tokens of all sequences.
    fn n_parts(&self) -> i64 {
        let n_tokens = N_WARPS * self.run;
        self.shape.batch * ((self.shape.seq_len + n_tokens - 1) / n_tokens)
    }

    fn push_sizes(&self, args: &mut Vec<Arg>) {
        args.extend([self.shape.seq_len, self.shape.channels, self.run].map(|size| Arg::I32(size as i32)));
    }

    /// Bytes of the tokens of x and dy that are on their way to a block's threads; words of less than 4 bytes are not copied
    /// ahead.
    fn ring_bytes(&self) -> usize {
        let word_bytes = self.variant.vec * if self.variant.x_kind == 1 { 2 } else { 4 };
        match self.pass {
            Pass::Backward if word_bytes >= 4 => (self.variant.ahead * 2 * 32 * N_WARPS * word_bytes) as usize,
            _ => 0,
        }
    }

    fn launch(&self, entry: &'static str, args: &[Arg]) -> Result<()> {
        let n_blocks = self.n_columns * self.n_parts();
        let n_blocks = u32::try_from(n_blocks).ok().filter(|n| i32::try_from(*n).is_ok()).ok_or_else(|| {
            Error::invalid(OP, format!("x_ble is {n_blocks} blocks of work, a launch has 2^31 - 1; split the batch"))
        })?;
        let defines = self.variant.defines();
        kernel(entry, &defines).launch([n_blocks, 1, 1], 32 * N_WARPS as u32, self.ring_bytes(), args)
    }
}

fn kernel<'a>(entry: &'static str, defines: &'a [(&'static str, i64)]) -> Kernel<'a> {
    Kernel { source: &CAUSAL_CONV1D, entry, defines }
}

/// The stride arguments of `[batch, seq_len, channels]`.
fn strides(tensor: &Tensor) -> [Arg<'static>; 2] {
    let stride = tensor.stride();
    [Arg::I64(stride[0]), Arg::I64(stride[1])]
}

/// The most neighbouring channels, `widest` or a smaller power of two, that are one aligned word in all tensors.
fn vector_len(tensors: &[&Tensor], widest: i64) -> i64 {
    let fits = |vec: i64, tensor: &Tensor| {
        let (size, stride) = (tensor.size(), tensor.stride());
        let steps_fit = (0..2).all(|axis| size[axis] < 2 || stride[axis] % vec == 0);
        let address_fits =
            (tensor.data_ptr() as usize).is_multiple_of(vec as usize * tensor.kind().elt_size_in_bytes());
        size[2] % vec == 0 && steps_fit && address_fits
    };
    let mut vec = widest;
    while vec > 1 && !tensors.iter().all(|tensor| fits(vec, tensor)) {
        vec /= 2;
    }
    vec
}

/// The macros of `causal_conv1d.cu`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConvVariant {
    pub(crate) x_kind: i64,
    pub(crate) d_conv: i64,
    pub(crate) vec: i64,
    pub(crate) ahead: i64,
    pub(crate) silu: bool,
    pub(crate) resets: bool,
}

/// Warps of a block.
const N_WARPS: i64 = 4;

impl ConvVariant {
    /// Four taps with SiLU.
    pub(crate) const fn mixer(x_kind: i64, vec: i64) -> Self {
        Self { x_kind, d_conv: 4, vec, ahead: AHEAD, silu: true, resets: false }
    }

    pub(crate) const fn defines(&self) -> [(&'static str, i64); 9] {
        // As many as registers allow without spilling.
        let forward_blocks = match (self.x_kind, self.d_conv) {
            (1, ..=SHORT_D_CONV) => 7,
            (_, ..=SHORT_D_CONV) => 5,
            _ => 1,
        };
        [
            ("X_KIND", self.x_kind),
            ("D_CONV", self.d_conv),
            ("VEC", self.vec),
            ("AHEAD", self.ahead),
            ("SILU", self.silu as i64),
            ("RESETS", self.resets as i64),
            ("N_WARPS", N_WARPS),
            ("N_BLOCKS", 1),
            ("FORWARD_BLOCKS", forward_blocks),
        ]
    }
}
