//! The selective scan of one tile: a few channels of one sequence, a few tokens at a time.
//!
//! A tile's state lies as `[d_state, TILE]`, so that one vector holds one state element of several channels: inputs load
//! without a shuffle, any `d_state` will do, and sums over the state are plain vector additions.
#![allow(clippy::needless_range_loop, reason = "several arrays advance together, which one index says best")]
// e TILE channels, n d_state, q tokens of a chunk

use flowhn_nn::simd::Real;

use crate::scan::DtActivation;

/// Channels that are scanned side by side.
pub(super) const TILE: usize = 32;

/// Tokens between two stored states; the backward recomputes those between.
pub(super) const CHUNK: usize = 16;

/// One vector of channels.
type Lanes<R> = [R; TILE];

/// What the scan reads of one chunk, in the layout of the tile.
#[derive(Debug)]
pub(super) struct Chunk<R> {
    /// Tokens in this chunk.
    pub(super) len: usize,
    pub(super) x_qe: Vec<Lanes<R>>,
    /// Step sizes.
    pub(super) dt_qe: Vec<Lanes<R>>,
    /// Derivative of the step sizes by what they were made from.
    pub(super) dt_slope_qe: Vec<Lanes<R>>,
    pub(super) b_qn: Vec<R>,
    pub(super) c_qn: Vec<R>,
    pub(super) reset_q: [bool; CHUNK],
}

impl<R: Real> Chunk<R> {
    pub(super) fn new(d_state: usize) -> Self {
        let lanes = || vec![[R::ZERO; TILE]; CHUNK];
        let states = || vec![R::ZERO; CHUNK * d_state];
        Self {
            len: 0,
            x_qe: lanes(),
            dt_qe: lanes(),
            dt_slope_qe: lanes(),
            b_qn: states(),
            c_qn: states(),
            reset_q: [false; CHUNK],
        }
    }

    /// Turns the loaded `dt_qe` into step sizes; with `with_slope`, fills `dt_slope_qe` as well.
    #[inline(always)]
    pub(super) fn activate(&mut self, bias_e: &Lanes<R>, activation: DtActivation, with_slope: bool) {
        for q in 0..self.len {
            let (dt, slope) = (&mut self.dt_qe[q], &mut self.dt_slope_qe[q]);
            for e in 0..TILE {
                dt[e] += bias_e[e];
            }
            match activation {
                DtActivation::Identity => slope.fill(R::ONE),
                DtActivation::Softplus => {
                    if with_slope {
                        for e in 0..TILE {
                            slope[e] = dt[e].sigmoid();
                        }
                    }
                    for e in 0..TILE {
                        dt[e] = dt[e].softplus();
                    }
                }
            }
        }
    }
}

/// Scans the chunk from `state_ne` on and leaves the final state there; `y_qe` receives `c h + d x`.
#[inline(always)]
pub(super) fn forward<R: Real>(
    chunk: &Chunk<R>,
    a_ne: &[Lanes<R>],
    d_e: &Lanes<R>,
    state_ne: &mut [Lanes<R>],
    y_qe: &mut [Lanes<R>],
) {
    let d_state = a_ne.len();
    for q in 0..chunk.len {
        if chunk.reset_q[q] {
            state_ne.fill([R::ZERO; TILE]);
        }
        let (x, dt) = (&chunk.x_qe[q], &chunk.dt_qe[q]);
        let (b_n, c_n) = (&chunk.b_qn[q * d_state..][..d_state], &chunk.c_qn[q * d_state..][..d_state]);
        let mut input = [R::ZERO; TILE];
        let mut y = [R::ZERO; TILE];
        for e in 0..TILE {
            input[e] = dt[e] * x[e];
            y[e] = d_e[e] * x[e];
        }
        for (((a, state), &b), &c) in a_ne.iter().zip(state_ne.iter_mut()).zip(b_n).zip(c_n) {
            for e in 0..TILE {
                let h = (dt[e] * a[e]).exp().mul_add(state[e], input[e] * b);
                state[e] = h;
                y[e] = c.mul_add(h, y[e]);
            }
        }
        y_qe[q] = y;
    }
}

