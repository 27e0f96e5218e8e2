// A matrix rounded to fp8, in order and transposed, in one pass.
//
//   y = round(x scale)     y_t = y^T     largest = max(largest, max |x|)
//
//   x  [n_rows, n_cols], bf16, rows `row_stride` apart          slot  f32: inverse, scale, largest, held (fp8_scales.cu)
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
#include "flowhn.cuh"

#if __CUDA_ARCH__ >= 890
constexpr int TILE = 128, THREADS = 256, WARPS = THREADS / 32;

__device__ __forceinline__ unsigned pack_fp8(float a, float b, float c, float d) {
    if constexpr (FORMAT == 0) return pack_e4m3(a, b) | (unsigned)pack_e4m3(c, d) << 16;
    else return pack_e5m2(a, b) | (unsigned)pack_e5m2(c, d) << 16;
}

// The word of shared memory that holds rows 4 group .. 4 group + 3 of a column.
__device__ __forceinline__ int word_at(int col, int group) { return col * (TILE / 4) + (((group / 4) ^ (col / 8 % 8)) * 4) + group % 4; }

// Of the words of 4 rows with 4 columns each, those of 4 columns with 4 rows each.
__device__ __forceinline__ void transpose_bytes(unsigned (&w)[4]) {
    unsigned a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
    unsigned c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
    w[0] = __byte_perm(a, b, 0x5410), w[1] = __byte_perm(a, b, 0x7632);
    w[2] = __byte_perm(c, d, 0x5410), w[3] = __byte_perm(c, d, 0x7632);
}

// Either of `y` and `y_t` may be null.
extern "C" __global__ void __launch_bounds__(THREADS) fp8_cast(
    const bf16* __restrict__ x, i64 row_stride, unsigned char* __restrict__ y, unsigned char* __restrict__ y_t,
    float* __restrict__ slot, int n_rows, int n_padded, int n_cols) {
    __shared__ uint4 tile_pieces[TILE * TILE / 16];
    __shared__ float largest[WARPS];
    unsigned* tile = reinterpret_cast<unsigned*>(tile_pieces);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int first_row = blockIdx.y * TILE, first_col = blockIdx.x * TILE;
    int col = warp % 2 * 64 + lane % 8 * 8, first_group = warp / 2 * 4 + lane / 8;
    bool has_col = first_col + col < n_cols;

    uint4 in[2][4];
    #pragma unroll
    for (int pass = 0; pass < 2; pass++) {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = first_row + 4 * (16 * pass + first_group) + i;
            in[pass][i] = make_uint4(0, 0, 0, 0);
            if (has_col && row < n_rows) in[pass][i] = *reinterpret_cast<const uint4*>(x + row * row_stride + first_col + col);
        }
    }
    const float infinite = __uint_as_float(0x7f800000);
    float scale = slot[1], most = 0.f;
    #pragma unroll
    for (int pass = 0; pass < 2; pass++) {
        unsigned left[4], right[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            unsigned w[4] = {in[pass][i].x, in[pass][i].y, in[pass][i].z, in[pass][i].w};
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
            int row = first_row + 4 * (16 * pass + first_group) + i;
            if (y && has_col && row < n_padded)
                *reinterpret_cast<uint2*>(y + (i64)row * n_cols + first_col + col) = make_uint2(left[i], right[i]);
        }
        transpose_bytes(left), transpose_bytes(right);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            tile[word_at(col + j, 16 * pass + first_group)] = left[j];
            tile[word_at(col + 4 + j, 16 * pass + first_group)] = right[j];
        }
    }
    most = warp_max(most);
    if (lane == 0) largest[warp] = most;
    __syncthreads();

    if (y_t) {
        #pragma unroll
        for (int pass = 0; pass < 4; pass++) {
            int c = 32 * pass + threadIdx.x / 8, piece = threadIdx.x % 8, row = first_row + 16 * piece;
            if (first_col + c < n_cols && row < n_padded)
                *reinterpret_cast<uint4*>(y_t + (i64)(first_col + c) * n_padded + row) =
                    tile_pieces[word_at(c, 4 * piece) / 4];
        }
    }
    if (threadIdx.x == 0) {
        for (int i = 1; i < WARPS; i++) most = fmaxf(most, largest[i]);
        atomicMax(reinterpret_cast<unsigned*>(slot + 2), __float_as_uint(most));
    }
}
#endif
