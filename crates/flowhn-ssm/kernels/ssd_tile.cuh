// What the SSD kernels share: chunks of 64 tokens, tiles in shared memory, fragments of the tensor cores.
#pragma once
#include "flowhn.cuh"
#include "smem.cuh"

constexpr int CHUNK = 64;

// One head's steps in a chunk, as ssd_steps.cu writes them.
struct Steps {
    float dt[CHUNK];          // step sizes, 0 past the end
    float s[CHUNK];           // running sums of dt a log2(e), from 0 at every reset
    float from_start[CHUNK];  // 2^(s_i), what of the state before the chunk is left at token i; 0 after a reset
    unsigned to_end[CHUNK / 2];  // dt_j 2^(s_end - s_j), what token j weighs in the state after the chunk: pairs of bf16; 0 before a reset
    // Token i sees the tokens from begin[i] on, token j is seen by those before end[j]: borders at resets.
    unsigned char begin[CHUNK], end[CHUNK];
};

// Where a step is cut off: 2^-160 is 0 in f32.
constexpr float MIN_STEP = -160.f;

// ---- tiles --------------------------------------------------------------------------------------------------------------

// Rows of COLS bf16 values in shared memory, 16 bytes apart from each other so that the 8 rows of a matrix lie in different banks.
template <int COLS> struct Tile {
    static constexpr int PITCH = COLS + 8;
    char* base;

    __device__ __forceinline__ unsigned address(int row, int col) const {
        return smem_address(base) + (unsigned)(row * PITCH + col) * 2;
    }
    // The values at `col` and `col + 1`.
    __device__ __forceinline__ unsigned pair(int row, int col) const {
        return *reinterpret_cast<const unsigned*>(base + (row * PITCH + col) * 2);
    }
    __device__ __forceinline__ void set_pair(int row, int col, unsigned bits) const {
        *reinterpret_cast<unsigned*>(base + (row * PITCH + col) * 2) = bits;
    }
    static constexpr int bytes(int rows) { return rows * PITCH * 2; }
};

// Fills ROWS rows from `src`, zeros past `n_rows` and `n_cols`. ALIGN: rows begin at 16 bytes and n_cols is a multiple of 8.
template <int ROWS, int COLS, int THREADS, bool ALIGN>
__device__ __forceinline__ void load_tile(Tile<COLS> tile, const bf16* src, i64 row_stride, int n_rows, int n_cols) {
    constexpr int VECTORS = COLS / 8;
    #pragma unroll
    for (int i = threadIdx.x; i < ROWS * VECTORS; i += THREADS) {
        int row = i / VECTORS, col = i % VECTORS * 8;
        if constexpr (ALIGN) {
            bool valid = row < n_rows && col < n_cols;
            cp_async16(tile.address(row, col), src + (valid ? row * row_stride + col : 0), valid);
        } else {
            for (int k = 0; k < 8; k += 2) {
                bool first = row < n_rows && col + k < n_cols, second = row < n_rows && col + k + 1 < n_cols;
                unsigned lo = first ? src[row * row_stride + col + k].bits : 0;
                unsigned hi = second ? src[row * row_stride + col + k + 1].bits : 0;
                tile.set_pair(row, col + k, lo | hi << 16);
            }
        }
    }
}

// Writes the first `n_rows` rows and `n_cols` columns of a tile to rows without gaps.
template <int ROWS, int COLS, int THREADS, bool ALIGN>
__device__ __forceinline__ void store_tile(bf16* out, Tile<COLS> tile, int n_rows, int n_cols) {
    constexpr int WIDTH = ALIGN ? 8 : 1;
    #pragma unroll
    for (int i = threadIdx.x; i < ROWS * COLS / WIDTH; i += THREADS) {
        int row = i / (COLS / WIDTH), col = i % (COLS / WIDTH) * WIDTH;
        if (row >= n_rows || col >= n_cols) continue;
        const char* src = tile.base + (row * Tile<COLS>::PITCH + col) * 2;
        if constexpr (ALIGN) *reinterpret_cast<uint4*>(out + row * n_cols + col) = *reinterpret_cast<const uint4*>(src);
        else out[row * n_cols + col] = *reinterpret_cast<const bf16*>(src);
    }
}

// Starts the copy of one head's steps, by the first 64 threads.
__device__ __forceinline__ void load_steps(const Steps* out, const Steps* src) {
    int i = threadIdx.x;
    if (i < sizeof(Steps) / 16) cp_async16(smem_address(out) + i * 16, reinterpret_cast<const char*>(src) + i * 16);
}

// ---- fragments ----------------------------------------------------------------------------------------------------------
// In a result of 16 x 8, lane 4 g + t holds columns 2 t and 2 t + 1 of row g, then of row g + 8.

