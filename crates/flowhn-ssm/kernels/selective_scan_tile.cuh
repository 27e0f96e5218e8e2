// What the kernels of the selective scan share: the shape of a block, loads of neighbouring channels and of states, and the
// functions of the formula. Sources are compiled as this text followed by their own.
//
// A warp owns 8 channels, and 4 lanes share a channel: each holds 4 of 16 states (a slice; more states take several slices in
// turn). Lane = channel | group of states << 3, so that the sums over states are two shuffles and the sums over channels fit
// the operand layout of a tensor core instruction.
#pragma once
#include "flowhn.cuh"
#include "smem.cuh"

// Dtypes: 0 f32, 1 bf16.
#ifndef X_KIND
#define X_KIND 1
#endif
#ifndef DT_KIND
#define DT_KIND X_KIND
#endif
#ifndef Z_KIND
#define Z_KIND X_KIND
#endif
#ifndef B_KIND
#define B_KIND X_KIND
#endif
#ifndef C_KIND
#define C_KIND X_KIND
#endif
// Whether every address of a pair of channels, or of a pair of states, is aligned to the pair.
#ifndef PAIRED_CHANNELS
#define PAIRED_CHANNELS 1
#endif
#ifndef PAIRED_STATES
#define PAIRED_STATES 1
#endif
// Whether step sizes go through softplus, whether there is a gate, whether there are resets, and slices of 16 states.
#ifndef SOFTPLUS
#define SOFTPLUS 1
#endif
#ifndef GATED
#define GATED 1
#endif
#ifndef RESET
#define RESET 0
#endif
#ifndef SLICES
#define SLICES 1
#endif
#ifndef WARPS
#define WARPS 4
#endif
// Teams of WARPS warps in a block, each of which works as a block of its own would.
#ifndef TEAMS
#define TEAMS 1
#endif
// Tokens between two recorded states.
#ifndef CHUNK
#define CHUNK 64
#endif

typedef DtypeOf<X_KIND>::type X;
typedef DtypeOf<DT_KIND>::type Dt;
typedef DtypeOf<Z_KIND>::type Z;
typedef DtypeOf<B_KIND>::type B;
typedef DtypeOf<C_KIND>::type C;

constexpr int SLICE = 16;
constexpr int CHANNELS = 8 * WARPS;
constexpr int THREADS = 32 * WARPS;
// Threads take pairs of channels where they work element by element: 8 tokens at a time.
constexpr int PAIRS = CHANNELS / 2;
constexpr int ROWS = THREADS / PAIRS;

// The place of a thread and of a team.
__device__ __forceinline__ int thread_of_team() { return TEAMS == 1 ? threadIdx.x : threadIdx.x % THREADS; }
__device__ __forceinline__ int team_of_block() { return TEAMS == 1 ? 0 : threadIdx.x / THREADS; }
__device__ __forceinline__ int first_channel() { return (blockIdx.x * TEAMS + team_of_block()) * CHANNELS; }

__device__ __forceinline__ void sync_team() {
    if constexpr (TEAMS == 1) __syncthreads();
    else named_barrier(1 + team_of_block(), THREADS);
}

// Rows of sums in shared memory are padded, so that 4 tokens times 8 channels fall into 32 banks.
constexpr int SUM_STRIDE = CHANNELS + 8;

// ---- pairs of neighbours ------------------------------------------------------------------------------------------------

template <class T> struct Pair;
template <> struct Pair<float> {
    float2 v;
    __device__ __forceinline__ float2 unpack() const { return v; }
};
template <> struct Pair<bf16> {
    unsigned word;
    __device__ __forceinline__ float2 unpack() const { return make_float2(low_bf16(word), high_bf16(word)); }
};

__device__ __forceinline__ Pair<float> make_pair(float lo, float hi, float) { return Pair<float>{make_float2(lo, hi)}; }
__device__ __forceinline__ Pair<bf16> make_pair(bf16 lo, bf16 hi, bf16) {
    return Pair<bf16>{(unsigned)lo.bits | (unsigned)hi.bits << 16};
}

// Two neighbours of which the first `width` are there (0, 1 or 2), zeros for the others; a pair that is aligned is whole or absent.
template <bool ALIGNED, class T> __device__ __forceinline__ Pair<T> load_pair(const T* p, int width) {
    if constexpr (ALIGNED) {
        return width > 0 ? *reinterpret_cast<const Pair<T>*>(p) : make_pair(T{}, T{}, T{});
    } else {
        return make_pair(width > 0 ? p[0] : T{}, width > 1 ? p[1] : T{}, T{});
    }
}

template <bool ALIGNED, class T> __device__ __forceinline__ void store_pair(T* p, int width, float2 v) {
    if constexpr (ALIGNED) {
        float pair[2] = {v.x, v.y};
        if (width > 0) store_vec<2>(p, pair);
    } else {
        if (width > 0) p[0] = from_f32<T>(v.x);
        if (width > 1) p[1] = from_f32<T>(v.y);
    }
}

