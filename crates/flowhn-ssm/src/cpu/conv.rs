//! The causal convolution on the CPU: blocks of tokens in parallel, channels in vectors.
//!
//! A block of tokens reads the few inputs before it and, backwards, the few gradients after it; nothing is carried from block to
//! block, so blocks run in any order.
// b batch, l seq_len, e channels, k d_conv, j d_conv - 1

use flowhn_nn::simd::{Real, dispatch};
use flowhn_torch::{BackwardCtx, ForwardCtx, Function, Result, apply, cpu};
use tch::{Kind, Tensor};

use super::view::{Rows, Source};
use super::{Inputs, map_tasks, reset_flags, state_to_advance, sum_parts};
use crate::args::Carry;
use crate::conv::{Activation, CausalConv1d, CausalConv1dOutput};

/// Tokens of one task.
const BLOCK: usize = 64;

/// Runs the convolution on checked arguments with at least one token.
pub(crate) fn causal_conv1d(args: &CausalConv1d, carry: Carry) -> Result<CausalConv1dOutput> {
    let mut inputs = Inputs { tensors: vec![args.x_ble, args.weight_ek] };
    let function = Conv {
        bias: inputs.push(args.bias_e),
        initial_state: inputs.push(args.initial_state_bje),
        activation: args.activation,
        reset: reset_flags(args.reset_bl)?,
        carry,
    };
    let mut outputs = apply(function, &inputs.tensors)?;
    let final_state_bje = outputs.remove(1);
    Ok(CausalConv1dOutput { y_ble: outputs.remove(0), final_state_bje })
}

/// The custom function; optional inputs by their index.
struct Conv {
    bias: Option<usize>,
    initial_state: Option<usize>,
    activation: Activation,
    reset: Option<Vec<bool>>,
    carry: Carry,
}

impl Function for Conv {
    const NAME: &'static str = "causal_conv1d";

    fn forward(&mut self, ctx: &mut ForwardCtx, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        if ctx.is_recorded() {
            inputs.iter().for_each(|input| ctx.save(input));
        }
        let d_conv = inputs[1].size()[1];
        let size = [inputs[0].size()[0], d_conv - 1, inputs[0].size()[2]];
        let mut state = state_to_advance(Self::NAME, self.carry, ctx, inputs, self.initial_state, &size)?;
        let y = match inputs[0].kind() {
            Kind::Double => self.run::<f64>(inputs, &mut state)?,
            _ => self.run::<f32>(inputs, &mut state)?,
        };
        Ok(vec![y.to_kind(inputs[0].kind()), state])
    }

    fn backward(&self, ctx: &BackwardCtx, grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let inputs: Vec<&Tensor> = ctx.saved().iter().collect();
        match inputs[0].kind() {
            Kind::Double => self.run_backward::<f64>(&inputs, grads),
            _ => self.run_backward::<f32>(&inputs, grads),
        }
    }
}

impl Conv {
    /// The output; `state` begins with the values of the initial state and ends with those of the final one.
    fn run<R: Real>(&self, inputs: &[&Tensor], state: &mut Tensor) -> Result<Tensor> {
        let sources = Sources::new::<R>(self, inputs);
        let operands = sources.operands::<R>(self)?;
        let y = cpu::build(&inputs[0].size(), |y: &mut [R]| {
            map_tasks(operands.shape.token_blocks(y), operands.shape.work(), |(batch_idx, first, y)| {
                dispatch(
                    #[inline(always)]
                    || operands.forward_block(batch_idx, first, y),
                );
            });
        });
        // From here on the state may hold other values than the initial one.
        let window = Operands { initial_state: None, ..operands };
        cpu::update(state, |state: &mut [R]| {
            window.advance(state);
            Ok(())
        })?;
        Ok(y)
    }

