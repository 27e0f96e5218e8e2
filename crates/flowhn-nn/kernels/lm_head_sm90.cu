// The LM head's first product on Hopper, which writes exponentials in place of logits.
//
//   E_rv = exp(x_r W_v - c_r) but 0 for the target of r,   sums_jr = sum of E_rv over the words v of column tile j
//
//   x, W     in the tiles of lm_head_tiles.cuh, bf16
//   targets  [n_rows], i64; those outside the vocabulary are nobody's
//   c        [rows, up to a multiple of 128], f32, in units of ln 2: c_r / ln 2
//   E        [n_rows, row_stride], bf16, row_stride a multiple of 8; columns from vocab_size up to it become 0
//   sums     [column tiles, rows, up to a multiple of 128], f32, of E before rounding
//
// The softmax so needs no pass over the logits of its own: what a row's sum does to the gradients is a factor of rows, which the
// next products' other factors and results take (lm_head_rows.cu). The target is left out because c_r is its logit: beside its 1 the
// sum over all other words would lose its digits where the target is nearly certain.
//
// One block a multiprocessor stays for all its tiles of 128 rows x 256 words. One thread copies: a stage of the ring is 64 values
// of k of both factors. Two groups of four warps have 64 rows each and multiply. A tile's exponentials take as long as a good part
// of its products, so the second group starts LAG steps behind the first: while one has its exponentials, the other has the tensor
// cores for itself, and the ring holds what lies between them. E leaves from registers in words of 16 bytes, for the tiles of W are
// ordered to that end.
//
// Variants: STAGES of the ring; LAG of the second group, less than STAGES; STORE 1: writes E, 0: sums only.
#include "lm_head_tiles.cuh"
#include "smem.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int A_BYTES = TILE_ROWS * ROW_BYTES, B_BYTES = TILE_COLS * ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int GROUP = 128, GROUPS = 2, GROUP_ROWS = TILE_ROWS / GROUPS;
constexpr int PIECES = TILE_COLS / 8;
static_assert(LAG < STAGES, "the first group would wait for stages that the second has not begun");

// The ring of stages; each thread that walks it counts its own steps.
struct Ring {
    unsigned base;
    int step;

    __device__ __forceinline__ unsigned a() const { return base + step % STAGES * STAGE_BYTES; }
    __device__ __forceinline__ unsigned b() const { return a() + A_BYTES; }
    __device__ __forceinline__ unsigned full() const { return base + STAGES * STAGE_BYTES + step % STAGES * 8; }
    __device__ __forceinline__ unsigned empty() const { return full() + STAGES * 8; }
    // At which the second group waits for the first.
    __device__ __forceinline__ unsigned lead() const { return base + STAGES * (STAGE_BYTES + 16); }
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

// The exponentials of a thread: of rows g and g + 8 of its warp's 16, in each 32 words the 8 from 8 t on.
template <bool WHOLE> __device__ __forceinline__ void write_tile(
    const float (&logits)[PIECES][4], const float (&c)[2], bf16* e, i64 row_stride, float* sums, int row, int n_rows, int column,
    int vocab_size) {
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        float sum[2] = {};
        bf16* out = e + (row + 8 * half) * row_stride + column;
        bool is_row = WHOLE || row + 8 * half < n_rows;
        #pragma unroll
        for (int word = 0; word < PIECES / 4; word++) {
            float x[8];
            #pragma unroll
            for (int i = 0; i < 8; i++) {
                x[i] = ex2(fmaf(logits[4 * word + i / 2][2 * half + i % 2], LOG2_E, -c[half]));
                if (!WHOLE && column + 32 * word + i >= vocab_size) x[i] = 0.f;
                sum[i % 2] += x[i];
            }
            if (STORE && is_row && (WHOLE || column + 32 * word < row_stride)) store_vec<8>(out + 32 * word, x);
        }
        float total = sum[0] + sum[1];
        total += __shfl_xor_sync(FULL_WARP, total, 1);
        total += __shfl_xor_sync(FULL_WARP, total, 2);
        if (threadIdx.x % 4 == 0) sums[8 * half] = total;
    }
}

extern "C" __global__ void __launch_bounds__(GROUP * (1 + GROUPS), 1) lm_head_product(
    const char* x, const char* w, const i64* targets, const float* c, bf16* e, i64 row_stride, float* sums, int n_rows, int vocab_size,
    int n_k) {
    Ring ring{smem_address(shared_memory()), 0};
    const int group = threadIdx.x / GROUP;
    const int n_row_tiles = up(n_rows, TILE_ROWS), n_tiles = n_row_tiles * up(vocab_size, TILE_COLS);
    // A ring that holds all of k would let the first group run a whole tile ahead.
    const bool lags = LAG > 0 && n_k > STAGES;
    if (threadIdx.x == 0) {
        Ring each = ring;
        for (; each.step < STAGES; each.step++) mbarrier_init(each.full(), 1), mbarrier_init(each.empty(), 4 * GROUPS);
        mbarrier_init(ring.lead(), 1);
        mbarrier_init_fence();
    }
    __syncthreads();

    if (group == 0) {
        registers_give<24>();
        if (threadIdx.x > 0) return;
        for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
            const char* a = x + (i64)(tile % n_row_tiles) * n_k * A_BYTES;
            const char* b = w + (i64)(tile / n_row_tiles) * n_k * B_BYTES;
            for (int k = 0; k < n_k; k++, ring.step++) {
                mbarrier_wait(ring.empty(), ring.parity() ^ 1);
                mbarrier_expect(ring.full(), STAGE_BYTES);
                bulk_load(ring.a(), a + (i64)k * A_BYTES, A_BYTES, ring.full());
                bulk_load(ring.b(), b + (i64)k * B_BYTES, B_BYTES, ring.full());
            }
        }
    } else {
        registers_take<240>();
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const int own_row = (group - 1) * GROUP_ROWS + warp * 16 + lane / 4, own_column = lane % 4 * 8;
        float logits[PIECES][4];
        unsigned parity = 0;
        for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x, parity ^= 1) {
            int column_tile = tile / n_row_tiles, first_row = tile % n_row_tiles * TILE_ROWS, row = first_row + own_row;
            float own_c[2] = {c[row], c[row + 8]};
            int own_target[2];
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                // Counted in this tile; others' columns and other tiles' become -1.
                i64 target = (row + 8 * half < n_rows ? targets[row + 8 * half] : -1) - (i64)column_tile * TILE_COLS - own_column;
                bool is_own = target >= 0 && target < TILE_COLS && target % 32 < 8;
                own_target[half] = is_own ? (int)target / 32 * 8 + (int)target % 32 : -1;
            }
            if (lags && group == 2) mbarrier_wait(ring.lead(), parity);
            for (int k = 0; k < n_k; k++, ring.step++) {
                mbarrier_wait(ring.full(), ring.parity());
                if (lags && k == LAG && threadIdx.x == GROUP) mbarrier_arrive(ring.lead());
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
            int column = column_tile * TILE_COLS + own_column;
            float* own_sums = sums + (i64)column_tile * n_row_tiles * TILE_ROWS + row;
            if ((column_tile + 1) * TILE_COLS <= vocab_size && first_row + TILE_ROWS <= n_rows) {
                write_tile<true>(logits, own_c, e, row_stride, own_sums, row, n_rows, column, vocab_size);
            } else {
                write_tile<false>(logits, own_c, e, row_stride, own_sums, row, n_rows, column, vocab_size);
            }
        }
    }
}
#endif
