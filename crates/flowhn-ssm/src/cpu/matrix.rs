//! The matrix products of SSD's chunks: small, row-major, built from one vectorised row update.

use flowhn_nn::simd::Real;

/// A small row-major matrix.
#[derive(Clone, Debug)]
pub(super) struct Matrix<R> {
    data: Vec<R>,
    n_cols: usize,
}

impl<R: Real> Matrix<R> {
    pub(super) fn zeros(n_rows: usize, n_cols: usize) -> Self {
        Self { data: vec![R::ZERO; n_rows * n_cols], n_cols }
    }

    #[inline(always)]
    pub(super) fn row(&self, row_idx: usize) -> &[R] {
        &self.data[row_idx * self.n_cols..][..self.n_cols]
    }

    #[inline(always)]
    pub(super) fn row_mut(&mut self, row_idx: usize) -> &mut [R] {
        &mut self.data[row_idx * self.n_cols..][..self.n_cols]
    }

    /// A row to write and the one above it to read; the first row has an empty one above.
    #[inline(always)]
    pub(super) fn row_and_above(&mut self, row_idx: usize) -> (&[R], &mut [R]) {
        let (above, rest) = self.data.split_at_mut(row_idx * self.n_cols);
        (&above[above.len().saturating_sub(self.n_cols)..], &mut rest[..self.n_cols])
    }

    #[inline(always)]
    pub(super) fn as_slice(&self) -> &[R] {
        &self.data
    }

    #[inline(always)]
    pub(super) fn as_mut_slice(&mut self) -> &mut [R] {
        &mut self.data
    }

    /// Becomes the transpose of the first `n_rows` rows of `other`; columns past them are left as they were.
    #[inline(always)]
    pub(super) fn transpose_of(&mut self, other: &Self, n_rows: usize) {
        for (col, out) in self.data.chunks_exact_mut(self.n_cols).enumerate() {
            for (row, out) in out[..n_rows].iter_mut().enumerate() {
                *out = other.data[row * other.n_cols + col];
            }
        }
    }

    /// `out += sum_k weight(k) row_k` over the rows `first..end`, as far as `out` is long.
    ///
    /// Eight rows at a time: one load and store of `out` then serve eight multiply-adds.
    #[inline(always)]
    pub(super) fn add_rows_to(&self, out: &mut [R], first: usize, end: usize, weight: impl Fn(usize) -> R) {
        let mut k = first;
        while k + 8 <= end {
            let rows = std::array::from_fn(|i| &self.row(k + i)[..out.len()]);
            add_eight(out, rows, std::array::from_fn(|i| weight(k + i)));
            k += 8;
        }
        while k < end {
            let weight = weight(k);
            for (out, &x) in out.iter_mut().zip(self.row(k)) {
                *out = weight.mul_add(x, *out);
            }
            k += 1;
        }
    }
}

#[inline(always)]
fn add_eight<R: Real>(out: &mut [R], rows: [&[R]; 8], w: [R; 8]) {
    let n = out.len();
    let [r0, r1, r2, r3, r4, r5, r6, r7] = rows.map(|row| &row[..n]);
    for i in 0..n {
        // Two chains of four hide the latency of the multiply-adds.
        let even = w[0].mul_add(r0[i], w[2].mul_add(r2[i], w[4].mul_add(r4[i], w[6] * r6[i])));
        let odd = w[1].mul_add(r1[i], w[3].mul_add(r3[i], w[5].mul_add(r5[i], w[7].mul_add(r7[i], out[i]))));
        out[i] = even + odd;
    }
}

/// Partial sums kept side by side, so that a sum is a vector loop with a fixed order of additions.
const LANES: usize = 32;

/// `sum_i a_i b_i`.
#[inline(always)]
pub(super) fn dot<R: Real>(a: &[R], b: &[R]) -> R {
    let ((a_body, a_tail), (b_body, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [R::ZERO; LANES];
    for (a, b) in a_body.iter().zip(b_body) {
        for i in 0..LANES {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(a_tail.iter().zip(b_tail)) {
        *lane = a.mul_add(b, *lane);
    }
    fold(lanes)
}

/// `sum_i a_i`.
#[inline(always)]
pub(super) fn sum<R: Real>(a: &[R]) -> R {
    let (body, tail) = a.as_chunks::<LANES>();
    let mut lanes = [R::ZERO; LANES];
    for a in body {
        for i in 0..LANES {
            lanes[i] += a[i];
        }
    }
    for (lane, &a) in lanes.iter_mut().zip(tail) {
        *lane += a;
    }
    fold(lanes)
}

/// Adds up the lanes, halves onto halves.
#[inline(always)]
pub(super) fn fold<R: Real, const N: usize>(mut lanes: [R; N]) -> R {
    let mut width = N / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}
