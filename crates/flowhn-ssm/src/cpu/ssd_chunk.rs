//! One chunk of SSD: matrix products inside the chunk, a state in and a state out.
//!
//! With `s_ij` the sum of `dt a` over the tokens `j + 1 ..= i` and `e_i` the sum from the chunk's start, token `i` reads token
//! `j <= i` through `m_ij = (c_i . b_j) exp(s_ij) dt_j`, and the state before the chunk through `exp(e_i) c_i`. A reset between
//! `j` and `i` makes `s_ij` negative infinity. Sums over tokens then leave out those on the other side of it: 0 times what has overflowed
//! there would not be 0.
#![allow(clippy::needless_range_loop, reason = "several arrays advance together, which one index says best")]
// q tokens of the chunk, p d_head, n d_state

use flowhn_nn::simd::Real;

use super::matrix::{Matrix, dot, sum};

/// What the heads of one group share in a chunk.
#[derive(Debug)]
pub(super) struct GroupChunk<R> {
    /// Tokens in this chunk.
    pub(super) len: usize,
    pub(super) b_qn: Matrix<R>,
    pub(super) c_qn: Matrix<R>,
    pub(super) reset_q: Vec<bool>,
    /// Token `i` sees those from `begin_q[i]` on, and is seen by those before `end_q[i]`.
    begin_q: Vec<usize>,
    end_q: Vec<usize>,
    b_nq: Matrix<R>,
    /// `c_i . b_j` for those `j` that `i` sees, 0 for those before.
    scores_qq: Matrix<R>,
}

impl<R: Real> GroupChunk<R> {
    pub(super) fn new(chunk_len: usize, d_state: usize) -> Self {
        Self {
            len: 0,
            b_qn: Matrix::zeros(chunk_len, d_state),
            c_qn: Matrix::zeros(chunk_len, d_state),
            reset_q: vec![false; chunk_len],
            begin_q: vec![0; chunk_len],
            end_q: vec![0; chunk_len],
            b_nq: Matrix::zeros(d_state, chunk_len),
            scores_qq: Matrix::zeros(chunk_len, chunk_len),
        }
    }

    /// Fills the scores from the loaded `b_qn` and `c_qn`, between the loaded resets.
    #[inline(always)]
    pub(super) fn score(&mut self) {
        self.b_nq.transpose_of(&self.b_qn, self.len);
        let mut begin = 0;
        for i in 0..self.len {
            if self.reset_q[i] {
                self.end_q[begin..i].fill(i);
                begin = i;
            }
            self.begin_q[i] = begin;
            let (scores, c_n) = (&mut self.scores_qq.row_mut(i)[..=i], self.c_qn.row(i));
            scores.fill(R::ZERO);
            self.b_nq.add_rows_to(scores, 0, c_n.len(), |n| c_n[n]);
            scores[..begin].fill(R::ZERO);
        }
        self.end_q[begin..self.len].fill(self.len);
    }

    /// Tokens that see the state before the chunk: those in front of the first reset.
    #[inline(always)]
    fn n_before_resets(&self) -> usize {
        if self.reset_q[0] { 0 } else { self.end_q[0] }
    }

    /// The first token that the state after the chunk has seen.
    #[inline(always)]
    fn last_begin(&self) -> usize {
        self.begin_q[self.len - 1]
    }
}

/// One head's inputs and decays in a chunk.
#[derive(Debug)]
pub(super) struct HeadChunk<R> {
    pub(super) x_qp: Matrix<R>,
    /// Step sizes.
    pub(super) dt_q: Vec<R>,
    /// Derivative of the step sizes by what they were made from.
    pub(super) dt_slope_q: Vec<R>,
    /// `exp(s_ij)` for `j <= i`.
    decay_qq: Matrix<R>,
    /// `exp(e_i)`.
    from_start_q: Vec<R>,
    /// `m_ij` for those `j` that `i` sees, 0 for those before.
    mix_qq: Matrix<R>,
}

impl<R: Real> HeadChunk<R> {
    pub(super) fn new(chunk_len: usize, d_head: usize) -> Self {
        let per_token = || vec![R::ZERO; chunk_len];
        Self {
            x_qp: Matrix::zeros(chunk_len, d_head),
            dt_q: per_token(),
            dt_slope_q: per_token(),
            decay_qq: Matrix::zeros(chunk_len, chunk_len),
            from_start_q: per_token(),
            mix_qq: Matrix::zeros(chunk_len, chunk_len),
        }
    }

