// The LM head's first product on Hopper, which writes exponentials in place of logits.
//
//   E_rv = exp(x_r W_v - c_r) but 0 for the target of r,   sums_jr = sum of E_rv over the words v of column tile j
//
//   x, W     the factors: [n_rows, d] and [vocab_size, d]
//   targets  [n_rows], i64; those outside the vocabulary are nobody's
//   c        [n_rows], f32, in units of ln 2: c_r / ln 2
//   E        boxes of 16 rows of [n_rows, vocab_size or more], bf16; columns from vocab_size on become 0
//   sums     [column tiles, rows, up to a multiple of 128], f32, of E before rounding
//
// The softmax so needs no pass over the logits of its own: what a row's sum does to the gradients is a factor of rows, which the
// next products' other factors and results take (lm_head_rows.cu). The target is left out because c_r is its logit: beside its 1 the
// sum over all other words would lose its digits where the target is nearly certain.
//
// Variants: TILE_COLUMNS 256, STAGES, PLACES; STORE 1: writes E, 0: sums only, without the parameter.
#include "product_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Turns the logit of this thread's column `column`, counted in its own 64 of row `half`, to minus infinity.
__device__ __forceinline__ void leave_out(float (&logits)[ALL_PIECES][4], int half, int column) {
    #pragma unroll
    for (int i = 0; i < PIECES; i++) {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            if (2 * i + j == column) logits[i][2 * half + j] = __uint_as_float(0xff800000u);
        }
    }
}

// The exponentials of a warp's 16 rows from `row` on, and their sums, which nobody wants of rows past the last tile.
template <bool WHOLE> __device__ __forceinline__ void write_tile(
    const float (&logits)[ALL_PIECES][4], const float (&c)[2], const BoxMap* e, unsigned places, float* sums, int row, int column,
    int vocab_size) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float sums_of_row[2][2] = {};
    static_assert(TILE_COLS / PANEL_COLS % PLACES == 0);
    #pragma unroll
    for (int first = 0; first < TILE_COLS; first += PANEL_COLS) {
        auto words = [&](int piece, int half) {
            piece += first / 8;
            float x[2];
            #pragma unroll
            for (int j = 0; j < 2; j++) {
                x[j] = ex2(fmaf(logits[piece][2 * half + j], LOG2_E, -c[half]));
                if (!WHOLE && column + 8 * piece + 2 * t + j >= vocab_size) x[j] = 0.f;
                sums_of_row[half][j] += x[j];
            }
            return pack_bf16(x[0], x[1]);
        };
        if constexpr (STORE == 1) {
            send_panel(*e, column + first, row, places + first / PANEL_COLS % PLACES * PANEL_BYTES, words);
        } else {
            #pragma unroll
            for (int i = 0; i < PANEL_COLS / 4; i++) words(i / 2, i % 2);
        }
    }
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sums_of_row[half][0] + sums_of_row[half][1];
        total += __shfl_xor_sync(FULL_WARP, total, 1);
        total += __shfl_xor_sync(FULL_WARP, total, 2);
        if (t == 0 && sums) sums[g + 8 * half] = total;
    }
}

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1) lm_head_product(
    const __grid_constant__ BoxMap x, const __grid_constant__ BoxMap w,
#if STORE
    const __grid_constant__ BoxMap e,
#endif
    const i64* targets, const float* c, float* sums, int n_rows, int vocab_size, int d) {
#if STORE
    const BoxMap* exponentials = &e;
#else
    const BoxMap* exponentials = nullptr;
#endif
    Ring ring = open_ring();
    const int group = threadIdx.x / GROUP, n_row_tiles = ceil_div(n_rows, TILE_ROWS);
    const Tiles tiles(n_rows, ceil_div(vocab_size, TILE_COLS), d);

    if (group == 0) {
        copy_tiles(ring, tiles, x, w, TILE_COLS, tiles.rank * HALF);
    } else {
        become_multiplier();
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - GROUP / 32, g = lane / 4, t = lane % 4;
        float logits[ALL_PIECES][4];
        for (int tile = tiles.first; tile < tiles.count(); tile += tiles.step) {
            int2 place = tiles.place(tile);
            int column = place.y * TILE_COLS, first_row = place.x * TILE_ROWS + warp * PANEL_ROWS;
            float own_c[2];
            int own_target[2];
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                int row = first_row + g + 8 * half;
                bool is_row = row < n_rows;
                own_c[half] = is_row ? c[row] : 0.f;
                // Counted in this thread's columns of the tile; others' columns and other tiles' become -1.
                i64 target = (is_row ? targets[row] : -1) - column;
                bool is_own = target >= 0 && target < TILE_COLS && target % 8 / 2 == t;
                own_target[half] = is_own ? (int)target / 8 * 2 + (int)target % 2 : -1;
            }
            multiply_tile(logits, ring, group, tiles.n_k);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                if (own_target[half] >= 0) leave_out(logits, half, own_target[half]);
            }
            float* own_sums = place.x < n_row_tiles ? sums + ((i64)place.y * n_row_tiles * TILE_ROWS + first_row) : nullptr;
            if (column + TILE_COLS <= vocab_size) {
                write_tile<true>(logits, own_c, exponentials, ring.places(warp), own_sums, first_row, column, vocab_size);
            } else {
                write_tile<false>(logits, own_c, exponentials, ring.places(warp), own_sums, first_row, column, vocab_size);
            }
        }
    }
    close_ring(group);
}
#endif
