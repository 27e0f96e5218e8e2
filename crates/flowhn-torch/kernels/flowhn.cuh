// What all kernels share: dtypes, vector loads, the functions of the formulas, reductions.
//
// Kernels are compiled by NVRTC without any include path, so nothing here needs a toolkit. All arithmetic is f32.
#pragma once
#include "ptx.cuh"

typedef long long i64;

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr unsigned FULL_WARP = 0xffffffffu;

// ---- dtypes -------------------------------------------------------------------------------------------------------------

struct bf16 {
    unsigned short bits;
};

__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float to_f32(float x) { return x; }
template <class T> __device__ __forceinline__ T from_f32(float x);
template <> __device__ __forceinline__ float from_f32<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_f32<bf16>(float x) { return bf16{bf16_bits(x)}; }

// The two bf16 values of a 32-bit word.
__device__ __forceinline__ float low_bf16(unsigned word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_bf16(unsigned word) { return __uint_as_float(word & 0xffff0000u); }

// The dtype that a host passes as a number: 0 f32, 1 bf16.
template <int KIND> struct DtypeOf;
template <> struct DtypeOf<0> { typedef float type; };
template <> struct DtypeOf<1> { typedef bf16 type; };

// ---- vectors ------------------------------------------------------------------------------------------------------------

// Reads N neighbours as f32 with the widest loads; `p` must be aligned to N elements (at most 16 bytes).
template <int N> __device__ __forceinline__ void load_vec(float (&out)[N], const float* p) {
    if constexpr (N % 4 == 0) {
        #pragma unroll
        for (int i = 0; i < N / 4; i++) {
            float4 v = reinterpret_cast<const float4*>(p)[i];
            out[4 * i] = v.x, out[4 * i + 1] = v.y, out[4 * i + 2] = v.z, out[4 * i + 3] = v.w;
        }
    } else {
        #pragma unroll
        for (int i = 0; i < N; i++) out[i] = p[i];
    }
}

template <int N> __device__ __forceinline__ void load_vec(float (&out)[N], const bf16* p) {
    if constexpr (N % 8 == 0) {
        #pragma unroll
        for (int i = 0; i < N / 8; i++) {
            uint4 v = reinterpret_cast<const uint4*>(p)[i];
            unsigned w[4] = {v.x, v.y, v.z, v.w};
            #pragma unroll
            for (int j = 0; j < 4; j++) out[8 * i + 2 * j] = low_bf16(w[j]), out[8 * i + 2 * j + 1] = high_bf16(w[j]);
        }
    } else if constexpr (N == 4) {
        uint2 v = *reinterpret_cast<const uint2*>(p);
        out[0] = low_bf16(v.x), out[1] = high_bf16(v.x), out[2] = low_bf16(v.y), out[3] = high_bf16(v.y);
    } else if constexpr (N == 2) {
        unsigned v = *reinterpret_cast<const unsigned*>(p);
        out[0] = low_bf16(v), out[1] = high_bf16(v);
    } else {
        #pragma unroll
        for (int i = 0; i < N; i++) out[i] = to_f32(p[i]);
    }
}

template <int N> __device__ __forceinline__ void store_vec(float* p, const float (&x)[N]) {
    if constexpr (N % 4 == 0) {
        #pragma unroll
        for (int i = 0; i < N / 4; i++)
            reinterpret_cast<float4*>(p)[i] = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
    } else {
        #pragma unroll
        for (int i = 0; i < N; i++) p[i] = x[i];
    }
}

template <int N> __device__ __forceinline__ void store_vec(bf16* p, const float (&x)[N]) {
    if constexpr (N % 8 == 0) {
        #pragma unroll
        for (int i = 0; i < N / 8; i++)
            reinterpret_cast<uint4*>(p)[i] = make_uint4(pack_bf16(x[8 * i], x[8 * i + 1]), pack_bf16(x[8 * i + 2], x[8 * i + 3]),
                                                        pack_bf16(x[8 * i + 4], x[8 * i + 5]), pack_bf16(x[8 * i + 6], x[8 * i + 7]));
    } else if constexpr (N == 4) {
        *reinterpret_cast<uint2*>(p) = make_uint2(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]));
    } else if constexpr (N == 2) {
        *reinterpret_cast<unsigned*>(p) = pack_bf16(x[0], x[1]);
    } else {
        #pragma unroll
        for (int i = 0; i < N; i++) p[i] = from_f32<bf16>(x[i]);
    }
}

// ---- functions ----------------------------------------------------------------------------------------------------------

// e^x with the relative error of expf, also for large |x|.
__device__ __forceinline__ float exp_f32(float x) { return expf(x); }

// 1 / (1 + e^-x)
__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// The same for a gate whose product is rounded to X: beside bf16 by the approximate instructions, whose error of a few f32 roundings is lost.
template <class X> __device__ __forceinline__ float gate_sigmoid(float x);
template <> __device__ __forceinline__ float gate_sigmoid<float>(float x) { return sigmoid(x); }
template <> __device__ __forceinline__ float gate_sigmoid<bf16>(float x) { return rcp(1.f + ex2(-LOG2_E * x)); }

// silu(gate) up, to be rounded to X, and the gradients of gate (x) and of up (y) from its own.
template <class X> __device__ __forceinline__ float swiglu(float gate, float up) { return up * (gate * gate_sigmoid<X>(gate)); }
template <class X> __device__ __forceinline__ float2 swiglu_grad(float gate, float up, float dh) {
    float s = gate_sigmoid<X>(gate);
    return make_float2(dh * up * (s * (1.f + gate * (1.f - s))), dh * (gate * s));
}

__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }

// The derivative of silu.
__device__ __forceinline__ float silu_grad(float x) {
    float s = sigmoid(x);
    return s * (1.f + x * (1.f - s));
}

// ln(1 + e^x) without overflow, exact to f32 for every x.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }

// ---- reductions ---------------------------------------------------------------------------------------------------------

// The sum over the lanes of a warp, on every lane, in a fixed order.
__device__ __forceinline__ float warp_sum(float x) {
    #pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
    #pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}