    fn run_backward<R: Real>(&self, inputs: &[&Tensor], grads: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let sources = Sources::new::<R>(self, inputs);
        let operands = sources.operands::<R>(self)?;
        let shape = operands.shape;
        let Shape { batch, channels, d_conv, .. } = shape;
        let (grad_y, grad_state) = (Source::new::<R>(&grads[0]), Source::new::<R>(&grads[1]));
        let (grad_y, grad_state) = (grad_y.rows::<R>()?, grad_state.rows::<R>()?);

        // First the gradient of the sums before the activation, and what weights and bias get from each block of tokens.
        let (grad_sum, parts) = cpu::try_build(&inputs[0].size(), |grad_sum: &mut [R]| {
            Ok(map_tasks(shape.token_blocks(grad_sum), shape.work(), |(batch_idx, first, grad_sum)| {
                dispatch(
                    #[inline(always)]
                    || operands.backward_sums(batch_idx, first, &grad_y, grad_sum),
                )
            }))
        })?;
        let taps_and_bias = sum_parts(parts);
        let (taps, bias) = taps_and_bias.split_at(d_conv * channels);
        let weight = cpu::build(&[channels as i64, d_conv as i64], |out: &mut [R]| {
            for (i, out) in out.iter_mut().enumerate() {
                *out = taps[(i % d_conv) * channels + i / d_conv];
            }
        });

        // Then each input collects from the tokens that saw it.
        let grad_sum = Source::new::<R>(&grad_sum);
        let grad_sum = grad_sum.rows::<R>()?;
        let x = cpu::build(&inputs[0].size(), |x: &mut [R]| {
            map_tasks(shape.token_blocks(x), shape.work(), |(batch_idx, first, x)| {
                dispatch(
                    #[inline(always)]
                    || operands.backward_inputs(batch_idx, first + d_conv - 1, &grad_sum, &grad_state, x),
                );
            });
        });
        let mut out = vec![Some(x.to_kind(inputs[0].kind())), Some(weight.to_kind(inputs[1].kind()))];
        if let Some(idx) = self.bias {
            out.push(Some(cpu::from_slice(&[channels as i64], bias)?.to_kind(inputs[idx].kind())));
        }
        if self.initial_state.is_some() {
            out.push(Some(cpu::build(&[batch as i64, d_conv as i64 - 1, channels as i64], |state: &mut [R]| {
                for (batch_idx, state) in state.chunks_mut(((d_conv - 1) * channels).max(1)).enumerate() {
                    operands.backward_inputs(batch_idx, 0, &grad_sum, &grad_state, state);
                }
            })));
        }
        Ok(out)
    }
}

#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    seq_len: usize,
    channels: usize,
    d_conv: usize,
}

impl Shape {
    /// Multiply-adds.
    fn work(self) -> usize {
        self.batch * self.seq_len * self.channels * self.d_conv
    }

    /// Cuts `[batch, seq_len, channels]` into blocks of tokens: sequence, first token, rows.
    fn token_blocks<R>(self, rows: &mut [R]) -> Vec<(usize, usize, &mut [R])> {
        let sequences = rows.chunks_mut(self.seq_len * self.channels).enumerate();
        sequences
            .flat_map(|(batch_idx, rows)| {
                let blocks = rows.chunks_mut(BLOCK * self.channels).enumerate();
                blocks.map(move |(block_idx, rows)| (batch_idx, block_idx * BLOCK, rows))
            })
            .collect()
    }
}

/// The inputs in the dtype of the computation.
struct Sources {
    x: Source,
    /// `[d_conv, channels]`.
    taps: Tensor,
    bias: Option<Tensor>,
    initial_state: Option<Source>,
    d_conv: usize,
}

impl Sources {
    fn new<R: Real>(conv: &Conv, inputs: &[&Tensor]) -> Self {
        Self {
            x: Source::new::<R>(inputs[0]),
            taps: inputs[1].to_kind(R::KIND).tr().contiguous(),
            bias: conv.bias.map(|bias| inputs[bias].to_kind(R::KIND).contiguous()),
            initial_state: conv.initial_state.map(|state| Source::new::<R>(inputs[state])),
            d_conv: inputs[1].size()[1] as usize,
        }
    }