    /// Fills decays and `m` from the loaded step sizes.
    #[inline(always)]
    pub(super) fn mix(&mut self, group: &GroupChunk<R>, a: R) {
        let len = group.len;
        // The sums first, each from that of the token before: differences of running totals would lose small sums beside large
        // ones.
        let mut from_start = R::ZERO;
        for i in 0..len {
            let step = if group.reset_q[i] { R::NEG_INFINITY } else { self.dt_q[i] * a };
            from_start += step;
            self.from_start_q[i] = from_start;
            let (above, row) = self.decay_qq.row_and_above(i);
            for (sum, above) in row[..i].iter_mut().zip(above) {
                *sum = *above + step;
            }
            row[i] = R::ZERO;
        }
        for i in 0..len {
            let (decay, mix) = (&mut self.decay_qq.row_mut(i)[..=i], &mut self.mix_qq.row_mut(i)[..=i]);
            let scores = &group.scores_qq.row(i)[..=i];
            for j in 0..=i {
                decay[j] = decay[j].exp();
                mix[j] = scores[j] * decay[j] * self.dt_q[j];
            }
        }
        for from_start in &mut self.from_start_q[..len] {
            *from_start = from_start.exp();
        }
    }

    /// The decay from each token to the end of the chunk, times its step size: its weight in the state.
    #[inline(always)]
    fn weight_in_state(&self, len: usize, j: usize) -> R {
        self.decay_qq.row(len - 1)[j] * self.dt_q[j]
    }

    /// Writes output `i` to `y`.
    #[inline(always)]
    pub(super) fn output(&self, group: &GroupChunk<R>, state_np: &Matrix<R>, d: R, i: usize, y: &mut [R]) {
        for (y, &x) in y.iter_mut().zip(self.x_qp.row(i)) {
            *y = d * x;
        }
        let from_start = self.from_start_q[i];
        // A reset hides the state altogether, even one that is no longer finite.
        if from_start != R::ZERO {
            let c_n = group.c_qn.row(i);
            state_np.add_rows_to(y, 0, c_n.len(), |n| from_start * c_n[n]);
        }
        let mix = self.mix_qq.row(i);
        self.x_qp.add_rows_to(y, group.begin_q[i], i + 1, |j| mix[j]);
    }

    /// Turns the state before the chunk into the state after it.
    #[inline(always)]
    pub(super) fn advance(&self, group: &GroupChunk<R>, state_np: &mut Matrix<R>) {
        let len = group.len;
        let keep = self.from_start_q[len - 1];
        for n in 0..group.b_qn.row(0).len() {
            let state = state_np.row_mut(n);
            scale(state, keep);
            let weight = |j| self.weight_in_state(len, j) * group.b_qn.row(j)[n];
            self.x_qp.add_rows_to(state, group.last_begin(), len, weight);
        }
    }
}

/// `values *= factor`, where 0 clears whatever was there.
#[inline(always)]
fn scale<R: Real>(values: &mut [R], factor: R) {
    if factor == R::ZERO {
        values.fill(R::ZERO);
    } else {
        values.iter_mut().for_each(|value| *value *= factor);
    }
}

/// Gradients of the heads' common inputs in a chunk, summed over the heads.
#[derive(Debug)]
pub(super) struct GroupGrads<R> {
    pub(super) b_qn: Matrix<R>,
    pub(super) c_qn: Matrix<R>,
    scores_qq: Matrix<R>,
}

impl<R: Real> GroupGrads<R> {
    pub(super) fn new(chunk_len: usize, d_state: usize) -> Self {
        Self {
            b_qn: Matrix::zeros(chunk_len, d_state),
            c_qn: Matrix::zeros(chunk_len, d_state),
            scores_qq: Matrix::zeros(chunk_len, chunk_len),
        }
    }

    #[inline(always)]
    pub(super) fn clear(&mut self) {
        for matrix in [&mut self.b_qn, &mut self.c_qn, &mut self.scores_qq] {
            matrix.as_mut_slice().fill(R::ZERO);
        }
    }

