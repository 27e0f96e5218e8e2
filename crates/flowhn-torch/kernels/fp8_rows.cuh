// Rows that a kernel over rows (rows.cuh) computes in bf16, rounded to E4M3 in order and transposed where they are computed.
//
// A block takes FP8_ROWS neighbours. Bytes go out in order at once and wait in shared memory for the block's last row, from where columns
// go out in pieces of 16 rows, all pieces of a column by neighbours of a warp. 4 x 4 bytes are transposed in registers. Pieces are
// shifted against each other, so that the threads of a warp, each with a word of 4 columns, meet in no bank.
//
// Variants: FP8_ROWS, a multiple of 16.
#pragma once
#include "fp8.cuh"
#include "rows.cuh"
#include "smem.cuh"

#if __CUDA_ARCH__ >= 890
struct Fp8Rows {
    static constexpr int PIECES = FP8_ROWS / 16, SHIFT = 128 / PIECES;

    // [n_padded, stride] and [stride, n_padded]; of the columns this block has `d`, the first of which `in_order` and `transposed` point to.
    unsigned char *in_order, *transposed;
    float* slot;
    int first_row, n_rows, n_padded, stride, d;
    float scale, most;

    __device__ __forceinline__ Fp8Rows(unsigned char* in_order, unsigned char* transposed, float* slot, int first_row, int n_rows,
                                       int n_padded, int stride, int first_col, int d)
        : in_order(in_order + first_col), transposed(transposed + (i64)first_col * n_padded), slot(slot), first_row(first_row),
          n_rows(n_rows), n_padded(n_padded), stride(stride), d(d), scale(slot[1]), most(0.f) {}

    __device__ __forceinline__ int end() const { return min(n_rows, first_row + FP8_ROWS); }

    __device__ __forceinline__ char* place(int row, int col) const {
        int r = row - first_row;
        return shared_memory() + r * d + r / 16 * SHIFT + col;
    }

    // Eight neighbours of a row.
    __device__ __forceinline__ void put(const Pack<bf16>& values, int row, int col) {
        if (col >= d) return;
        uint2 bytes = round_to_fp8<0>(values.words, scale, most);
        *reinterpret_cast<uint2*>(in_order + (i64)row * stride + col) = bytes;
        *reinterpret_cast<uint2*>(place(row, col)) = bytes;
    }

    // When all rows are put: the rows that were added, and the columns.
    __device__ __forceinline__ void finish() {
        int last = min(n_padded, first_row + FP8_ROWS);
        for (int row = end(); row < last; row++) {
            for (int col = 8 * threadIdx.x; col < d; col += 8 * blockDim.x) put(Pack<bf16>{}, row, col);
        }
        // Its barrier lets columns see all rows.
        note_largest(slot, most);
        for (int i = threadIdx.x; i < d / 4 * PIECES; i += blockDim.x) {
            int piece = i % PIECES, col = i / PIECES * 4, row = first_row + 16 * piece;
            if (row >= n_padded) continue;
            unsigned w[4][4];
            #pragma unroll
            for (int group = 0; group < 4; group++) {
                #pragma unroll
                for (int j = 0; j < 4; j++) w[group][j] = *reinterpret_cast<const unsigned*>(place(row + 4 * group + j, col));
                transpose_bytes(w[group]);
            }
            #pragma unroll
            for (int j = 0; j < 4; j++)
                *reinterpret_cast<uint4*>(transposed + (i64)(col + j) * n_padded + row) = make_uint4(w[0][j], w[1][j], w[2][j], w[3][j]);
        }
    }
};
#endif