    fn operands<'a, R: Real>(&'a self, conv: &'a Conv) -> Result<Operands<'a, R>> {
        let [batch, seq_len, channels] = self.x.sizes();
        Ok(Operands {
            shape: Shape { batch, seq_len, channels, d_conv: self.d_conv },
            x: self.x.rows()?,
            taps: cpu::slice(&self.taps)?,
            bias: self.bias.as_ref().map(cpu::slice).transpose()?,
            initial_state: self.initial_state.as_ref().map(Source::rows).transpose()?,
            n_visible: conv.reset.as_ref().map(|reset| {
                let sequences = reset.chunks(seq_len);
                sequences.flat_map(|reset| n_visible(reset, self.d_conv - 1)).collect()
            }),
            activation: conv.activation,
        })
    }
}

/// How many inputs before each token it sees, at most `most`.
fn n_visible(reset: &[bool], most: usize) -> Vec<usize> {
    let mut visible = most;
    let step = |&reset: &bool| {
        visible = if reset { 0 } else { (visible + 1).min(most) };
        visible
    };
    reset.iter().map(step).collect()
}

/// The inputs as elements.
struct Operands<'a, R> {
    shape: Shape,
    x: Rows<'a, R>,
    taps: &'a [R],
    bias: Option<&'a [R]>,
    initial_state: Option<Rows<'a, R>>,
    n_visible: Option<Vec<usize>>,
    activation: Activation,
}

