// What AdamW keeps of its means between two updates, which compute in f32 (`optim/state.rs` and `optim/blockwise.rs` are the same in
// plain Rust, bit for bit except for the payload of a NaN).
//
//   bf16  rounded up or down at random, so that the expectation is the value: a mean moves by a small share of itself in an update,
//         and rounding to the nearest would lose what is below half a unit in the last place, every time.
//   int8  codes of 8 bits, and an f32 factor for each BLOCK elements (Dettmers et al., "8-bit optimizers via block-wise quantization").
#pragma once
#include "flowhn.cuh"

// Elements that share a factor.
constexpr int BLOCK = 256;

// ---- bf16 -------------------------------------------------------------------------------------------------------------------

// A hash of 32 bits (Wellons' lowbias32).
__device__ __forceinline__ unsigned mix(unsigned x) {
    x ^= x >> 16, x *= 0x7feb352du;
    x ^= x >> 15, x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// The random bits of a parameter's elements in an update; m takes the low half, v the high one.
struct Noise {
    unsigned key, start;
    __device__ __forceinline__ unsigned at(int i) const { return mix(key ^ (start + (unsigned)i)); }
};

// One of the two bf16 around x, the upper one with the probability of x's place between them; `noise` is below 2^16.
__device__ __forceinline__ float round_at_random(float x, unsigned noise) {
    unsigned bits = __float_as_uint(x);
    bool finite = (bits & 0x7f800000u) != 0x7f800000u;
    return finite ? __uint_as_float((bits + noise) & 0xffff0000u) : x;
}

template <int N> __device__ __forceinline__ void store_means(float* m, float* v, const float (&ms)[N], const float (&vs)[N], const Noise&, int) {
    store_vec(m, ms), store_vec(v, vs);
}

template <int N> __device__ __forceinline__ void store_means(bf16* m, bf16* v, const float (&ms)[N], const float (&vs)[N], const Noise& noise, int i) {
    float mr[N], vr[N];
    #pragma unroll
    for (int k = 0; k < N; k++) {
        unsigned random = noise.at(i + k);
        mr[k] = round_at_random(ms[k], random & 0xffffu), vr[k] = round_at_random(vs[k], random >> 16);
    }
    store_vec(m, mr), store_vec(v, vr);
}

// ---- int8 -------------------------------------------------------------------------------------------------------------------

// Cells of numbers with equal leading bits, seven of them behind the point, from 2^-23 to 1; no cell has the middles of two pairs of levels.
constexpr int CELLS = 23 * 128 + 1, FIRST_CELL = (127 - 23) * 128;

// A map's numbers: `values` of the codes, ascending. Levels are those that are not negative, counted from 0 on. The lower eight bits of a
// cell are the level of its lower end; the rest are the lower 16 bits from which on its numbers have the next one, 2^16 where none has.
// Zeros pad it to a multiple of 16 bytes.
struct alignas(16) Maps {
    float signed_values[256], unsigned_values[256];
    unsigned signed_cells[CELLS], unsigned_cells[CELLS];
};

// The level nearest to x in 0..1, the last one for NaN.
__device__ __forceinline__ int nearest_level(float x, const unsigned* cells) {
    unsigned bits = __float_as_uint(x), cell = cells[min(max((int)(bits >> 16) - FIRST_CELL, 0), CELLS - 1)];
    return (int)(cell & 255) + ((bits & 0xffff) >= cell >> 8);
}

// The code of x where the largest magnitude of the block is 1 / `inverse`.
__device__ __forceinline__ unsigned signed_code(float x, float inverse, const Maps& maps) {
    int level = nearest_level(__fmul_rn(fabsf(x), inverse), maps.signed_cells);
    return x < 0.f ? 127 - min(level, 127) : 127 + level;
}

// As that, of x that is not negative. What is not 0 does not become 0: it divides.
__device__ __forceinline__ unsigned unsigned_code(float x, float inverse, const Maps& maps) {
    return max(nearest_level(__fmul_rn(x, inverse), maps.unsigned_cells), x > 0.f ? 1 : 0);
}

// The largest magnitude in a warp, NaN where there is one: as bits, it is above all others.
template <int A, int B> __device__ __forceinline__ float warp_absmax(const float (&x)[A][B]) {
    unsigned largest = 0;
    #pragma unroll
    for (int a = 0; a < A; a++) {
        #pragma unroll
        for (int b = 0; b < B; b++) largest = max(largest, __float_as_uint(x[a][b]) & 0x7fffffffu);
    }
    #pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(FULL_WARP, largest, offset));
    return __uint_as_float(largest);
}

// What multiplies a block to bring it into -1..1; 0 where there is nothing but zeros and what has no reciprocal.
__device__ __forceinline__ float inverse_of(float absmax) { return absmax < 1.17549435e-38f ? 0.f : __frcp_rn(absmax); }
