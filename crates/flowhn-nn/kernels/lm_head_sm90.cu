// The LM head's first product on Hopper, which writes exponentials in place of logits.
//
//   E_rv = exp(x_r W_v - c_r) but 0 for the target of r,   sums_jr = sum of E_rv over the words v of column tile j
//
//   x        boxes of 128 rows of [n_rows, d], W  boxes of 256 rows of [vocab_size, d]: bf16, d a multiple of 8
//   targets  [n_rows], i64; those outside the vocabulary are nobody's
//   c        [n_rows], f32, in units of ln 2: c_r / ln 2
//   E        boxes of 16 rows of [n_rows, vocab_size or more], bf16; columns from vocab_size on become 0
//   sums     [column tiles, rows, up to a multiple of 128], f32, of E before rounding
//
// The softmax so needs no pass over the logits of its own: what a row's sum does to the gradients is a factor of rows, which the
// next products' other factors and results take (lm_head_rows.cu). The target is left out because c_r is its logit: beside its 1 the
// sum over all other words would lose its digits where the target is nearly certain.
//
// One block a multiprocessor stays for all its tiles of 128 rows x 256 words. One thread copies: a stage of the ring is 64 values
// of k of both factors, two boxes. Two groups of four warps have 64 rows each and multiply; they drift apart by themselves, so that one
// has the tensor cores while the other has its exponentials. A warp puts 16 rows x 64 words of these in shared memory, where the copy
// engine takes them in whole lines; it has two such places and goes on in one while the other is read.
//
// Variants: STAGES of the ring; STORE 1: writes E, 0: sums only, without the parameter.
#include "lm_head_tiles.cuh"
#include "smem.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int ROW_BYTES = TILE_K * 2;
constexpr int A_BYTES = TILE_ROWS * ROW_BYTES, B_BYTES = TILE_COLS * ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int GROUP = 128, GROUPS = 2, WARPS = 4 * GROUPS, GROUP_ROWS = TILE_ROWS / GROUPS;
constexpr int PIECES = TILE_COLS / 8;
// What a warp sends at a time, and how many places for that it has.
constexpr int PANEL_ROWS = 16, PANEL_COLS = 64, PANEL_BYTES = PANEL_ROWS * PANEL_COLS * 2, PLACES = STORE ? 2 : 0;

// The ring of stages; each thread that walks it counts its own steps. The places of the warps and the barriers lie behind it.
struct Ring {
    unsigned base;
    int step;

    __device__ __forceinline__ unsigned a() const { return base + step % STAGES * STAGE_BYTES; }
    __device__ __forceinline__ unsigned b() const { return a() + A_BYTES; }
    __device__ __forceinline__ unsigned places(int warp) const { return base + STAGES * STAGE_BYTES + warp * (PLACES * PANEL_BYTES); }
    __device__ __forceinline__ unsigned full() const { return places(WARPS) + step % STAGES * 8; }
    __device__ __forceinline__ unsigned empty() const { return full() + STAGES * 8; }
    __device__ __forceinline__ unsigned parity() const { return step / STAGES & 1; }
};

// Hands the stage of the step before back to the thread that copies.
__device__ __forceinline__ void release_last(Ring ring) {
    ring.step--;
    if (threadIdx.x % 32 == 0) mbarrier_arrive(ring.empty());
}

// Turns the logit of this thread's column `column`, counted in its own 64 of row `half`, to minus infinity.
__device__ __forceinline__ void leave_out(float (&logits)[PIECES][4], int half, int column) {
    #pragma unroll
    for (int i = 0; i < PIECES; i++) {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            if (2 * i + j == column) logits[i][2 * half + j] = __uint_as_float(0xff800000u);
        }
    }
}