impl<R: Real> Operands<'_, R> {
    /// Input `idx` of the sequence with the initial state in front; none where that is absent, which means zeros.
    #[inline(always)]
    fn input(&self, batch_idx: usize, idx: usize) -> Option<&[R]> {
        let n_before = self.shape.d_conv - 1;
        match idx.checked_sub(n_before) {
            Some(token_idx) => Some(self.x.row(batch_idx, token_idx)),
            None => self.initial_state.as_ref().map(|state| state.row(batch_idx, idx)),
        }
    }

    /// How many inputs before this token it sees.
    #[inline(always)]
    fn n_visible(&self, batch_idx: usize, token_idx: usize) -> usize {
        match &self.n_visible {
            Some(n_visible) => n_visible[batch_idx * self.shape.seq_len + token_idx],
            None => self.shape.d_conv - 1,
        }
    }

    /// Turns the inputs before the first token, `[batch, d_conv - 1, channels]`, into those after the last.
    fn advance(&self, state: &mut [R]) {
        let Shape { seq_len, channels, d_conv, .. } = self.shape;
        let n_rows = d_conv - 1;
        for (batch_idx, rows) in state.chunks_exact_mut((n_rows * channels).max(1)).enumerate() {
            let n_visible = self.n_visible(batch_idx, seq_len - 1);
            // Rows move to the front: what one takes stands in none that is written already.
            for row_idx in 0..n_rows {
                let row = row_idx * channels..(row_idx + 1) * channels;
                let input_idx = seq_len + row_idx;
                // Row `row_idx` is the input `d_conv - 1 - row_idx` tokens before the one that would come next.
                if n_rows - row_idx > n_visible + 1 {
                    rows[row].fill(R::ZERO);
                } else if let Some(token_idx) = input_idx.checked_sub(n_rows) {
                    rows[row].copy_from_slice(self.x.row(batch_idx, token_idx));
                } else {
                    rows.copy_within(input_idx * channels..(input_idx + 1) * channels, row.start);
                }
            }
        }
    }

    /// Writes the sums of one token's taps.
    #[inline(always)]
    fn sums(&self, batch_idx: usize, token_idx: usize, out: &mut [R]) {
        let Shape { channels, d_conv, .. } = self.shape;
        match self.bias {
            Some(bias) => out.copy_from_slice(bias),
            None => out.fill(R::ZERO),
        }
        for tap in d_conv - 1 - self.n_visible(batch_idx, token_idx)..d_conv {
            if let Some(input) = self.input(batch_idx, token_idx + tap) {
                let weights = &self.taps[tap * channels..][..channels];
                add_product(out, weights, input);
            }
        }
    }

    #[inline(always)]
    fn forward_block(&self, batch_idx: usize, first: usize, y: &mut [R]) {
        for (token, y) in y.chunks_exact_mut(self.shape.channels).enumerate() {
            self.sums(batch_idx, first + token, y);
            if self.activation == Activation::Silu {
                for y in y {
                    *y = y.silu();
                }
            }
        }
    }

    /// Writes the gradients of the sums of a block and returns those of taps `[d_conv, channels]` and bias `[channels]`.
    #[inline(always)]
    fn backward_sums(&self, batch_idx: usize, first: usize, grad_y: &Rows<R>, grad_sum: &mut [R]) -> Vec<R> {
        let Shape { channels, d_conv, .. } = self.shape;
        let mut parts = vec![R::ZERO; (d_conv + 1) * channels];
        let (taps, bias) = parts.split_at_mut(d_conv * channels);
        for (token, grad_sum) in grad_sum.chunks_exact_mut(channels).enumerate() {
            let token_idx = first + token;
            let grad_y = grad_y.row(batch_idx, token_idx);
            match self.activation {
                Activation::None => grad_sum.copy_from_slice(grad_y),
                Activation::Silu => {
                    self.sums(batch_idx, token_idx, grad_sum);
                    for (sum, &grad_y) in grad_sum.iter_mut().zip(grad_y) {
                        *sum = sum.silu_and_derivative().1 * grad_y;
                    }
                }
            }
            for (bias, &grad) in bias.iter_mut().zip(&*grad_sum) {
                *bias += grad;
            }
            for tap in d_conv - 1 - self.n_visible(batch_idx, token_idx)..d_conv {
                if let Some(input) = self.input(batch_idx, token_idx + tap) {
                    add_product(&mut taps[tap * channels..][..channels], grad_sum, input);
                }
            }
        }
        parts
    }

    /// Writes the gradients of the inputs from `first_idx` on, counted with the initial state in front.
    #[inline(always)]
    fn backward_inputs(
        &self,
        batch_idx: usize,
        first_idx: usize,
        grad_sum: &Rows<R>,
        grad_state: &Rows<R>,
        out: &mut [R],
    ) {
        let Shape { seq_len, channels, d_conv, .. } = self.shape;
        for (row, out) in out.chunks_exact_mut(channels).enumerate() {
            let idx = first_idx + row;
            out.fill(R::ZERO);
            for tap in 0..d_conv {
                // Token `idx - tap` multiplies this input by that tap, if it sees as far back.
                let Some(token_idx) = idx.checked_sub(tap).filter(|token_idx| *token_idx < seq_len) else { continue };
                if d_conv - 1 - tap <= self.n_visible(batch_idx, token_idx) {
                    let weights = &self.taps[tap * channels..][..channels];
                    add_product(out, weights, grad_sum.row(batch_idx, token_idx));
                }
            }
            if let Some(row_idx) = idx.checked_sub(seq_len)
                && d_conv - 1 - row_idx <= self.n_visible(batch_idx, seq_len - 1) + 1
            {
                for (out, &grad) in out.iter_mut().zip(grad_state.row(batch_idx, row_idx)) {
                    *out += grad;
                }
            }
        }
    }
}

/// `out += a b`, element by element.
#[inline(always)]
fn add_product<R: Real>(out: &mut [R], a: &[R], b: &[R]) {
    for ((out, &a), &b) in out.iter_mut().zip(a).zip(b) {
        *out = a.mul_add(b, *out);
    }
}
