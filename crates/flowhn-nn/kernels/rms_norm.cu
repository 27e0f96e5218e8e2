// RMSNorm over the rows of x, and the same after a residual addition.
//
//   s = x + delta           (only where delta is given; rounded to the dtype of x)
//   r = 1 / sqrt(mean(s^2) + eps)
//   y = round(s r) weight
//
// and backward, with g = dy weight and ds the gradient that reaches s on other ways (or none):
//
//   dx = ds + r g - s r^3 mean(g s),   dweight = sum over rows of dy s r
//
// x, delta, dy, ds: [outer, inner, d], last axis dense, f32 or bf16; weight: [d], f32; y, sum, dx: contiguous; rstd:
// [outer inner], f32. Statistics and sums are f32.
//
// A team of threads holds one row in registers, so that each element is read once and written once, and keeps its part of
// the weight there from row to row. The grid is as large as the GPU holds; teams take rows in turn. Backward they also keep
// their part of dweight in registers over all their rows; a block writes its sum once, and `column_sums.cu` adds the blocks in a fixed
// order: no atomics, the same bits every time.
//
// With FP8_ROWS the forward pass leaves y rounded to fp8, y8 [n_padded, d] and y8_t [d, n_padded], with the bits that a cast of y would
// have (fp8_rows.cuh); the block has so many neighbouring rows, and rows are aligned.
//
// X_KIND: dtype of all but weight and rstd; ROWS_ALIGNED: whether rows are read 16 bytes at a time; VECS: vectors a thread; MAX_THREADS,
// MIN_BLOCKS: bounds of the block and of the blocks of a multiprocessor; FP8_ROWS: the rows of a block of the forward pass alone, or 0.
#include "norm.cuh"
#include "smem.cuh"
#if FP8_ROWS
#include "fp8_rows.cuh"
#endif

typedef DtypeOf<X_KIND>::type X;

#if FP8_ROWS == 0 || __CUDA_ARCH__ >= 890
extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
rms_norm_forward(const X* x, const X* delta, const float* weight, X* sum, X* y, float* rstd, i64 x_outer, i64 x_inner,
                 i64 delta_outer, i64 delta_inner, int n_rows, int inner, int d, int team_size, float eps
#if FP8_ROWS
                 , unsigned char* y8, unsigned char* y8_t, float* slot, int n_padded
#endif
) {
    __shared__ float slots[64];
    Team team(team_size);
    TeamSum team_sum(slots);
    Width<ROWS_ALIGNED> width{d};
    float w[VECS][VEC];
    load_weight(w, weight, team, width);
#if FP8_ROWS
    Fp8Rows out(y8, y8_t, slot, blockIdx.x * FP8_ROWS, n_rows, n_padded, d, 0, d);
    i64 next = out.first_row + team.idx, end = out.end(), step = team.n;
#else
    i64 next = blockIdx.x * team.n + team.idx, end = n_rows, step = gridDim.x * team.n;
#endif
    for (; next < end; next += step) {
        int row = (int)next, outer_idx = (unsigned)row / (unsigned)inner, inner_idx = row - outer_idx * inner;
        Pack<X> s[VECS];
        load_row(s, x + RowStrides{x_outer, x_inner}.start(outer_idx, inner_idx), team, width);
        if (delta) {
            Pack<X> change[VECS];
            load_row(change, delta + RowStrides{delta_outer, delta_inner}.start(outer_idx, inner_idx), team, width);
            add_row(s, change, sum + (i64)row * d, team, width);
        }
        float r = 1.f / sqrtf(team_sum(sum_of_squares(s), team) / d + eps);
        if (rstd && team.t == 0) rstd[row] = r;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            Pack<X> normed = normed_vector(s[v], r, w[v]);
#if FP8_ROWS
            out.put(normed, row, team.column(v));
#else
            store_vector(normed, y + (i64)row * d, v, team, width);
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
struct Backward {
    const X *s, *dy, *ds;
    const float *weight, *rstd;
    X* dx;
    float* partials;
    RowStrides s_strides, dy_strides, ds_strides;
    int n_rows, inner, d, team_size;
};

// RESIDUAL: whether ds is there; part of the type, so that loads stay free of branches.
template <bool RESIDUAL>
__device__ __forceinline__ void backward(const Backward& args) {
    int n_rows = args.n_rows, inner = args.inner, d = args.d;
    __shared__ float slots[64];
    Team team(args.team_size);
    TeamSum team_sum(slots);
    Width<ROWS_ALIGNED> width{d};
    float w[VECS][VEC], dw[VECS][VEC] = {};
    load_weight(w, args.weight, team, width);

    // The next row is on its way while this one is summed.
    struct Row {
        Pack<X> s[VECS], dy[VECS], ds[VECS];
        float r;
    } row, ahead;
    i64 step = (i64)gridDim.x * team.n, current = blockIdx.x * team.n + team.idx;
    auto fetch = [&](int row_idx) {
        int outer_idx = (unsigned)row_idx / (unsigned)inner, inner_idx = row_idx - outer_idx * inner;
        load_row(ahead.s, args.s + args.s_strides.start(outer_idx, inner_idx), team, width);
        load_row(ahead.dy, args.dy + args.dy_strides.start(outer_idx, inner_idx), team, width);
        if constexpr (RESIDUAL) load_row(ahead.ds, args.ds + args.ds_strides.start(outer_idx, inner_idx), team, width);
        ahead.r = args.rstd[row_idx];
    };
    if (current < n_rows) fetch((int)current);
    for (; current < n_rows; current += step) {
        row = ahead;
        if (current + step < n_rows) fetch((int)(current + step));
        float r = row.r, slope = team_sum(weighted_product(row.s, row.dy, w), team) * r * r * r / d;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            float a[VEC];
            norm_gradient(a, dw[v], row.s[v], row.dy[v], w[v], r, slope);
            if constexpr (RESIDUAL) add_vector(a, row.ds[v]);
            Pack<X> out;
            out.set(a);
            store_vector(out, args.dx + current * d, v, team, width);
        }
    }
    pass_last_round(current, n_rows, team);
    if (args.partials)
        write_block_columns(dw, args.partials + (i64)blockIdx.x * d, reinterpret_cast<float*>(shared_memory()), team, d);
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
rms_norm_backward(const X* s, const X* dy, const float* weight, const float* rstd, X* dx, float* partials, i64 s_outer,
                  i64 s_inner, i64 dy_outer, i64 dy_inner, int n_rows, int inner, int d, int team_size) {
    backward<false>(Backward{s, dy, nullptr, weight, rstd, dx, partials, {s_outer, s_inner}, {dy_outer, dy_inner}, {0, 0}, n_rows,
                             inner, d, team_size});
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
residual_norm_backward(const X* s, const X* dy, const X* ds, const float* weight, const float* rstd, X* dx, float* partials,
                       i64 s_outer, i64 s_inner, i64 dy_outer, i64 dy_inner, i64 ds_outer, i64 ds_inner, int n_rows, int inner,
                       int d, int team_size) {
    backward<true>(Backward{s, dy, ds, weight, rstd, dx, partials, {s_outer, s_inner}, {dy_outer, dy_inner}, {ds_outer, ds_inner},
                            n_rows, inner, d, team_size});
}
#endif
