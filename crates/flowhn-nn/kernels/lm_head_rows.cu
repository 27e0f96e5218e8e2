// What precedes and follows the LM head's first product where that writes exponentials (lm_head_sm90.cu).
//
//   c_r = x_r W_target,   E_rv = exp(x_r W_v - c_r) but 0 for the target,   S_r = sum_v E_rv,   loss_r = ln(1 + S_r)
//   dl_rv = f_r E_rv with f_r = scale / (1 + S_r) for all but the target, for which it is - f_r S_r
//   so with E_r,target = - S_r,   dx_r = f_r (E W)_r,   dW = E^T (f x)
//
//   x        [n_rows, d], bf16, d a multiple of 8            E W, f x [n_rows, d], bf16
//   W        [vocab_size, d], bf16                           c        [n_rows], f32, in units of ln 2
//   targets  [n_rows], i64; `ignored` counts nothing: loss 0, gradient 0; others outside the vocabulary give NaN
//   E, sums: as in lm_head_sm90.cu
//   losses, factors  [n_rows], f32
//
// So a pass over E is never needed: its rows' factors go to x and to the product with W, which is small, and one element of a row changes.
// Measured from the target's logit, no exponential can overflow unless a word's logit is far above the target's. Rows that have such
// a word are found by their sum, and their block does them again from the largest logit, with products of its own: slow, rare, right.
//
// lm_head_origins and lm_head_scale: a warp has one row. lm_head_finish: a block has 8 rows; all of it adds up their sums, then each
// warp has one row.
//
// Variants: TILE_COLUMNS of the product; GRAD 1: leaves what the gradients need, 0: losses only.
#include "product_tiles.cuh"
#include "smem.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
// Sums from here on may come from a word that overflows in one of the products to come.
constexpr float LARGEST_SUM = 2.8e17f;
// Stands for a logit, in units of ln 2, from which all exponentials are 0.
constexpr float NOTHING = 1e30f;

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

// The products of a row of x with the words from `first` on, one a lane; lanes past the last word have the last one's.
__device__ __forceinline__ float dots(const float* x, const bf16* w, int first, int vocab_size, int d) {
    constexpr int AT_ONCE = 2;
    float own = 0.f;
    for (int i = 0; i < 32; i += AT_ONCE) {
        float sums[AT_ONCE] = {};
        for (int piece = threadIdx.x % 32; piece < d / 8; piece += 32) {
            float a[8], b[AT_ONCE][8];
            #pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                int word = min(first + i + j, vocab_size - 1);
                load_vec<8>(b[j], w + (i64)word * d + 8 * piece);
            }
            load_vec<8>(a, x + 8 * piece);
            #pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                #pragma unroll
                for (int v = 0; v < 8; v++) sums[j] = fmaf(a[v], b[j][v], sums[j]);
            }
        }
        #pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            float sum = warp_sum(sums[j]);
            if (threadIdx.x % 32 == i + j) own = sum;
        }
    }
    return own;
}

// A maximum, and the sum of exp(l - maximum) of the logits that it was taken of.
struct Total {
    float largest, sum;
};

__device__ __forceinline__ Total joined(Total a, Total b) {
    float largest = fmaxf(a.largest, b.largest);
    return Total{largest, a.sum * expf(a.largest - largest) + b.sum * expf(b.largest - largest)};
}

// One row from its largest logit, by the whole block; returns the sum over all words but the target, and the target's logit, from there.
__device__ __noinline__ float2 redo_row(
    const bf16* x, const bf16* w, bf16* e, int target, int vocab_size, int d, Total* shared, float* row) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    __syncthreads();
    for (int i = threadIdx.x; i < d; i += THREADS) row[i] = to_f32(x[i]);
    __syncthreads();
    Total total{-1e38f, 0.f};
    for (int first = warp * 32; first < vocab_size; first += THREADS) {
        float logit = dots(row, w, first, vocab_size, d);
        if (first + lane < vocab_size && first + lane != target) total = joined(total, Total{logit, 1.f});
    }
    #pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        Total other{__shfl_xor_sync(FULL_WARP, total.largest, offset), __shfl_xor_sync(FULL_WARP, total.sum, offset)};
        total = joined(total, other);
    }
    if (lane == 0) shared[warp] = total;
    __syncthreads();
    total = shared[0];
    for (int i = 1; i < WARPS; i++) total = joined(total, shared[i]);
    float target_logit = __shfl_sync(FULL_WARP, dots(row, w, target, vocab_size, d), 0);
    if constexpr (GRAD == 1) {
        for (int first = warp * 32; first < vocab_size; first += THREADS) {
            float logit = dots(row, w, first, vocab_size, d);
            if (first + lane < vocab_size) e[first + lane] = from_f32<bf16>(expf(logit - total.largest));
        }
    }
    __syncthreads();
    return make_float2(total.sum, target_logit - total.largest);
}

