// A tile of 128 x 128 bf16 values rounded to fp8, in order and transposed, by 256 threads (fp8_cast.cu tells how).
//
// Variants: FORMAT 0 E4M3, 1 E5M2.
#pragma once
#include "fp8.cuh"

#if __CUDA_ARCH__ >= 890
constexpr int TILE = 128, THREADS = 256, PASSES = 2;

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

// Rounds the thread's 4 rows of a pass, stores them in order and leaves their columns in shared memory; raises `most` to the largest value.
__device__ __forceinline__ void put_rows(unsigned* tile, const Fp8Matrix& to, int first_row, int first_col, int pass, const uint4 (&rows)[4],
                                         float scale, float& most) {
    int col = tile_col(), group = tile_group(pass);
    unsigned left[4], right[4];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        uint2 bytes = round_to_fp8<FORMAT>(rows[i], scale, most);
        left[i] = bytes.x, right[i] = bytes.y;
        int row = first_row + 4 * group + i;
        if (to.in_order && first_col + col < to.n_cols && row < to.n_padded)
            *reinterpret_cast<uint2*>(to.in_order + (i64)row * to.stride + first_col + col) = bytes;
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
#endif
