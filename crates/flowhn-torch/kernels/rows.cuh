// What kernels over the rows of a tensor share.
//
// A row is the dense last axis of a tensor, `d` elements; the axes before it are two, [outer, inner], with any strides.
// A team of threads (whole warps of a block) works on one row at a time: thread t holds the vectors t, t + team.size, ... of
// 8 neighbouring elements, N in all, in registers and as they lie in memory. Where rows are not aligned to 16 bytes, or 8
// does not divide d, the same vectors are read and written element by element.
#pragma once
#include "flowhn.cuh"

constexpr int VEC = 8;

// ---- vectors ------------------------------------------------------------------------------------------------------------

// Eight neighbours as they lie in memory.
template <class T> struct Pack;

template <> struct Pack<bf16> {
    uint4 words;
    __device__ __forceinline__ void load(const bf16* p) { words = *reinterpret_cast<const uint4*>(p); }
    __device__ __forceinline__ void store(bf16* p) const { *reinterpret_cast<uint4*>(p) = words; }
    __device__ __forceinline__ void get(float (&x)[VEC]) const {
        x[0] = low_bf16(words.x), x[1] = high_bf16(words.x), x[2] = low_bf16(words.y), x[3] = high_bf16(words.y);
        x[4] = low_bf16(words.z), x[5] = high_bf16(words.z), x[6] = low_bf16(words.w), x[7] = high_bf16(words.w);
    }
    __device__ __forceinline__ void set(const float (&x)[VEC]) {
        words = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
    }
};

template <> struct Pack<float> {
    float4 low, high;
    __device__ __forceinline__ void load(const float* p) {
        low = reinterpret_cast<const float4*>(p)[0], high = reinterpret_cast<const float4*>(p)[1];
    }
    __device__ __forceinline__ void store(float* p) const {
        reinterpret_cast<float4*>(p)[0] = low, reinterpret_cast<float4*>(p)[1] = high;
    }
    __device__ __forceinline__ void get(float (&x)[VEC]) const {
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
    }
    __device__ __forceinline__ void set(const float (&x)[VEC]) {
        low = make_float4(x[0], x[1], x[2], x[3]), high = make_float4(x[4], x[5], x[6], x[7]);
    }
};

// The first `n` elements at `p`, zeros behind them.
template <class T> __device__ __forceinline__ void load_some(Pack<T>& pack, const T* p, int n) {
    float x[VEC];
    #pragma unroll
    for (int i = 0; i < VEC; i++) x[i] = i < n ? to_f32(p[i]) : 0.f;
    pack.set(x);
}

template <class T> __device__ __forceinline__ void store_some(const Pack<T>& pack, T* p, int n) {
    float x[VEC];
    pack.get(x);
    #pragma unroll
    for (int i = 0; i < VEC; i++)
        if (i < n) p[i] = from_f32<T>(x[i]);
}

// ---- rows ---------------------------------------------------------------------------------------------------------------

// Which threads work on a row: `size` of them, this is thread `t` of team `idx` of the block.
struct Team {
    int size, idx, t, n;
    __device__ __forceinline__ explicit Team(int size)
        : size(size), idx(threadIdx.x / size), t(threadIdx.x % size), n(blockDim.x / size) {}
    // The first column of this thread's vector v.
    __device__ __forceinline__ int column(int v) const { return (v * size + t) * VEC; }
};

// What all rows have in common: their length, and whether they may be read 16 bytes at a time. The latter is part of the
// type, so that loads stay free of branches and the compiler can keep many of them under way.
template <bool ALIGNED> struct Width {
    int d;
};

template <int N, class T, bool ALIGNED>
__device__ __forceinline__ void load_row(Pack<T> (&row)[N], const T* p, const Team& team, const Width<ALIGNED>& width) {
    if constexpr (ALIGNED) {
        #pragma unroll
        for (int v = 0; v < N; v++) {
            int column = team.column(v);
            if (column < width.d) row[v].load(p + column);
            else row[v] = Pack<T>{};
        }
    } else {
        #pragma unroll
        for (int v = 0; v < N; v++) load_some(row[v], p + team.column(v), width.d - team.column(v));
    }
}

template <class T, bool ALIGNED>
__device__ __forceinline__ void store_vector(const Pack<T>& pack, T* p, int v, const Team& team, const Width<ALIGNED>& width) {
    int column = team.column(v);
    if constexpr (!ALIGNED) store_some(pack, p + column, width.d - column);
    else if (column < width.d) pack.store(p + column);
}