/// States and decays of a chunk, kept while its backward runs.
#[derive(Debug)]
pub(super) struct Trace<R> {
    /// `states[q * n ..]` is the state before token `q`, resets not yet applied; one more than tokens.
    pub(super) states: Vec<Lanes<R>>,
    decays: Vec<Lanes<R>>,
    y_qe: Vec<Lanes<R>>,
}

impl<R: Real> Trace<R> {
    pub(super) fn new(d_state: usize) -> Self {
        Self {
            states: vec![[R::ZERO; TILE]; (CHUNK + 1) * d_state],
            decays: vec![[R::ZERO; TILE]; CHUNK * d_state],
            y_qe: vec![[R::ZERO; TILE]; CHUNK],
        }
    }

    /// As [`forward`] from the state in `states[..d_state]`, but keeps every state and decay, and the outputs.
    #[inline(always)]
    pub(super) fn record(&mut self, chunk: &Chunk<R>, a_ne: &[Lanes<R>], d_e: &Lanes<R>) {
        let d_state = a_ne.len();
        for q in 0..chunk.len {
            let (x, dt) = (&chunk.x_qe[q], &chunk.dt_qe[q]);
            let (b_n, c_n) = (&chunk.b_qn[q * d_state..][..d_state], &chunk.c_qn[q * d_state..][..d_state]);
            let (before, after) = self.states[q * d_state..].split_at_mut(d_state);
            let decays = &mut self.decays[q * d_state..][..d_state];
            let mut input = [R::ZERO; TILE];
            let mut y = [R::ZERO; TILE];
            for e in 0..TILE {
                input[e] = dt[e] * x[e];
                y[e] = d_e[e] * x[e];
            }
            if chunk.reset_q[q] {
                for ((after, &b), &c) in after.iter_mut().zip(b_n).zip(c_n) {
                    for e in 0..TILE {
                        let h = input[e] * b;
                        after[e] = h;
                        y[e] = c.mul_add(h, y[e]);
                    }
                }
            } else {
                let rows = a_ne.iter().zip(before).zip(after).zip(decays).zip(b_n.iter().zip(c_n));
                for ((((a, before), after), decay), (&b, &c)) in rows {
                    for e in 0..TILE {
                        let factor = (dt[e] * a[e]).exp();
                        let h = factor.mul_add(before[e], input[e] * b);
                        decay[e] = factor;
                        after[e] = h;
                        y[e] = c.mul_add(h, y[e]);
                    }
                }
            }
            self.y_qe[q] = y;
        }
    }
}

/// Gradients that a tile carries from chunk to chunk, last to first.
#[derive(Debug)]
pub(super) struct Carried<R> {
    /// By the state before the chunk.
    pub(super) state_ne: Vec<Lanes<R>>,
    pub(super) a_ne: Vec<Lanes<R>>,
    pub(super) d_e: Lanes<R>,
    pub(super) dt_bias_e: Lanes<R>,
}

impl<R: Real> Carried<R> {
    pub(super) fn new(d_state: usize) -> Self {
        let zeros = || vec![[R::ZERO; TILE]; d_state];
        Self { state_ne: zeros(), a_ne: zeros(), d_e: [R::ZERO; TILE], dt_bias_e: [R::ZERO; TILE] }
    }
}

/// Gradients of one chunk: on entry `y_qe` holds the output's, on return the others are filled.
#[derive(Debug)]
pub(super) struct ChunkGrads<R> {
    pub(super) y_qe: Vec<Lanes<R>>,
    /// On entry the gate, on return its gradient, where there is one.
    pub(super) z_qe: Option<Vec<Lanes<R>>>,
    pub(super) x_qe: Vec<Lanes<R>>,
    pub(super) dt_qe: Vec<Lanes<R>>,
    /// Summed over tiles, lane by lane.
    pub(super) b_qne: Vec<Lanes<R>>,
    /// Summed over tiles, lane by lane.
    pub(super) c_qne: Vec<Lanes<R>>,
}

impl<R: Real> ChunkGrads<R> {
    pub(super) fn new(d_state: usize, gated: bool) -> Self {
        let lanes = |n: usize| vec![[R::ZERO; TILE]; n];
        Self {
            y_qe: lanes(CHUNK),
            z_qe: gated.then(|| lanes(CHUNK)),
            x_qe: lanes(CHUNK),
            dt_qe: lanes(CHUNK),
            b_qne: lanes(CHUNK * d_state),
            c_qne: lanes(CHUNK * d_state),
        }
    }

