// What the kernels of attention on Hopper share: forward, the gradient of the queries, the gradients of keys and values.
//
// A tile is 128 queries, or 128 keys, of one head of one sequence, and heads are 64 wide. Blocks stay for the whole launch and
// have many tiles. One thread copies, through a ring, what belongs to the tile and what it is multiplied with;
// it is ahead by as much as the ring holds, so that a tile begins without waiting. Two groups of four warps have 64 rows of the tile each.
//
// A thread's results of a product of 64 rows are of rows g and g + 8 of its warp's 16 and, of each 8 columns, 2 t and 2 t + 1, where its lane is
// 4 g + t; rounded, that is how products take their first factor from registers.
//
// Numbers of rows, one each, are in memory for whole tiles: `padded(n)` for n rows.
//
// SEES: what a query sees.  0 every key;  1 CAUSAL, keys up to its own position;  2 SPANS, of these the ones from `first_keys` on (spans.cu).
#pragma once
#include "flowhn.cuh"
#include "smem.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int D_HEAD = 64, ROWS = 128, ROW_BYTES = D_HEAD * 2, TILE_BYTES = ROWS * ROW_BYTES;
constexpr int GROUP = 128, GROUPS = 2, WARPS = 4 * GROUPS, THREADS = GROUP * (1 + GROUPS), GROUP_ROWS = ROWS / GROUPS;
constexpr int NUMBERS_BYTES = ROWS * 4;
constexpr bool CAUSAL = SEES >= 1, SPANS = SEES == 2;

__device__ __forceinline__ int ceil_div(int n, int step) { return (n + step - 1) / step; }
__device__ __forceinline__ int padded(int n) { return ceil_div(n, ROWS) * ROWS; }

// Rows `first` to `first` + 127 of one head of one sequence; `sequence` counts heads of all sequences.
struct Tile {
    int block, first, sequence, head, batch;
};

// The tiles of this block, those with most to do first: every `gridDim.x`th, there and back, so that all blocks have about as much to do. Where
// attention is causal the last queries have most to do (`LAST_FIRST`), and the first keys.
template <bool LAST_FIRST> struct Tiles {
    int n_blocks, n_heads, n_sequences, round;
    __device__ __forceinline__ Tiles(int n, int n_batches, int n_heads)
        : n_blocks(ceil_div(n, ROWS)), n_heads(n_heads), n_sequences(n_batches * n_heads), round(0) {}
    __device__ __forceinline__ int number() const { return round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x); }
    __device__ __forceinline__ bool has_one() const { return number() < n_blocks * n_sequences; }
    __device__ __forceinline__ void next() { round++; }
    __device__ __forceinline__ Tile tile() const {
        const int block = LAST_FIRST ? n_blocks - 1 - number() / n_sequences : number() / n_sequences, sequence = number() % n_sequences;
        return {block, block * ROWS, sequence, sequence % n_heads, sequence / n_heads};
    }
};

// A place in a ring of `N` slots of shared memory, each with two barriers: one that is full when what was copied is there, one that is empty when
// every reader has gone on. The thread that copies and each warp of the others go round on their own. A slot of tiles only is handed back by one
// lane of each warp, one with numbers, which lanes read by themselves, by every lane (EACH_LANE).
template <int N, bool EACH_LANE> struct Ring {
    int slot, round;
    __device__ __forceinline__ Ring() : slot(0), round(0) {}
    __device__ __forceinline__ void next() {
        slot = slot + 1 == N ? 0 : slot + 1;
        round ^= slot == 0;
    }
    static __device__ __forceinline__ void init(unsigned barriers) {
        for (int i = 0; i < N; i++) mbarrier_init(barriers + i * 16, 1), mbarrier_init(barriers + i * 16 + 8, EACH_LANE ? 32 * WARPS : WARPS);
    }
    __device__ __forceinline__ unsigned full(unsigned barriers) const { return barriers + slot * 16; }
    __device__ __forceinline__ unsigned empty(unsigned barriers) const { return barriers + slot * 16 + 8; }
    __device__ __forceinline__ void wait_full(unsigned barriers) const { mbarrier_wait(full(barriers), round); }
    __device__ __forceinline__ void wait_empty(unsigned barriers) const { mbarrier_wait(empty(barriers), round ^ 1); }
    // By every lane of a warp, with the `empty` of the slot.
    static __device__ __forceinline__ void hand_back(unsigned barrier) {
        if (EACH_LANE || threadIdx.x % 32 == 0) mbarrier_arrive(barrier);
    }
};

// Where things lie in shared memory: two slots of OWN tiles of the block's rows, STAGES slots of two tiles that come and go, the numbers that come
// with either, for each row, and the barriers.
template <int OWN, int OWN_NUMBERS, int NUMBERS> struct Layout {
    typedef Ring<2, (OWN_NUMBERS > 0)> OwnRing;
    typedef Ring<STAGES, (NUMBERS > 0)> PairRing;
    static constexpr int RING = 2 * OWN * TILE_BYTES, OWN_ROWS = RING + STAGES * 2 * TILE_BYTES, RING_ROWS = OWN_ROWS + 2 * OWN_NUMBERS * NUMBERS_BYTES;
    static constexpr int OWN_BARRIERS = RING_ROWS + STAGES * NUMBERS * NUMBERS_BYTES, RING_BARRIERS = OWN_BARRIERS + 2 * 16, END = RING_BARRIERS + STAGES * 16;
    static __device__ __forceinline__ void init() {
        unsigned base = smem_address(shared_memory());
        if (threadIdx.x == 0) {
            OwnRing::init(base + OWN_BARRIERS);
            PairRing::init(base + RING_BARRIERS);
            mbarrier_init_fence();
        }
        __syncthreads();
    }
    static __device__ __forceinline__ unsigned own_barriers() { return smem_address(shared_memory()) + OWN_BARRIERS; }
    static __device__ __forceinline__ unsigned ring_barriers() { return smem_address(shared_memory()) + RING_BARRIERS; }
    static __device__ __forceinline__ unsigned own_tile(int slot, int i) { return smem_address(shared_memory()) + (slot * OWN + i) * TILE_BYTES; }
    static __device__ __forceinline__ unsigned ring_tile(int slot, int i) { return smem_address(shared_memory()) + RING + (slot * 2 + i) * TILE_BYTES; }
    template <class T> static __device__ __forceinline__ T* own_rows(int slot, int i) {
        return reinterpret_cast<T*>(shared_memory() + OWN_ROWS) + (slot * OWN_NUMBERS + i) * ROWS;
    }
    template <class T> static __device__ __forceinline__ T* ring_rows(int slot, int i) {
        return reinterpret_cast<T*>(shared_memory() + RING_ROWS) + (slot * NUMBERS + i) * ROWS;
    }
};

