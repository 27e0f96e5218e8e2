// bf16 values rounded to 8-bit floats with a scale.
//
// Rounding is to nearest even; what is finite and too large becomes the largest number; what is infinite becomes NaN. The scale is a power
// of two, so scaling rounds nothing. What is not a number does not count for the largest value.
//
// KIND: 0 E4M3, 1 E5M2.
#pragma once
#include "flowhn.cuh"

#if __CUDA_ARCH__ >= 890
template <int KIND> __device__ __forceinline__ unsigned pack_fp8(float a, float b, float c, float d) {
    if constexpr (KIND == 0) return pack_e4m3(a, b) | (unsigned)pack_e4m3(c, d) << 16;
    else return pack_e5m2(a, b) | (unsigned)pack_e5m2(c, d) << 16;
}

// Rounds 8 neighbours and raises `most` to the largest of their absolute values.
template <int KIND> __device__ __forceinline__ uint2 round_to_fp8(const uint4& values, float scale, float& most) {
    const float infinite = __uint_as_float(0x7f800000);
    unsigned w[4] = {values.x, values.y, values.z, values.w};
    float v[8], here = 0.f;
    #pragma unroll
    for (int j = 0; j < 4; j++) v[2 * j] = low_bf16(w[j]), v[2 * j + 1] = high_bf16(w[j]);
    #pragma unroll
    for (int j = 0; j < 8; j++) here = fmaxf(here, fabsf(v[j]));
    most = fmaxf(most, here);
    if (here == infinite) {
        #pragma unroll
        for (int j = 0; j < 8; j++) v[j] = fabsf(v[j]) == infinite ? __uint_as_float(0x7fffffff) : v[j];
    }
    #pragma unroll
    for (int j = 0; j < 8; j++) v[j] *= scale;
    return make_uint2(pack_fp8<KIND>(v[0], v[1], v[2], v[3]), pack_fp8<KIND>(v[4], v[5], v[6], v[7]));
}

// Of the words of 4 rows with 4 columns each, those of 4 columns with 4 rows each.
__device__ __forceinline__ void transpose_bytes(unsigned (&w)[4]) {
    unsigned a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
    unsigned c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
    w[0] = __byte_perm(a, b, 0x5410), w[1] = __byte_perm(a, b, 0x7632);
    w[2] = __byte_perm(c, d, 0x5410), w[3] = __byte_perm(c, d, 0x7632);
}

// Raises the largest value that a slot has seen to that of the block, of whole warps, which passes a barrier here. Bits of non-negative
// floats order as integers do.
__device__ __forceinline__ void note_largest(float* slot, float most) {
    __shared__ float of_warps[32];
    most = warp_max(most);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < blockDim.x / 32; i++) most = fmaxf(most, of_warps[i]);
        atomicMax(reinterpret_cast<unsigned*>(slot + 2), __float_as_uint(most));
    }
}
#endif
