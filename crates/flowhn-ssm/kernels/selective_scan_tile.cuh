// What the kernels of the selective scan share: the shape of a block, loads of neighbouring channels and of states, and the
// functions of the formula.
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
// Whether all addresses of four channels, or of four states, are aligned to the four.
#ifndef ALIGNED_CHANNELS
#define ALIGNED_CHANNELS 1
#endif
#ifndef ALIGNED_STATES
#define ALIGNED_STATES 1
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
// Threads take four neighbouring channels where they work element by element: 16 tokens at a time.
constexpr int QUADS = CHANNELS / 4;
constexpr int ROWS = THREADS / QUADS;
// Rows of sums in shared memory are padded, so that 4 tokens times 8 channels fall into 32 banks.
constexpr int SUM_STRIDE = CHANNELS + 8;

// ---- neighbours ---------------------------------------------------------------------------------------------------------

// Four neighbours in f32.
struct Four {
    float v[4];
};

// Four neighbours as they stand in memory, so that they take few registers while they are on their way.
template <class T> struct Quad;
template <> struct Quad<float> {
    float4 v;
    __device__ __forceinline__ Four unpack() const { return Four{{v.x, v.y, v.z, v.w}}; }
};
template <> struct Quad<bf16> {
    uint2 v;
    __device__ __forceinline__ Four unpack() const {
        return Four{{low_bf16(v.x), high_bf16(v.x), low_bf16(v.y), high_bf16(v.y)}};
    }
};

__device__ __forceinline__ Quad<float> make_quad(const float (&e)[4]) { return {make_float4(e[0], e[1], e[2], e[3])}; }
__device__ __forceinline__ Quad<bf16> make_quad(const bf16 (&e)[4]) {
    return {uint2{(unsigned)e[0].bits | (unsigned)e[1].bits << 16, (unsigned)e[2].bits | (unsigned)e[3].bits << 16}};
}

// Four neighbours of which the first `width` are there (at most 4; none if below 1), zeros for the others. Aligned ones are all
// there or all absent.
template <bool ALIGNED, class T> __device__ __forceinline__ Quad<T> load_quad(const T* p, int width) {
    if constexpr (ALIGNED) {
        T zeros[4] = {};
        return width > 0 ? *reinterpret_cast<const Quad<T>*>(p) : make_quad(zeros);
    } else {
        T e[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) e[i] = i < width ? p[i] : T{};
        return make_quad(e);
    }
}

template <bool ALIGNED, class T> __device__ __forceinline__ void store_quad(T* p, int width, const Four& x) {
    if constexpr (ALIGNED) {
        if (width > 0) store_vec<4>(p, x.v);
    } else {
        #pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < width) p[i] = from_f32<T>(x.v[i]);
    }
}

// Four neighbours of a parameter, zeros for null.
__device__ __forceinline__ Four load_parameters(const float* p, int at, int width) {
    return p ? load_quad<false>(p + at, width).unpack() : Four{{0.f, 0.f, 0.f, 0.f}};
}

__device__ __forceinline__ Four to_four(float4 v) { return Four{{v.x, v.y, v.z, v.w}}; }
__device__ __forceinline__ float4 to_float4(const Four& s) { return make_float4(s.v[0], s.v[1], s.v[2], s.v[3]); }
__device__ __forceinline__ void store_float2(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }

// Four pairs side by side in shared memory: step sizes with what else belongs to a channel and token.
__device__ __forceinline__ void store_pairs(float2* p, const Four& first, const Four& second) {
    reinterpret_cast<float4*>(p)[0] = make_float4(first.v[0], second.v[0], first.v[1], second.v[1]);
    reinterpret_cast<float4*>(p)[1] = make_float4(first.v[2], second.v[2], first.v[3], second.v[3]);
}

// ---- states of a tile of tokens -----------------------------------------------------------------------------------------

// One slice of B or C for a tile of tokens, on its way from memory to shared memory.
template <class T, int TOKENS> struct StateTile {
    static constexpr int N_QUADS = TOKENS * SLICE / 4;
    static constexpr int PER_THREAD = (N_QUADS + THREADS - 1) / THREADS;
    Quad<T> quads[PER_THREAD];

    // `row` is state 0 of the first token; tokens from `n_tokens` on are zero.
    __device__ __forceinline__ void load(const T* row, i64 token_stride, int n_tokens, int slice, int d_state) {
        int t = threadIdx.x / (SLICE / 4), n = slice * SLICE + threadIdx.x % (SLICE / 4) * 4;
        const T* p = row + t * token_stride + n;
        #pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            quads[k] = load_quad<ALIGNED_STATES>(p, t < min(n_tokens, TOKENS) ? d_state - n : 0);
            t += THREADS / (SLICE / 4);
            p += THREADS / (SLICE / 4) * token_stride;
        }
    }

    __device__ __forceinline__ void store(float* shared) const {
        #pragma unroll
        for (int k = 0; k < PER_THREAD; k++) {
            int i = threadIdx.x + k * THREADS;
            if (N_QUADS % THREADS == 0 || i < N_QUADS) reinterpret_cast<float4*>(shared)[i] = to_float4(quads[k].unpack());
        }
    }
};

// States n .. n + 4 of channel e of `[d_inner, d_state]`, zeros outside and for null.
__device__ __forceinline__ Four load_states(const float* p, int e, int n, int d_inner, int d_state) {
    Four s;
    #pragma unroll
    for (int i = 0; i < 4; i++) s.v[i] = p && e < d_inner && n + i < d_state ? p[(i64)e * d_state + n + i] : 0.f;
    return s;
}

__device__ __forceinline__ void store_states(float* p, int e, int n, int d_inner, int d_state, const Four& s) {
    #pragma unroll
    for (int i = 0; i < 4; i++)
        if (e < d_inner && n + i < d_state) p[(i64)e * d_state + n + i] = s.v[i];
}

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

// The step sizes of four channels; 0 for tokens that are not there, which then leave states alone.
__device__ __forceinline__ Four step_sizes(const Four& v, const Four& bias, bool there) {
    constexpr float NOTHING = SOFTPLUS ? -1e30f : 0.f;
    Four steps;
    #pragma unroll
    for (int i = 0; i < 4; i++) steps.v[i] = step_size(there ? v.v[i] + bias.v[i] : NOTHING);
    return steps;
}

// The derivative of a step size.
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
