// RMSNorm of a gated value, with the mean over each of n_groups equal parts of a row.
//
//   u = x silu(z),   r = 1 / sqrt(mean over the group of u^2 + eps),   y = u r weight
//
// and backward, with g = dy weight:
//
//   du = r g - u r^3 mean(g u),   dx = du silu(z),   dz = du x silu'(z),   dweight = sum over rows of dy u r
//
// x, z, dy, dz: [outer, inner, n_groups d], last axis dense, f32 or bf16; weight: [n_groups d], f32; y, dx: contiguous; rstd:
// [outer inner, n_groups], f32. All arithmetic is f32, rounded once.
//
// As in rms_norm.cu a team of threads holds one row of one group in registers and a block keeps its part of dweight there;
// blockIdx.y is the group. The gate is computed again backward: that is cheaper than to keep it.
//
// With FP8_ROWS the forward pass leaves y rounded to fp8, as in rms_norm.cu.
//
// X_KIND: dtype of all but weight and rstd; ROWS_ALIGNED: whether rows are read 16 bytes at a time; VECS: vectors a thread; MAX_THREADS,
// MIN_BLOCKS: bounds of the block and of the blocks of a multiprocessor; FP8_ROWS: the rows of a block of the forward pass alone, or 0.
#include "rows.cuh"
#include "smem.cuh"
#if FP8_ROWS
#include "fp8_rows.cuh"
#endif

typedef DtypeOf<X_KIND>::type X;

#if FP8_ROWS == 0 || __CUDA_ARCH__ >= 890
extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
gated_rms_norm_forward(const X* x, const X* z, const float* weight, X* y, float* rstd, i64 x_outer, i64 x_inner, i64 z_outer,
                       i64 z_inner, int n_rows, int inner, int d, int team_size, float eps
#if FP8_ROWS
                       , unsigned char* y8, unsigned char* y8_t, float* slot, int n_padded
#endif
) {
    __shared__ float slots[64];
    Team team(team_size);
    TeamSum team_sum(slots);
    Width<ROWS_ALIGNED> width{d};
    int group = blockIdx.y, n_groups = gridDim.y;
    float w[VECS][VEC];
    load_weight(w, weight + group * d, team, width);
#if FP8_ROWS
    Fp8Rows out(y8, y8_t, slot, blockIdx.x * FP8_ROWS, n_rows, n_padded, n_groups * d, group * d, d);
    i64 next = out.first_row + team.idx, end = out.end(), step = team.n;
#else
    i64 next = blockIdx.x * team.n + team.idx, end = n_rows, step = gridDim.x * team.n;
#endif
    for (; next < end; next += step) {
        int row = (int)next, outer_idx = (unsigned)row / (unsigned)inner, inner_idx = row - outer_idx * inner;
        Pack<X> xs[VECS], zs[VECS];
        load_row(xs, x + RowStrides{x_outer, x_inner}.start(outer_idx, inner_idx) + group * d, team, width);
        load_row(zs, z + RowStrides{z_outer, z_inner}.start(outer_idx, inner_idx) + group * d, team, width);
        float u[VECS][VEC], squares = 0.f;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            float a[VEC];
            zs[v].get(a), xs[v].get(u[v]);
            #pragma unroll
            for (int i = 0; i < VEC; i++) {
                u[v][i] *= a[i] * gate_sigmoid<X>(a[i]);
                squares += u[v][i] * u[v][i];
            }
        }
        float r = 1.f / sqrtf(team_sum(squares, team) / d + eps);
        if (rstd && team.t == 0) rstd[(i64)row * n_groups + group] = r;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            #pragma unroll
            for (int i = 0; i < VEC; i++) u[v][i] = u[v][i] * r * w[v][i];
            Pack<X> normed;
            normed.set(u[v]);
#if FP8_ROWS
            out.put(normed, row, team.column(v));
#else
            store_vector(normed, y + ((i64)row * n_groups + group) * d, v, team, width);
#endif
        }
    }
#if FP8_ROWS
    pass_last_round(next - out.first_row, end - out.first_row, team);
    out.finish();
#endif
}
#endif

#if FP8_ROWS == 0
extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
gated_rms_norm_backward(const X* x, const X* z, const X* dy, const float* weight, const float* rstd, X* dx, X* dz,
                        float* partials, i64 x_outer, i64 x_inner, i64 z_outer, i64 z_inner, i64 dy_outer, i64 dy_inner,
                        i64 dz_outer, i64 dz_inner, int n_rows, int inner, int d, int team_size) {
    __shared__ float slots[64];
    Team team(team_size);
    TeamSum team_sum(slots);
    Width<ROWS_ALIGNED> width{d};
    int group = blockIdx.y, n_groups = gridDim.y;
    float w[VECS][VEC], dw[VECS][VEC] = {};
    load_weight(w, weight + group * d, team, width);

    // The next row is on its way while this one is summed.
    struct Row {
        Pack<X> x[VECS], z[VECS], dy[VECS];
        float r;
    } row, ahead;
    i64 step = (i64)gridDim.x * team.n, current = blockIdx.x * team.n + team.idx;
    auto fetch = [&](int row_idx) {
        int outer_idx = (unsigned)row_idx / (unsigned)inner, inner_idx = row_idx - outer_idx * inner;
        load_row(ahead.x, x + RowStrides{x_outer, x_inner}.start(outer_idx, inner_idx) + group * d, team, width);
        load_row(ahead.z, z + RowStrides{z_outer, z_inner}.start(outer_idx, inner_idx) + group * d, team, width);
        load_row(ahead.dy, dy + RowStrides{dy_outer, dy_inner}.start(outer_idx, inner_idx) + group * d, team, width);
        ahead.r = rstd[(i64)row_idx * n_groups + group];
    };
    if (current < n_rows) fetch((int)current);
    for (; current < n_rows; current += step) {
        row = ahead;
        if (current + step < n_rows) fetch((int)(current + step));
        float s[VECS][VEC], inner_product = 0.f;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            float a[VEC], b[VEC], c[VEC];
            row.x[v].get(a), row.z[v].get(b), row.dy[v].get(c);
            #pragma unroll
            for (int i = 0; i < VEC; i++) {
                s[v][i] = gate_sigmoid<X>(b[i]);
                inner_product += c[i] * w[v][i] * (a[i] * (b[i] * s[v][i]));
            }
        }
        float r = row.r, slope = team_sum(inner_product, team) * r * r * r / d;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            float a[VEC], b[VEC], c[VEC];
            row.x[v].get(a), row.z[v].get(b), row.dy[v].get(c);
            #pragma unroll
            for (int i = 0; i < VEC; i++) {
                float gate = b[i] * s[v][i], u = a[i] * gate;
                dw[v][i] += c[i] * (u * r);
                float du = r * (c[i] * w[v][i]) - u * slope;
                b[i] = du * a[i] * (s[v][i] * (1.f + b[i] * (1.f - s[v][i])));
                a[i] = du * gate;
            }
            Pack<X> out;
            out.set(a);
            store_vector(out, dx + (current * n_groups + group) * d, v, team, width);
            out.set(b);
            int outer_idx = (unsigned)current / (unsigned)inner, inner_idx = (int)current - outer_idx * inner;
            store_vector(out, dz + RowStrides{dz_outer, dz_inner}.start(outer_idx, inner_idx) + group * d, v, team, width);
        }
    }
    pass_last_round(current, n_rows, team);
    if (partials)
        write_block_columns(dw, partials + ((i64)blockIdx.x * n_groups + group) * d,
                            reinterpret_cast<float*>(shared_memory()), team, d);
}
#endif
