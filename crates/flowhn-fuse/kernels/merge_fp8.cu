// What the branches' last sublayers add, the merge of the branches, and its rounding to fp8 in order and transposed, in one pass.
//
//   y[b, p] = branch_k[b, j] + change_k[b, j]  rounded to bf16, then to fp8      y_t = y^T      largest = max(largest, max |y|)
//
//   branch_k, change_k  [batch, n_k, d], bf16, last axis dense; d a multiple of 16
//   y  [n_padded, d] of rows (b, p), y_t  [d, n_padded], E4M3           slot  as in fp8_cast.cu
//
// Route 0 has the tokens start0 .. start0 + n0 of a sequence and route 1 all others. The bits are those of merge_sums (tokens.cu) and
// fp8_cast one after the other; a block takes a tile of 128 x 128 as there (fp8_tile.cuh).
//
// Variants: FORMAT 0.
#include "fp8_tile.cuh"
#include "rows.cuh"

#if __CUDA_ARCH__ >= 890
extern "C" __global__ void __launch_bounds__(THREADS) merge_sums_fp8(
    const bf16* __restrict__ branch0, const bf16* __restrict__ branch1, const bf16* __restrict__ change0, const bf16* __restrict__ change1,
    i64 branch0_batch, i64 branch0_token, i64 branch1_batch, i64 branch1_token, i64 change0_batch, i64 change0_token, i64 change1_batch,
    i64 change1_token, int start0, int n0, int seq_len, unsigned char* __restrict__ y, unsigned char* __restrict__ y_t,
    float* __restrict__ slot, int n_rows, int n_padded, int d) {
    __shared__ uint4 tile[TILE * TILE / 16];
    int first_row = blockIdx.y * TILE, first_col = blockIdx.x * TILE, col = first_col + tile_col();
    Fp8Matrix to{y, y_t, n_padded, d, d};
    Pack<bf16> sums[PASSES][4], changes[PASSES][4];
    #pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = first_row + 4 * tile_group(pass) + i, b = (unsigned)row / (unsigned)seq_len, p = row - b * seq_len;
            bool in_first = p >= start0 && p < start0 + n0;
            int j = in_first ? p - start0 : p < start0 ? p : p - n0;
            sums[pass][i] = changes[pass][i] = Pack<bf16>{};
            if (col < d && row < n_rows) {
                RowStrides branch = in_first ? RowStrides{branch0_batch, branch0_token} : RowStrides{branch1_batch, branch1_token};
                RowStrides change = in_first ? RowStrides{change0_batch, change0_token} : RowStrides{change1_batch, change1_token};
                sums[pass][i].load((in_first ? branch0 : branch1) + branch.start(b, j) + col);
                changes[pass][i].load((in_first ? change0 : change1) + change.start(b, j) + col);
            }
        }
    }
    float scale = slot[1], most = 0.f;
    #pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        uint4 rows[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float s[VEC], c[VEC];
            sums[pass][i].get(s), changes[pass][i].get(c);
            #pragma unroll
            for (int k = 0; k < VEC; k++) s[k] += c[k];
            sums[pass][i].set(s);
            rows[i] = sums[pass][i].words;
        }
        put_rows(reinterpret_cast<unsigned*>(tile), to, first_row, first_col, pass, rows, scale, most);
    }
    note_largest(slot, most);
    put_columns(tile, to, first_row, first_col);
}
#endif