// Two neighbours of a parameter, zeros for null.
__device__ __forceinline__ float2 load_parameters(const float* p, int at, int width) {
    return p ? load_pair<false>(p + at, width).unpack() : make_float2(0.f, 0.f);
}

__device__ __forceinline__ void store_pair_f32(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }

// ---- states of a tile of tokens -----------------------------------------------------------------------------------------

// One slice of B or C for a tile of tokens, on its way from memory to shared memory.
template <class T, int TOKENS> struct StateTile {
    static constexpr int N_PAIRS = TOKENS * SLICE / 2;
    static constexpr int PER_THREAD = (N_PAIRS + THREADS - 1) / THREADS;
    Pair<T> pairs[PER_THREAD];

    // `row` is state 0 of the first token; tokens from `n_tokens` on are zero.
    __device__ __forceinline__ void load(const T* row, i64 token_stride, int n_tokens, int slice, int d_state) {
        int t = thread_of_team() / (SLICE / 2), n = slice * SLICE + threadIdx.x % (SLICE / 2) * 2;
        const T* p = row + t * token_stride + n;
        #pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            pairs[k] = load_pair<PAIRED_STATES>(p, t < min(n_tokens, TOKENS) ? d_state - n : 0);
            t += THREADS / (SLICE / 2);
            p += THREADS / (SLICE / 2) * token_stride;
        }
    }

    __device__ __forceinline__ void store(float* shared) const {
        #pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            int i = thread_of_team() + k * THREADS;
            if (i < N_PAIRS) store_pair_f32(shared + 2 * i, pairs[k].unpack());
        }
    }
};

// Four states of a channel.
struct States {
    float v[4];
};

// States n .. n + 4 of channel e of `[d_inner, d_state]`, zeros outside and for null.
__device__ __forceinline__ States load_states(const float* p, int e, int n, int d_inner, int d_state) {
    States s;
    #pragma unroll
    for (int i = 0; i < 4; i++) s.v[i] = p && e < d_inner && n + i < d_state ? p[(i64)e * d_state + n + i] : 0.f;
    return s;
}

__device__ __forceinline__ void store_states(float* p, int e, int n, int d_inner, int d_state, const States& s) {
    #pragma unroll
    for (int i = 0; i < 4; i++)
        if (e < d_inner && n + i < d_state) p[(i64)e * d_state + n + i] = s.v[i];
}

__device__ __forceinline__ States to_states(float4 v) { return States{{v.x, v.y, v.z, v.w}}; }
__device__ __forceinline__ float4 to_float4(const States& s) { return make_float4(s.v[0], s.v[1], s.v[2], s.v[3]); }

// Of four values a lane the sums over the four lanes of a channel; the lane of state group g keeps value g.
__device__ __forceinline__ float sum_over_states(const float (&v)[4]) {
    int lane = threadIdx.x % 32;
    bool high = lane & 16, odd = lane & 8;
    float first = (high ? v[2] : v[0]) + __shfl_xor_sync(FULL_WARP, high ? v[0] : v[2], 16);
    float second = (high ? v[3] : v[1]) + __shfl_xor_sync(FULL_WARP, high ? v[1] : v[3], 16);
    return (odd ? second : first) + __shfl_xor_sync(FULL_WARP, odd ? first : second, 8);
}

// ---- functions of the formula -------------------------------------------------------------------------------------------

// ln(1 + u) for u in [0, 1], as 2 artanh(u / (2 + u)) by a polynomial: 2 ulp, also for tiny u.
__device__ __forceinline__ float log1p_unit(float u) {
    float t = u * rcp(2.f + u), s = t * t;
    float p = fmaf(s, 0.28174657f, 0.27961419f);
    p = fmaf(s, p, 0.40024854f);
    p = fmaf(s, p, 0.66666316f);
    p = fmaf(s, p, 2.f);
    return t * p;
}

// The step size made from `v`.
__device__ __forceinline__ float step_size(float v) {
    if (!SOFTPLUS) return v;
    return fmaxf(v, 0.f) + log1p_unit(ex2(-fabsf(v) * LOG2_E));
}

// Its derivative.
__device__ __forceinline__ float step_slope(float v) {
    if (!SOFTPLUS) return 1.f;
    float u = ex2(-fabsf(v) * LOG2_E), r = rcp(1.f + u);
    return v >= 0.f ? r : u * r;
}

// silu, and its derivative.
__device__ __forceinline__ float gate(float z) { return z * rcp(1.f + ex2(-z * LOG2_E)); }

__device__ __forceinline__ float gate_slope(float z) {
    float s = rcp(1.f + ex2(-z * LOG2_E));
    return s * fmaf(z, 1.f - s, 1.f);
}