// Starts copying the next pair of tiles into the ring once its slot is empty. The slot's barrier expects `n_more_bytes` besides, which the caller copies.
template <class Memory> __device__ __forceinline__ void copy_pair(const typename Memory::PairRing& ring, const BoxMap& a, const BoxMap& b, int row, int head, int batch,
                                                                  int n_more_bytes) {
    const unsigned barriers = Memory::ring_barriers(), full = ring.full(barriers);
    ring.wait_empty(barriers);
    mbarrier_expect(full, 2 * TILE_BYTES + n_more_bytes);
    box_load(Memory::ring_tile(ring.slot, 0), a, 0, row, head, batch, full);
    box_load(Memory::ring_tile(ring.slot, 1), b, 0, row, head, batch, full);
}

// Until what this warp has sent is read.
__device__ __forceinline__ void wait_for_sent() {
    if (threadIdx.x % 32 == 0) box_wait_read<0>();
}
// Hands the slot of own rows back from which this warp has sent.
template <class Memory> __device__ __forceinline__ void hand_back_sent(unsigned barrier) {
    wait_for_sent();
    Memory::OwnRing::hand_back(barrier);
}

// The rows of a tile that a thread's results are of: this one and the eighth after it, counted in the tile.
__device__ __forceinline__ int own_row() { return (threadIdx.x - GROUP) / 32 * 16 + threadIdx.x % 32 / 4; }
// 0 or 1 for warps that multiply.
__device__ __forceinline__ int own_group() { return threadIdx.x / GROUP - 1; }

// d = a b^T for the group's 64 rows of tile `a` and 8 PIECES rows of `b`.
template <int PIECES> __device__ __forceinline__ void multiply(float (&d)[PIECES][4], unsigned a_tile, int group, unsigned b_tile) {
    unsigned long long a = wgmma_operand(a_tile + group * GROUP_ROWS * ROW_BYTES, 0, 8 * ROW_BYTES), b = wgmma_operand(b_tile, 0, 8 * ROW_BYTES);
    #pragma unroll
    for (int i = 0; i < D_HEAD / 16; i++) {
        if constexpr (PIECES == 16) wgmma_64x128(d, a + 2 * i, b + 2 * i, i > 0);
        else wgmma_64x64(d, a + 2 * i, b + 2 * i, i > 0);
    }
}
// d += a b for `a` in registers, with as many columns as `b` has rows: 64 wide.
template <int STEPS> __device__ __forceinline__ void multiply_add(float (&d)[D_HEAD / 8][4], const unsigned (&a)[STEPS][4], unsigned b_tile, bool add) {
    unsigned long long b = wgmma_operand(b_tile, 0, 8 * ROW_BYTES);
    #pragma unroll
    for (int i = 0; i < STEPS; i++) wgmma_64x64(d, a[i], b + i * (16 * ROW_BYTES / 16), add || i > 0);
}

// Makes scores minus infinity where `is_hidden(piece, half, j)`.
template <int PIECES, class Hidden> __device__ __forceinline__ void hide(float (&scores)[PIECES][4], Hidden is_hidden) {
    #pragma unroll
    for (int i = 0; i < 4 * PIECES; i++) {
        if (is_hidden(i / 4, i % 4 / 2, i % 2)) scores[i / 4][i % 4] = __uint_as_float(0xff800000u);
    }
}

// Rounds the group's 64 rows times `scale` into its rows of a tile, which nobody else reads any more, and sends them, each warp its 16.
__device__ __forceinline__ void send(const BoxMap& to, const float (&d)[D_HEAD / 8][4], float scale_low, float scale_high, unsigned tile, int first, int head,
                                     int batch, int n) {
    const int lane = threadIdx.x % 32, row = (threadIdx.x - GROUP) / 32 * 16;
    const unsigned place = tile + row * ROW_BYTES, own = lane % 16 * ROW_BYTES + (lane / 16 ^ lane % 8) * 16;
    named_barrier(1 + own_group(), GROUP);
    #pragma unroll
    for (int pair = 0; pair < D_HEAD / 16; pair++) {
        unsigned words[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            const float* two = &d[2 * pair + i / 2][i % 2 * 2];
            float scale = i % 2 ? scale_high : scale_low;
            words[i] = pack_bf16(two[0] * scale, two[1] * scale);
        }
        stmatrix_x4(place + (own ^ pair * 32), words);
    }
    wgmma_publish();
    __syncwarp();
    if (lane == 0) {
        if (first + row < n) box_store(to, 0, first + row, head, batch, place);
        box_commit();
    }
}
#endif
