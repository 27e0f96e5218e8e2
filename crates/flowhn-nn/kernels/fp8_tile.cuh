// A tile of 128 x 128 bf16 values rounded to fp8, in order and transposed, by 256 threads (fp8_cast.cu tells how).
//
// Variants: FORMAT 0 E4M3, 1 E5M2.
#pragma once
#include "flowhn.cuh"

#if __CUDA_ARCH__ >= 890
constexpr int TILE = 128, THREADS = 256, WARPS = THREADS / 32, PASSES = 2;

// A matrix `[n_padded, n_cols]` in order, rows `stride` bytes apart, and transposed, rows `n_padded` bytes apart; either may be null.
struct Fp8Matrix {
    unsigned char *in_order, *transposed;
    int n_padded, n_cols, stride;
};

// What a thread has of a tile: 8 columns, and in each pass 4 rows.
__device__ __forceinline__ int tile_col() { return threadIdx.x / 32 % 2 * 64 + threadIdx.x % 8 * 8; }
__device__ __forceinline__ int tile_group(int pass) { return 16 * pass + threadIdx.x / 64 * 4 + threadIdx.x / 8 % 4; }

// The word of shared memory that holds rows 4 group .. 4 group + 3 of a column.
__device__ __forceinline__ int word_at(int col, int group) { return col * (TILE / 4) + (((group / 4) ^ (col / 8 % 8)) * 4) + group % 4; }

__device__ __forceinline__ unsigned pack_fp8(float a, float b, float c, float d) {
    if constexpr (FORMAT == 0) return pack_e4m3(a, b) | (unsigned)pack_e4m3(c, d) << 16;
    else return pack_e5m2(a, b) | (unsigned)pack_e5m2(c, d) << 16;
}

// Of the words of 4 rows with 4 columns each, those of 4 columns with 4 rows each.
__device__ __forceinline__ void transpose_bytes(unsigned (&w)[4]) {
    unsigned a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
    unsigned c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
    w[0] = __byte_perm(a, b, 0x5410), w[1] = __byte_perm(a, b, 0x7632);
    w[2] = __byte_perm(c, d, 0x5410), w[3] = __byte_perm(c, d, 0x7632);
}

// Rounds the thread's 4 rows of a pass, stores them in order and leaves their columns in shared memory; raises `most` to the largest value.
__device__ __forceinline__ void put_rows(unsigned* tile, const Fp8Matrix& to, int first_row, int first_col, int pass, const uint4 (&rows)[4],
                                         float scale, float& most) {
    const float infinite = __uint_as_float(0x7f800000);
    int col = tile_col(), group = tile_group(pass);
    unsigned left[4], right[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        unsigned w[4] = {rows[i].x, rows[i].y, rows[i].z, rows[i].w};
        float v[8], row_most = 0.f;
        #pragma unroll
        for (int j = 0; j < 4; j++) v[2 * j] = low_bf16(w[j]), v[2 * j + 1] = high_bf16(w[j]);
        #pragma unroll
        for (int j = 0; j < 8; j++) row_most = fmaxf(row_most, fabsf(v[j]));
        most = fmaxf(most, row_most);
        if (row_most == infinite) {
            #pragma unroll
            for (int j = 0; j < 8; j++) v[j] = fabsf(v[j]) == infinite ? __uint_as_float(0x7fffffff) : v[j];
        }
        #pragma unroll
        for (int j = 0; j < 8; j++) v[j] *= scale;
        left[i] = pack_fp8(v[0], v[1], v[2], v[3]), right[i] = pack_fp8(v[4], v[5], v[6], v[7]);
        int row = first_row + 4 * group + i;
        if (to.in_order && first_col + col < to.n_cols && row < to.n_padded)
            *reinterpret_cast<uint2*>(to.in_order + (i64)row * to.stride + first_col + col) = make_uint2(left[i], right[i]);
    }
    transpose_bytes(left), transpose_bytes(right);
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        tile[word_at(col + j, group)] = left[j];
        tile[word_at(col + 4 + j, group)] = right[j];
    }
}

// Stores the columns of a tile; a barrier goes before. A thread has pieces of 16 rows.
__device__ __forceinline__ void put_columns(const uint4* tile, const Fp8Matrix& to, int first_row, int first_col) {
    if (!to.transposed) return;
    #pragma unroll
    for (int pass = 0; pass < TILE * TILE / 16 / THREADS; pass++) {
        int col = 32 * pass + threadIdx.x / 8, piece = threadIdx.x % 8, row = first_row + 16 * piece;
        if (first_col + col < to.n_cols && row < to.n_padded)
            *reinterpret_cast<uint4*>(to.transposed + (i64)(first_col + col) * to.n_padded + row) = tile[word_at(col, 4 * piece) / 4];
    }
}

// Raises the largest value that a slot has seen to that of the block. Bits of non-negative floats order as integers do.
__device__ __forceinline__ void note_largest(float* slot, float most) {
    __shared__ float of_warps[WARPS];
    most = warp_max(most);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < WARPS; i++) most = fmaxf(most, of_warps[i]);
        atomicMax(reinterpret_cast<unsigned*>(slot + 2), __float_as_uint(most));
    }
}
#endif
