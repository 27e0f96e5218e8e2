// RMSNorm of every token for two branches, with the residual addition before it.
//
//   s = x + change, or x where there is no change
//   r = 1 / sqrt(mean(s^2) + eps)
//   y_k = round(s r) weight_k
//
// and backward, with g = dy_0 weight_0 + dy_1 weight_1 and the gradients that reach s on other ways, ds and, where the branches go on with
// their tokens, ds_0 and ds_1:
//
//   dx = ds + ds_0 + ds_1 + r g - s r^3 mean(g s),   dweight_k = sum over tokens of dy_k s r
//
// x, change, dy, ds: [outer, inner, d], last axis dense, f32 or bf16; weights: [d], f32; sum, y, dx: contiguous; rstd: [outer inner], f32.
//
// Teams of threads hold rows in registers as in rms_norm.cu, so that s, its statistics and its gradient pass through memory once for both.
// Backward the weights wait in shared memory as in routed_norm.cu.
//
// X_KIND: dtype of all but weights and rstd; BRANCH_GRADS: whether there are ds_0 and ds_1; ROWS_ALIGNED: whether rows are read 16 bytes at
// a time; VECS: vectors a thread; MAX_THREADS, MIN_BLOCKS: bounds of the block and of the blocks of a multiprocessor.
#include "norm.cuh"
#include "smem.cuh"

typedef DtypeOf<X_KIND>::type X;

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
twin_norm_forward(const X* x, const X* change, const float* weight0, const float* weight1, X* sum, X* y0, X* y1, float* rstd, i64 x_outer,
                  i64 x_inner, i64 change_outer, i64 change_inner, int n_rows, int inner, int d, int team_size, float eps) {
    __shared__ float slots[64];
    Team team(team_size);
    TeamSum team_sum(slots);
    Width<ROWS_ALIGNED> width{d};
    float w0[VECS][VEC], w1[VECS][VEC];
    load_weight(w0, weight0, team, width), load_weight(w1, weight1, team, width);
    for (i64 row = (i64)blockIdx.x * team.n + team.idx; row < n_rows; row += (i64)gridDim.x * team.n) {
        int outer_idx = (unsigned)row / (unsigned)inner, inner_idx = (int)row - outer_idx * inner;
        Pack<X> s[VECS];
        load_row(s, x + RowStrides{x_outer, x_inner}.start(outer_idx, inner_idx), team, width);
        if (change) {
            Pack<X> moved[VECS];
            load_row(moved, change + RowStrides{change_outer, change_inner}.start(outer_idx, inner_idx), team, width);
            add_row(s, moved, sum + row * d, team, width);
        }
        float r = 1.f / sqrtf(team_sum(sum_of_squares(s), team) / d + eps);
        if (team.t == 0) rstd[row] = r;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            store_vector(normed_vector(s[v], r, w0[v]), y0 + row * d, v, team, width);
            store_vector(normed_vector(s[v], r, w1[v]), y1 + row * d, v, team, width);
        }
    }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
twin_norm_backward(const X* s, const X* dy0, const X* dy1, const X* ds,
#if BRANCH_GRADS
                   const X* ds0, const X* ds1,
#endif
                   const float* weight0, const float* weight1, const float* rstd, X* dx, float* partials, i64 s_outer, i64 s_inner,
                   i64 dy0_outer, i64 dy0_inner, i64 dy1_outer, i64 dy1_inner, i64 ds_outer, i64 ds_inner,
#if BRANCH_GRADS
                   i64 ds0_outer, i64 ds0_inner, i64 ds1_outer, i64 ds1_inner,
#endif
                   int n_rows, int inner, int d, int team_size) {
    __shared__ float slots[64];
    Team team(team_size);
    TeamSum team_sum(slots);
    Width<ROWS_ALIGNED> width{d};
    float* scratch = reinterpret_cast<float*>(shared_memory());
    OwnWeight<VECS> w0(scratch, weight0, team, width), w1(scratch + VECS * VEC * blockDim.x, weight1, team, width);
    float dw0[VECS][VEC] = {}, dw1[VECS][VEC] = {};

    // The next row is on its way while this one is summed.
    struct Row {
        Pack<X> s[VECS], dy0[VECS], dy1[VECS], ds[VECS];
#if BRANCH_GRADS
        Pack<X> ds0[VECS], ds1[VECS];
#endif
        float r;
    } row, ahead;
    auto fetch = [&](int row_idx) {
        int outer_idx = (unsigned)row_idx / (unsigned)inner, inner_idx = row_idx - outer_idx * inner;
        load_row(ahead.s, s + RowStrides{s_outer, s_inner}.start(outer_idx, inner_idx), team, width);
        load_row(ahead.dy0, dy0 + RowStrides{dy0_outer, dy0_inner}.start(outer_idx, inner_idx), team, width);
        load_row(ahead.dy1, dy1 + RowStrides{dy1_outer, dy1_inner}.start(outer_idx, inner_idx), team, width);
        load_row(ahead.ds, ds + RowStrides{ds_outer, ds_inner}.start(outer_idx, inner_idx), team, width);
#if BRANCH_GRADS
        load_row(ahead.ds0, ds0 + RowStrides{ds0_outer, ds0_inner}.start(outer_idx, inner_idx), team, width);
        load_row(ahead.ds1, ds1 + RowStrides{ds1_outer, ds1_inner}.start(outer_idx, inner_idx), team, width);
#endif
        ahead.r = rstd[row_idx];
    };
    unsigned current = blockIdx.x * team.n + team.idx, step = gridDim.x * team.n;
    if (current < (unsigned)n_rows) fetch((int)current);
    for (; current < (unsigned)n_rows; current += step) {
        row = ahead;
        if (current + step < (unsigned)n_rows) fetch((int)(current + step));
        float product = 0.f;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            float w[VEC];
            w0.get(w, v);
            product = add_product(product, row.s[v], row.dy0[v], w);
            w1.get(w, v);
            product = add_product(product, row.s[v], row.dy1[v], w);
        }
        float r = row.r, slope = team_sum(product, team) * r * r * r / d;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            float a[VEC], g[VEC], y[VEC], w[VEC];
            row.s[v].get(a), row.dy0[v].get(y), w0.get(w, v);
            #pragma unroll
            for (int i = 0; i < VEC; i++) {
                dw0[v][i] += y[i] * (a[i] * r);
                g[i] = y[i] * w[i];
            }
            row.dy1[v].get(y), w1.get(w, v);
            #pragma unroll
            for (int i = 0; i < VEC; i++) {
                dw1[v][i] += y[i] * (a[i] * r);
                a[i] = r * (g[i] + y[i] * w[i]) - a[i] * slope;
            }
            add_vector(a, row.ds[v]);
#if BRANCH_GRADS
            add_vector(a, row.ds0[v]);
            add_vector(a, row.ds1[v]);
#endif
            Pack<X> out;
            out.set(a);
            store_vector(out, dx + (i64)current * d, v, team, width);
        }
    }
    pass_last_round(current, n_rows, team);
    if (partials) {
        write_block_columns(dw0, partials + (i64)blockIdx.x * d, scratch, team, d);
        write_block_columns(dw1, partials + ((i64)gridDim.x + blockIdx.x) * d, scratch, team, d);
    }
}
