// The last step of sums over all rows: what blocks of another kernel have added up, added up over the blocks.
//
//   sums[c] = sum over k of partials[k, c]
//
// partials: [n_partials, d], contiguous; sums: [d]; f32. A block takes COLUMNS columns. Its threads read four neighbours at once, all
// they need before they add, so that there is one trip to memory; a group of lanes has a row, groups have rows in turns. A thread adds its
// rows in order, then a warp its groups, then one thread for each column the warps: a fixed order, the same bits every time.
//
// The kernel in front leaves the partial sums, and this one starts early: its blocks are there when the other's last ones end.
#include "flowhn.cuh"

constexpr int THREADS = 256, COLUMNS = 8, LANES = COLUMNS / 4, GROUPS = THREADS / LANES, WARPS = THREADS / 32;
// Rows that a thread has under way.
constexpr int AHEAD = 4;

// The four neighbours at `p`, of which `n` are there; zeros for the rest. Whether they may be read at once is part of the type.
template <bool ALIGNED> __device__ __forceinline__ void load_four(float (&x)[4], const float* p, int n) {
    if (ALIGNED && n > 0) load_vec(x, p);
    else {
        #pragma unroll
        for (int i = 0; i < 4; i++) x[i] = !ALIGNED && i < n ? p[i] : 0.f;
    }
}

template <bool ALIGNED> __device__ __forceinline__ void add_rows(float (&sum)[4], const float* partials, int n_partials, int d) {
    int column = blockIdx.x * COLUMNS + threadIdx.x % LANES * 4;
    for (int k = threadIdx.x / LANES; k < n_partials; k += AHEAD * GROUPS) {
        float x[AHEAD][4];
        #pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            int row = k + a * GROUPS;
            load_four<ALIGNED>(x[a], partials + (i64)row * d + column, row < n_partials ? d - column : 0);
        }
        #pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            #pragma unroll
            for (int i = 0; i < 4; i++) sum[i] += x[a][i];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) column_sums(const float* partials, float* sums, int n_partials, int d) {
    __shared__ float of_warps[WARPS][COLUMNS];
    wait_for_kernel_in_front();
    float sum[4] = {};
    if (d % 4 == 0) add_rows<true>(sum, partials, n_partials, d);
    else add_rows<false>(sum, partials, n_partials, d);
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        #pragma unroll
        for (int offset = 16; offset >= LANES; offset /= 2) sum[i] += __shfl_xor_sync(FULL_WARP, sum[i], offset);
    }
    int lane = threadIdx.x % 32;
    if (lane < LANES) store_vec(&of_warps[threadIdx.x / 32][lane * 4], sum);
    __syncthreads();
    int column = blockIdx.x * COLUMNS + threadIdx.x;
    if (threadIdx.x >= COLUMNS || column >= d) return;
    float total = of_warps[0][threadIdx.x];
    #pragma unroll
    for (int warp = 1; warp < WARPS; warp++) total += of_warps[warp][threadIdx.x];
    sums[column] = total;
}