// c in units of ln 2: that which turns all to 0 where there is no target.
extern "C" __global__ void __launch_bounds__(THREADS) lm_head_origins(
    const bf16* __restrict__ x, const bf16* __restrict__ w, const i64* __restrict__ targets, i64 ignored, float* __restrict__ c, int n_rows,
    int vocab_size, int d) {
    int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= n_rows) return;
    i64 target = targets[row];
    bool has_target = target != ignored && target >= 0 && target < vocab_size;
    float dot = 0.f;
    for (int piece = threadIdx.x % 32; has_target && piece < d / 8; piece += 32) {
        float a[8], b[8];
        load_vec<8>(a, x + (i64)row * d + 8 * piece);
        load_vec<8>(b, w + target * d + 8 * piece);
        #pragma unroll
        for (int i = 0; i < 8; i++) dot = fmaf(a[i], b[i], dot);
    }
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) c[row] = has_target ? dot * LOG2_E : NOTHING;
}

// d floats of shared memory.
extern "C" __global__ void __launch_bounds__(THREADS) lm_head_finish(
    const float* __restrict__ sums, const bf16* __restrict__ x, const bf16* __restrict__ w, const i64* __restrict__ targets,
    i64 ignored, const float* __restrict__ scale, bf16* e, i64 row_stride, float* __restrict__ losses, float* __restrict__ factors,
    int n_rows, int vocab_size, int d) {
    __shared__ float parts[WARPS][32 / WARPS][WARPS];
    __shared__ Total totals[WARPS];
    float* row_of_x = reinterpret_cast<float*>(shared_memory());
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * WARPS;
    const int n_column_tiles = ceil_div(vocab_size, TILE_COLS), n_padded = ceil_div(n_rows, TILE_ROWS) * TILE_ROWS;
    // Eight neighbouring threads have the block's eight rows of one column tile.
    float part = 0.f;
    for (int tile = threadIdx.x / WARPS; tile < n_column_tiles; tile += 32) part += sums[(i64)tile * n_padded + first + lane % WARPS];
    parts[warp][lane / WARPS][lane % WARPS] = part;
    __syncthreads();
    // Every warp has the sums of all rows, each on lanes of its own number.
    float sum = 0.f;
    for (int i = 0; i < 32; i++) sum += parts[i / (32 / WARPS)][i % (32 / WARPS)][lane % WARPS];

    int row = first + lane % WARPS;
    i64 target = row < n_rows ? targets[row] : ignored;
    bool is_counted = target != ignored, is_token = target >= 0 && target < vocab_size;
    float own = 0.f;  // the target's logit, from where the exponentials are measured
    // Not `sum >= LARGEST_SUM`, so that sums that are no number count too.
    unsigned again = __ballot_sync(FULL_WARP, is_counted && is_token && !(sum < LARGEST_SUM)) & ((1u << WARPS) - 1);
    while (again) {
        int i = __ffs(again) - 1;
        again &= again - 1;
        i64 at = first + i;
        float2 redone = redo_row(x + at * d, w, e + at * row_stride, (int)targets[at], vocab_size, d, totals, row_of_x);
        if (lane % WARPS == i) sum = redone.x, own = redone.y;
    }

    if (warp == 0 && lane < WARPS && row < n_rows) {
        float loss = own == 0.f ? log1pf(sum) : logf(sum + expf(own)) - own;
        losses[row] = is_counted ? (is_token ? loss : not_a_number()) : 0.f;
        if constexpr (GRAD == 1) {
            factors[row] = is_counted ? (is_token ? *scale / (sum + expf(own)) : not_a_number()) : 0.f;
            if (is_counted && is_token) e[row * row_stride + target] = from_f32<bf16>(-sum);
        }
    }
}

// out_r = f_r rows_r, rounded; `out` may be `rows`, for whoever writes an element has read it.
extern "C" __global__ void __launch_bounds__(THREADS) lm_head_scale(
    const bf16* rows, const float* __restrict__ factors, bf16* out, int n_rows, int d) {
    int row = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row >= n_rows) return;
    float factor = factors[row];
    for (int column = threadIdx.x % 32 * 8; column < d; column += 256) {
        float values[8];
        load_vec<8>(values, rows + (i64)row * d + column);
        #pragma unroll
        for (int i = 0; i < 8; i++) values[i] *= factor;
        store_vec<8>(out + (i64)row * d + column, values);
    }
}