template <int N, class T, bool ALIGNED>
__device__ __forceinline__ void store_row(const Pack<T> (&row)[N], T* p, const Team& team, const Width<ALIGNED>& width) {
    #pragma unroll
    for (int v = 0; v < N; v++) store_vector(row[v], p, v, team, width);
}

// row += change, rounded to their dtype, which `sum` gets as well.
template <int N, class T, bool ALIGNED>
__device__ __forceinline__ void add_row(Pack<T> (&row)[N], const Pack<T> (&change)[N], T* sum, const Team& team,
                                        const Width<ALIGNED>& width) {
    #pragma unroll
    for (int v = 0; v < N; v++) {
        float a[VEC], b[VEC];
        row[v].get(a), change[v].get(b);
        #pragma unroll
        for (int i = 0; i < VEC; i++) a[i] += b[i];
        row[v].set(a);
        store_vector(row[v], sum, v, team, width);
    }
}

// Reads a vector of parameters, which all rows share, as f32; zeros past the end.
template <int N, class T, bool ALIGNED>
__device__ __forceinline__ void load_weight(float (&w)[N][VEC], const T* weight, const Team& team, const Width<ALIGNED>& width) {
    Pack<T> row[N];
    load_row(row, weight, team, width);
    #pragma unroll
    for (int v = 0; v < N; v++) row[v].get(w[v]);
}

// Where the rows of a tensor [outer, inner, d] start.
struct RowStrides {
    i64 outer, inner;
    __device__ __forceinline__ i64 start(int outer_idx, int inner_idx) const {
        return outer_idx * outer + inner_idx * inner;
    }
};

// ---- sums ---------------------------------------------------------------------------------------------------------------

// Sums over the threads of a team, in a fixed order. Two sets of slots take turns, so that one barrier a sum is enough.
struct TeamSum {
    float* slots;
    int phase;
    // `slots` has 64 floats of shared memory for the whole block.
    __device__ __forceinline__ explicit TeamSum(float* slots) : slots(slots), phase(0) {}
    __device__ __forceinline__ float operator()(float x, const Team& team) {
        x = warp_sum(x);
        if (team.size == 32) return x;
        float* own = slots + phase * 32 + team.idx * (team.size / 32);
        phase ^= 1;
        if (team.t % 32 == 0) own[team.t / 32] = x;
        named_barrier(1 + team.idx, team.size);
        float sum = own[0];
        for (int warp = 1; warp < team.size / 32; warp++) sum += own[warp];
        return sum;
    }
};

// Behind a loop over rows with a sum for each, in which the block's first team goes on longest: a team whose last row, `next_row` less
// one step, came a round sooner passes its barrier once more. The program does not need that. But racecheck of compute-sanitizer takes
// what two threads do on the two sides of a barrier of the whole block for a race if they have passed different numbers of barriers.
__device__ __forceinline__ void pass_last_round(i64 next_row, i64 n_rows, const Team& team) {
    if (team.size > 32 && next_row - team.idx < n_rows) named_barrier(1 + team.idx, team.size);
}

// Four neighbours of f32 of which `n` are to be stored; at once if `aligned`.
__device__ __forceinline__ void store_four(float* p, const float (&x)[4], int n, bool aligned) {
    if (aligned && n >= 4) return store_vec(p, x);
    #pragma unroll
    for (int i = 0; i < 4; i++)
        if (i < n) p[i] = x[i];
}

// Adds the teams' column sums in the order of the teams and writes the block's sums to out[0 .. d). `scratch` has VEC floats for each
// thread, at a multiple of 16 bytes; every thread of the block must come here. `column_sums.cu`, which adds the blocks up, may start.
template <int N>
__device__ __forceinline__ void write_block_columns(const float (&sums)[N][VEC], float* out, float* scratch, const Team& team, int d) {
    let_next_kernel_start();
    bool aligned = d % 4 == 0;
    int width = team.size * VEC;
    #pragma unroll
    for (int v = 0; v < N; v++) {
        // What scratch held before has been read.
        __syncthreads();
        store_vec(scratch + team.idx * width + team.t * VEC, sums[v]);
        __syncthreads();
        for (int at = 4 * threadIdx.x; at < width; at += 4 * blockDim.x) {
            float sum[4], other[4];
            load_vec(sum, scratch + at);
            for (int idx = 1; idx < team.n; idx++) {
                load_vec(other, scratch + idx * width + at);
                #pragma unroll
                for (int i = 0; i < 4; i++) sum[i] += other[i];
            }
            store_four(out + v * width + at, sum, d - v * width - at, aligned);
        }
    }
}
