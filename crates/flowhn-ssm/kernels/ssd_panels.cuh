// Tiles of SSD in shared memory as Hopper's asynchronous products read them.
#pragma once
#include "ssd_tile.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int PANEL = CHUNK * 128;  // bytes of 64 rows of 64 columns

// Panels of 64 rows and 64 columns in shared memory, swizzled as the products read them.
struct Panels {
    unsigned base;

    __device__ __forceinline__ unsigned address(int row, int piece) const {
        return base + piece / 8 * PANEL + row * 128 + ((piece & 7) ^ (row & 7)) * 16;
    }
    // As an operand with k along its rows, from column 16 k on.
    __device__ __forceinline__ unsigned long long along(int k) const {
        return wgmma_operand(base + k / 4 * PANEL + k % 4 * 32, 16, 1024);
    }
    // As an operand with k from row to row, from row 16 k on.
    __device__ __forceinline__ unsigned long long across(int k) const { return wgmma_operand(base + k * 2048, PANEL, 1024); }
};

// Starts copying 64 rows, zeros past `n_rows` and `n_cols`.
template <int COLS, int THREADS>
__device__ __forceinline__ void load_panels(Panels panels, const bf16* src, i64 row_stride, int n_rows, int n_cols) {
    constexpr int PIECES = COLS / 8, STEP = THREADS / PIECES;
    int piece = threadIdx.x % PIECES, row = threadIdx.x / PIECES;
    // STEP is a multiple of 8, so that all rows of a thread have the same swizzle.
    unsigned to = panels.address(row, piece);
    const bf16* from = src + row * row_stride + piece * 8;
    bool inside = piece * 8 < n_cols;
    #pragma unroll 2
    for (int i = 0; i < CHUNK / STEP; i++) {
        bool valid = inside && row + i * STEP < n_rows;
        cp_async16(to + i * STEP * 128, valid ? from : src, valid);
        from += STEP * row_stride;
    }
}

#endif