    /// Adds what `b` and `c` get through the scores, once all heads have added theirs.
    #[inline(always)]
    pub(super) fn finish(&mut self, group: &GroupChunk<R>) {
        for i in 0..group.len {
            let scores_qq = &self.scores_qq;
            group.b_qn.add_rows_to(self.c_qn.row_mut(i), group.begin_q[i], i + 1, |j| scores_qq.row(i)[j]);
            group.c_qn.add_rows_to(self.b_qn.row_mut(i), i, group.end_q[i], |k| scores_qq.row(k)[i]);
        }
    }
}

/// Gradients of one head: those of a chunk, and those carried from chunk to chunk, last to first.
#[derive(Debug)]
pub(super) struct HeadGrads<R> {
    /// On entry the gradient by the output.
    pub(super) y_qp: Matrix<R>,
    pub(super) x_qp: Matrix<R>,
    /// By what the step sizes were made from.
    pub(super) dt_q: Vec<R>,
    /// By the state after the chunk on entry, before it on return.
    pub(super) state_np: Matrix<R>,
    pub(super) a: R,
    pub(super) d: R,
    pub(super) dt_bias: R,
    scratch: Scratch<R>,
}

/// Room for intermediate results of [`HeadGrads::backward`].
#[derive(Debug)]
struct Scratch<R> {
    x_pq: Matrix<R>,
    state_pn: Matrix<R>,
    grad_state_pn: Matrix<R>,
    /// Gradients by `m`, then by `s`.
    sums_qq: Matrix<R>,
    from_start_q: Vec<R>,
    state_row: Vec<R>,
    head_row: Vec<R>,
}

impl<R: Real> HeadGrads<R> {
    pub(super) fn new(chunk_len: usize, d_head: usize, d_state: usize) -> Self {
        Self {
            y_qp: Matrix::zeros(chunk_len, d_head),
            x_qp: Matrix::zeros(chunk_len, d_head),
            dt_q: vec![R::ZERO; chunk_len],
            state_np: Matrix::zeros(d_state, d_head),
            a: R::ZERO,
            d: R::ZERO,
            dt_bias: R::ZERO,
            scratch: Scratch {
                x_pq: Matrix::zeros(d_head, chunk_len),
                state_pn: Matrix::zeros(d_head, d_state),
                grad_state_pn: Matrix::zeros(d_head, d_state),
                sums_qq: Matrix::zeros(chunk_len, chunk_len),
                from_start_q: vec![R::ZERO; chunk_len],
                state_row: vec![R::ZERO; d_state],
                head_row: vec![R::ZERO; d_head],
            },
        }
    }

    /// The backward of [`HeadChunk::output`] for all tokens and of [`HeadChunk::advance`], from the state before the chunk.
    #[inline(always)]
    pub(super) fn backward(
        &mut self,
        head: &HeadChunk<R>,
        group: &GroupChunk<R>,
        state_np: &Matrix<R>,
        (a, d): (R, R),
        shared: &mut GroupGrads<R>,
    ) {
        let (len, d_state) = (group.len, group.b_qn.row(0).len());
        self.scratch.x_pq.transpose_of(&head.x_qp, len);
        self.scratch.state_pn.transpose_of(state_np, d_state);
        self.scratch.grad_state_pn.transpose_of(&self.state_np, d_state);
        self.through_state(head, group, shared);
        self.through_mix(head, group, d, shared);
        self.through_decays(head, state_np, len, a);
        self.by_state(head, group);
    }

    /// `c` and the decays from the start, through the outputs; `b`, `x` and the weights in the state, through the state after.
    #[inline(always)]
    fn through_state(&mut self, head: &HeadChunk<R>, group: &GroupChunk<R>, shared: &mut GroupGrads<R>) {
        let Scratch { state_pn, grad_state_pn, sums_qq, from_start_q, state_row, head_row, .. } = &mut self.scratch;
        let len = group.len;
        sums_qq.as_mut_slice().fill(R::ZERO);
        for i in 0..len {
            let (y_p, from_start) = (self.y_qp.row(i), head.from_start_q[i]);
            from_start_q[i] = R::ZERO;
            if from_start != R::ZERO {
                state_row.fill(R::ZERO);
                state_pn.add_rows_to(state_row, 0, y_p.len(), |p| y_p[p]);
                from_start_q[i] = from_start * dot(group.c_qn.row(i), state_row);
                for (c, &s) in shared.c_qn.row_mut(i).iter_mut().zip(&*state_row) {
                    *c = from_start.mul_add(s, *c);
                }
            }

            let decay = head.decay_qq.row(len - 1)[i];
            if decay == R::ZERO {
                self.dt_q[i] = R::ZERO;
                self.x_qp.row_mut(i).fill(R::ZERO);
                continue;
            }
            let (x_p, b_n) = (head.x_qp.row(i), group.b_qn.row(i));
            let weight = head.weight_in_state(len, i);
            head_row.fill(R::ZERO);
            self.state_np.add_rows_to(head_row, 0, b_n.len(), |n| b_n[n]);
            let grad_weight = dot(x_p, head_row);
            self.dt_q[i] = grad_weight * decay;
            sums_qq.row_mut(len - 1)[i] = grad_weight * weight;
            for (out, &grad) in self.x_qp.row_mut(i).iter_mut().zip(&*head_row) {
                *out = weight * grad;
            }
            grad_state_pn.add_rows_to(shared.b_qn.row_mut(i), 0, x_p.len(), |p| weight * x_p[p]);
        }
    }