    /// Walks the recorded chunk backwards.
    ///
    /// With `g` the gradient by the state after token `t`, which token `t` has added `c_t y'_t` to:
    /// `b'_t = g dt_t x_t`, `(dt x)'_t = g b_t`, and through the decay `g exp(dt_t a) h_{t-1}` times `a` for `dt`, `dt` for `a`.
    #[inline(always)]
    pub(super) fn backward(
        &mut self,
        chunk: &Chunk<R>,
        trace: &Trace<R>,
        a_ne: &[Lanes<R>],
        d_e: &Lanes<R>,
        carried: &mut Carried<R>,
    ) {
        let d_state = a_ne.len();
        for q in (0..chunk.len).rev() {
            let (x, dt, slope) = (&chunk.x_qe[q], &chunk.dt_qe[q], &chunk.dt_slope_qe[q]);
            let (b_n, c_n) = (&chunk.b_qn[q * d_state..][..d_state], &chunk.c_qn[q * d_state..][..d_state]);
            let grad_y = &mut self.y_qe[q];
            if let Some(z_qe) = &mut self.z_qe {
                let (z, y) = (&mut z_qe[q], &trace.y_qe[q]);
                for e in 0..TILE {
                    let (gate, gate_slope) = z[e].silu_and_derivative();
                    z[e] = grad_y[e] * y[e] * gate_slope;
                    grad_y[e] *= gate;
                }
            }
            let mut input = [R::ZERO; TILE];
            for e in 0..TILE {
                input[e] = dt[e] * x[e];
                carried.d_e[e] = grad_y[e].mul_add(x[e], carried.d_e[e]);
            }
            let mut grad_input = [R::ZERO; TILE];
            let mut grad_dt = [R::ZERO; TILE];
            let before = &trace.states[q * d_state..][..d_state];
            let after = &trace.states[(q + 1) * d_state..][..d_state];
            let decays = &trace.decays[q * d_state..][..d_state];
            let grads_b = &mut self.b_qne[q * d_state..][..d_state];
            let grads_c = &mut self.c_qne[q * d_state..][..d_state];
            for n in 0..d_state {
                let (b, c, after, grad_state) = (b_n[n], c_n[n], &after[n], &mut carried.state_ne[n]);
                let (grad_b, grad_c) = (&mut grads_b[n], &mut grads_c[n]);
                if chunk.reset_q[q] {
                    for e in 0..TILE {
                        let g = c.mul_add(grad_y[e], grad_state[e]);
                        grad_c[e] = grad_y[e].mul_add(after[e], grad_c[e]);
                        grad_b[e] = g.mul_add(input[e], grad_b[e]);
                        grad_input[e] = g.mul_add(b, grad_input[e]);
                        grad_state[e] = R::ZERO;
                    }
                } else {
                    let (a, decay, before, grad_a) = (&a_ne[n], &decays[n], &before[n], &mut carried.a_ne[n]);
                    for e in 0..TILE {
                        let g = c.mul_add(grad_y[e], grad_state[e]);
                        grad_c[e] = grad_y[e].mul_add(after[e], grad_c[e]);
                        grad_b[e] = g.mul_add(input[e], grad_b[e]);
                        grad_input[e] = g.mul_add(b, grad_input[e]);
                        let kept = g * decay[e];
                        let through_decay = kept * before[e];
                        grad_dt[e] = through_decay.mul_add(a[e], grad_dt[e]);
                        grad_a[e] = through_decay.mul_add(dt[e], grad_a[e]);
                        grad_state[e] = kept;
                    }
                }
            }
            let (out_x, out_dt) = (&mut self.x_qe[q], &mut self.dt_qe[q]);
            for e in 0..TILE {
                out_x[e] = grad_input[e].mul_add(dt[e], grad_y[e] * d_e[e]);
                let by_dt = grad_input[e].mul_add(x[e], grad_dt[e]) * slope[e];
                out_dt[e] = by_dt;
                carried.dt_bias_e[e] += by_dt;
            }
        }
    }
}