// A 16 x 16 operand on the left; the tile has its rows.
template <int COLS> __device__ __forceinline__ void load_a(unsigned (&a)[4], Tile<COLS> tile, int row, int col) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4(a, tile.address(row + (lane & 15), col + (lane >> 4) * 8));
}

// The same from a tile that has its columns as rows.
template <int COLS> __device__ __forceinline__ void load_a_trans(unsigned (&a)[4], Tile<COLS> tile, int row, int col) {
    int lane = threadIdx.x & 31, matrix = lane >> 3;
    ldmatrix_x4_trans(a, tile.address(col + (lane & 7) + (matrix >> 1) * 8, row + (matrix & 1) * 8));
}

// A 16 x 16 operand on the right as two of 16 x 8; the tile has its columns as rows.
template <int COLS>
__device__ __forceinline__ void load_b(unsigned (&b)[2][2], Tile<COLS> tile, int row, int col) {
    int lane = threadIdx.x & 31, matrix = lane >> 3;
    unsigned r[4];
    ldmatrix_x4(r, tile.address(col + (matrix >> 1) * 8 + (lane & 7), row + (matrix & 1) * 8));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

// The same from a tile that has its rows.
template <int COLS>
__device__ __forceinline__ void load_b_trans(unsigned (&b)[2][2], Tile<COLS> tile, int row, int col) {
    int lane = threadIdx.x & 31, matrix = lane >> 3;
    unsigned r[4];
    ldmatrix_x4_trans(r, tile.address(row + (matrix & 1) * 8 + (lane & 7), col + (matrix >> 1) * 8));
    b[0][0] = r[0], b[0][1] = r[1], b[1][0] = r[2], b[1][1] = r[3];
}

__device__ __forceinline__ void add_product(float (&acc)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    mma_bf16(acc, a, b, acc);
}

// A left operand with its columns times `early` and, from column 8 on, `late`: this lane's pairs of 16 bf16 weights.
__device__ __forceinline__ void scale_columns(unsigned (&a)[4], unsigned early, unsigned late) {
    a[0] = mul_bf16_pair(a[0], early), a[1] = mul_bf16_pair(a[1], early);
    a[2] = mul_bf16_pair(a[2], late), a[3] = mul_bf16_pair(a[3], late);
}

// Two bf16 values times a factor each.
__device__ __forceinline__ unsigned scale_pair(unsigned pair, float low, float high) {
    return pack_bf16(low_bf16(pair) * low, high_bf16(pair) * high);
}

// ---- rows to global memory ----------------------------------------------------------------------------------------------

// Four lanes hold four pairs each, one of each of four 8-column tiles; afterwards lane t holds the whole of tile t.
__device__ __forceinline__ void quad_transpose(unsigned (&v)[4]) {
    int t = threadIdx.x & 3;
    bool odd = t & 1, high = t & 2;
    unsigned s0 = __shfl_xor_sync(FULL_WARP, odd ? v[0] : v[1], 1);
    unsigned s1 = __shfl_xor_sync(FULL_WARP, odd ? v[2] : v[3], 1);
    if (odd) v[0] = s0, v[2] = s1;
    else v[1] = s0, v[3] = s1;
    s0 = __shfl_xor_sync(FULL_WARP, high ? v[0] : v[2], 2);
    s1 = __shfl_xor_sync(FULL_WARP, high ? v[1] : v[3], 2);
    if (high) v[0] = s0, v[1] = s1;
    else v[2] = s0, v[3] = s1;
}

// Writes one row of TILES results of 8 columns as bf16 from column `col`; `v` has this lane's pairs. All lanes of the warp must
// come here, those without a row with `valid` false.
template <int TILES, bool ALIGN>
__device__ __forceinline__ void store_row(bf16* row, int col, int n_cols, bool valid, const unsigned (&v)[TILES]) {
    int t = threadIdx.x & 3;
    if constexpr (ALIGN && TILES % 4 == 0) {
        #pragma unroll
        for (int first = 0; first < TILES; first += 4) {
            unsigned w[4] = {v[first], v[first + 1], v[first + 2], v[first + 3]};
            quad_transpose(w);
            int at = col + (first + t) * 8;
            if (valid && at < n_cols) *reinterpret_cast<uint4*>(row + at) = make_uint4(w[0], w[1], w[2], w[3]);
        }
    } else {
        #pragma unroll
        for (int i = 0; i < TILES; i++) {
            int at = col + i * 8 + 2 * t;
            if constexpr (ALIGN) {
                if (valid && at < n_cols) *reinterpret_cast<unsigned*>(row + at) = v[i];
            } else {
                if (valid && at < n_cols) row[at].bits = (unsigned short)(v[i] & 0xffff);
                if (valid && at + 1 < n_cols) row[at + 1].bits = (unsigned short)(v[i] >> 16);
            }
        }
    }
}