    /// `x`, `dt`, the scores and the decays between tokens, through `m`.
    #[inline(always)]
    fn through_mix(&mut self, head: &HeadChunk<R>, group: &GroupChunk<R>, d: R, shared: &mut GroupGrads<R>) {
        let len = group.len;
        let mut grad_mix = vec![R::ZERO; len];
        for i in 0..len {
            let (y_p, x_p) = (self.y_qp.row(i), head.x_qp.row(i));
            self.d += dot(y_p, x_p);
            let grad_mix = &mut grad_mix[..=i];
            grad_mix.fill(R::ZERO);
            self.scratch.x_pq.add_rows_to(grad_mix, 0, y_p.len(), |p| y_p[p]);
            let (scores, decay, mix) = (group.scores_qq.row(i), head.decay_qq.row(i), head.mix_qq.row(i));
            let (grad_scores, grad_sums) = (shared.scores_qq.row_mut(i), self.scratch.sums_qq.row_mut(i));
            for j in group.begin_q[i]..=i {
                let by_decay = grad_mix[j] * decay[j];
                grad_scores[j] = by_decay.mul_add(head.dt_q[j], grad_scores[j]);
                self.dt_q[j] = by_decay.mul_add(scores[j], self.dt_q[j]);
                grad_sums[j] = grad_mix[j].mul_add(mix[j], grad_sums[j]);
            }
        }
        for j in 0..len {
            let x_p = self.x_qp.row_mut(j);
            for (x, &y) in x_p.iter_mut().zip(self.y_qp.row(j)) {
                *x = d.mul_add(y, *x);
            }
            self.y_qp.add_rows_to(x_p, j, group.end_q[j], |i| head.mix_qq.row(i)[j]);
        }
    }

    /// `dt` and `a`, through all sums: token `t` is in `s_ij` where `j < t <= i`, and in `e_i` where `t <= i`.
    #[inline(always)]
    fn through_decays(&mut self, head: &HeadChunk<R>, state_np: &Matrix<R>, len: usize, a: R) {
        let Scratch { sums_qq, from_start_q, .. } = &mut self.scratch;
        let keep = head.from_start_q[len - 1];
        if keep != R::ZERO {
            from_start_q[len - 1] += keep * dot(self.state_np.as_slice(), state_np.as_slice());
        }
        let mut below = vec![R::ZERO; len];
        let mut from_start = R::ZERO;
        for t in (0..len).rev() {
            from_start += from_start_q[t];
            for (below, &sum) in below[..=t].iter_mut().zip(sums_qq.row(t)) {
                *below += sum;
            }
            let by_step = from_start + sum(&below[..t]);
            self.a = by_step.mul_add(head.dt_q[t], self.a);
            self.dt_q[t] = by_step.mul_add(a, self.dt_q[t]) * head.dt_slope_q[t];
            self.dt_bias += self.dt_q[t];
        }
    }

    /// The state before the chunk, through the outputs and the state after.
    #[inline(always)]
    fn by_state(&mut self, head: &HeadChunk<R>, group: &GroupChunk<R>) {
        let len = group.len;
        for n in 0..group.b_qn.row(0).len() {
            let state = self.state_np.row_mut(n);
            scale(state, head.from_start_q[len - 1]);
            let weight = |i: usize| head.from_start_q[i] * group.c_qn.row(i)[n];
            self.y_qp.add_rows_to(state, 0, group.n_before_resets(), weight);
        }
    }
}
