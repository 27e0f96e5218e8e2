// A matrix rounded to fp8, in order and transposed, in one pass.
//
//   y = round(x scale)     y_t = y^T     largest = max(largest, max |x|)
//
//   x  [outer, inner, n_cols], bf16, last axis dense            slot  f32: inverse, scale, largest, held (fp8_scales.cu)
//   y  [n_padded, n_cols], y_t  [n_cols, n_padded], fp8         n_cols, n_padded  multiples of 16
//
// Rounding is to nearest even; what is finite and too large becomes the largest number; what is infinite becomes NaN. Rows past the last
// of x are zeros. The scale is a power of two, so scaling rounds nothing. What is not a number does not count for the largest value.
//
// Products in fp8 take both factors with their common axis innermost, so a matrix that two products contract along different axes is
// needed in both orders. A block takes a tile of 128 x 128: a thread reads 8 neighbours in each of 4 rows, twice, rounds them, stores
// them in order, transposes 4 x 4 bytes in its registers and puts words of 4 rows into shared memory, from where columns go out in
// pieces of 16 rows. x is read once, all of a thread's loads are under way at once, and shared memory is swizzled so that neither side
// meets in a bank. The largest |x| is that of bits of non-negative floats, which order as integers do: no order of the blocks shows.
//
// Variants: FORMAT 0 E4M3, 1 E5M2.
#include "fp8_tile.cuh"

#if __CUDA_ARCH__ >= 890
// Either of `y` and `y_t` may be null.
extern "C" __global__ void __launch_bounds__(THREADS) fp8_cast(
    const bf16* __restrict__ x, i64 outer_stride, i64 inner_stride, int inner, unsigned char* __restrict__ y, unsigned char* __restrict__ y_t,
    float* __restrict__ slot, int n_rows, int n_padded, int n_cols) {
    __shared__ uint4 tile[TILE * TILE / 16];
    int first_row = blockIdx.y * TILE, first_col = blockIdx.x * TILE, col = first_col + tile_col();
    Fp8Matrix to{y, y_t, n_padded, n_cols, n_cols};
    uint4 rows[PASSES][4];
    #pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = first_row + 4 * tile_group(pass) + i;
            rows[pass][i] = make_uint4(0, 0, 0, 0);
            int outer_idx = (unsigned)row / (unsigned)inner, inner_idx = row - outer_idx * inner;
            const bf16* from = x + outer_idx * outer_stride + inner_idx * inner_stride + col;
            if (col < n_cols && row < n_rows) rows[pass][i] = *reinterpret_cast<const uint4*>(from);
        }
    }
    float scale = slot[1], most = 0.f;
    #pragma unroll
    for (int pass = 0; pass < PASSES; pass++) put_rows(reinterpret_cast<unsigned*>(tile), to, first_row, first_col, pass, rows[pass], scale, most);
    note_largest(slot, most);
    put_columns(tile, to, first_row, first_col);
}
#endif