// The exponentials of a warp's 16 rows from `row` on, and their sums. Lane 4 g + t has rows g and g + 8, and of each 8 columns 2 t and
// 2 t + 1.
template <bool WHOLE> __device__ __forceinline__ void write_tile(
    const float (&logits)[PIECES][4], const float (&c)[2], const BoxMap* e, unsigned places, float* sums, int row, int column,
    int vocab_size) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // A store takes four matrices of 8 x 8: the upper and the lower rows of 8 columns, and those of the next 8. This lane names row
    // lane % 8 of matrix lane / 8.
    const unsigned own = lane % PANEL_ROWS * ROW_BYTES + (lane / 16 ^ lane % 8) * 16;
    float sums_of_row[2][2] = {};
    #pragma unroll
    for (int first = 0; first < TILE_COLS; first += PANEL_COLS) {
        unsigned place = places + first / PANEL_COLS % 2 * PANEL_BYTES;
        if constexpr (STORE == 1) {
            if (lane == 0) box_wait_read<1>();
            __syncwarp();
        }
        #pragma unroll
        for (int pair = 0; pair < PANEL_COLS / 16; pair++) {
            unsigned words[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                int half = i % 2, piece = first / 8 + 2 * pair + i / 2;
                float x[2];
                #pragma unroll
                for (int j = 0; j < 2; j++) {
                    x[j] = ex2(fmaf(logits[piece][2 * half + j], LOG2_E, -c[half]));
                    if (!WHOLE && column + 8 * piece + 2 * t + j >= vocab_size) x[j] = 0.f;
                    sums_of_row[half][j] += x[j];
                }
                words[i] = pack_bf16(x[0], x[1]);
            }
            if constexpr (STORE == 1) stmatrix_x4(place + (own ^ pair * 32), words);
        }
        if constexpr (STORE == 1) {
            wgmma_publish();
            __syncwarp();
            if (lane == 0) {
                box_store(*e, column + first, row, place);
                box_commit();
            }
        }
    }
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sums_of_row[half][0] + sums_of_row[half][1];
        total += __shfl_xor_sync(FULL_WARP, total, 1);
        total += __shfl_xor_sync(FULL_WARP, total, 2);
        if (t == 0) sums[g + 8 * half] = total;
    }
}

extern "C" __global__ void __launch_bounds__(GROUP * (1 + GROUPS), 1) lm_head_product(
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
    Ring ring{smem_address(shared_memory()), 0};
    const int group = threadIdx.x / GROUP, n_k = up(d, TILE_K);
    const int n_row_tiles = up(n_rows, TILE_ROWS), n_tiles = n_row_tiles * up(vocab_size, TILE_COLS);
    if (threadIdx.x == 0) {
        Ring each = ring;
        for (; each.step < STAGES; each.step++) mbarrier_init(each.full(), 1), mbarrier_init(each.empty(), WARPS);
        mbarrier_init_fence();
    }
    __syncthreads();

    if (group == 0) {
        registers_give<24>();
        if (threadIdx.x > 0) return;
        for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
            int row = tile % n_row_tiles * TILE_ROWS, word = tile / n_row_tiles * TILE_COLS;
            for (int k = 0; k < n_k; k++, ring.step++) {
                mbarrier_wait(ring.empty(), ring.parity() ^ 1);
                mbarrier_expect(ring.full(), STAGE_BYTES);
                box_load(ring.a(), x, k * TILE_K, row, ring.full());
                box_load(ring.b(), w, k * TILE_K, word, ring.full());
            }
        }
    } else {
        registers_take<240>();
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 - GROUP / 32, g = lane / 4, t = lane % 4;
        float logits[PIECES][4];
        for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
            int column_tile = tile / n_row_tiles, column = column_tile * TILE_COLS;
            int first_row = tile % n_row_tiles * TILE_ROWS + warp * PANEL_ROWS;
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
            for (int k = 0; k < n_k; k++, ring.step++) {
                mbarrier_wait(ring.full(), ring.parity());
                unsigned long long a = wgmma_operand(ring.a() + (group - 1) * GROUP_ROWS * ROW_BYTES, 0, 8 * ROW_BYTES);
                unsigned long long b = wgmma_operand(ring.b(), 0, 8 * ROW_BYTES);
                wgmma_hold(logits);
                wgmma_fence();
                // 16 values of k are 32 bytes, 2 in the units of an operand's address.
                #pragma unroll
                for (int i = 0; i < TILE_K / 16; i++) wgmma_64x256(logits, a + 2 * i, b + 2 * i, k > 0 || i > 0);
                wgmma_commit();
                wgmma_wait<1>();
                if (k > 0) release_last(ring);
            }
            wgmma_wait<0>();
            wgmma_hold(logits);
            release_last(ring);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                if (own_target[half] >= 0) leave_out(logits, half, own_target[half]);
            }
            float* own_sums = sums + ((i64)column_tile * n_row_tiles * TILE_ROWS + first_row);
            if (column + TILE_COLS <= vocab_size) {
                write_tile<true>(logits, own_c, exponentials, ring.places(warp), own_sums, first_row, column, vocab_size);
            } else {
                write_tile<false>(logits, own_c, exponentials, ring.places(warp), own_sums, first_row, column, vocab_size);
            }
        }
        // Shared memory stays until it is read.
        if (STORE == 1 && lane == 0) box_wait_read<0>();
    }
}
#endif
