// A product of two bf16 matrices on Hopper, C = A B^T or A B, tile by tile of 128 rows x 256 or 128 columns: all but what is done with a tile.
//
//   A        boxes of 128 rows of [n_rows, d], k along the rows
//   B        boxes of 128 rows of [n_columns, d], or, with B_BY_K, of 64 rows of [d, n_columns], k from row to row
//
// Rows of all matrices are multiples of 16 bytes. One block a multiprocessor stays for all its tiles. One thread copies: a stage of the
// ring is 64 values of k of both factors. Two groups of four warps multiply. A tile of 256 columns is of both, 64 rows each, which asks least
// of the caches. Tiles of 128 columns are of one group each in turn, so that one multiplies while the other is busy with what it has, however
// long that takes.
//
// Blocks are in clusters of two, which have the same columns and neighbouring rows. Each copies one half of a stage's B for both, so that
// the cache is asked for less: for tiles of 256 columns by a third.
//
// STAGES: of the ring; PLACES: of a warp, for 16 rows x 64 columns of its tile on their way to memory or from there.
#pragma once
#include "product_tiles.cuh"
#include "smem.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int ROW_BYTES = TILE_K * 2;
constexpr int A_BYTES = TILE_ROWS * ROW_BYTES, B_BYTES = TILE_COLS * ROW_BYTES, STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int GROUP = 128, GROUPS = 2, WARPS = 4 * GROUPS, THREADS = GROUP * (1 + GROUPS);
// Groups that share a tile, and the rows of one of their products.
constexpr int SHARERS = TILE_COLS / 128, PRODUCT_ROWS = 64;
constexpr int BLOCKS = 2, HALF = TILE_COLS / BLOCKS;
static_assert(SHARERS == 1 || SHARERS == 2);
// Pairs of row tiles that are walked through for one column tile before the next: their A stays in the L2 cache.
constexpr int BAND = 8;
// Of 8 columns in a row of products, and all that a group has: of one product, or of two below each other.
constexpr int PIECES = TILE_COLS / 8, ALL_PIECES = 32;
constexpr int PANEL_ROWS = 16, PANEL_COLS = 64, PANEL_BYTES = PANEL_ROWS * PANEL_COLS * 2;
// What lies side by side in a factor with k from row to row.
constexpr int BOX_COLS = 64, BOX_BYTES = TILE_K * BOX_COLS * 2;

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
    // Where a group, 1 or 2, with tiles of its own waits for its turn.
    __device__ __forceinline__ unsigned turn(int group) const { return places(WARPS) + (2 * STAGES + group - 1) * 8; }
    // Barriers for what a warp asks for, as many as it has places.
    __device__ __forceinline__ unsigned arrived(int warp) const { return places(WARPS) + (2 * STAGES + GROUPS + warp * PLACES) * 8; }
};

// The tiles of a product, of which a cluster takes every `step`-th from `first` on; each of its blocks has its own row tile of a pair.
struct Tiles {
    int n_pairs, n_columns, n_k, rank, first, step;

    // Of a result of so many rows and column tiles, with d values of k.
    __device__ __forceinline__ Tiles(int n_rows, int n_columns, int d)
        : n_pairs(ceil_div(n_rows, TILE_ROWS * BLOCKS)), n_columns(n_columns), n_k(ceil_div(d, TILE_K)), rank(cluster_rank()),
          first(blockIdx.x / BLOCKS), step(gridDim.x / BLOCKS) {}
    __device__ __forceinline__ int count() const { return n_pairs * n_columns; }
    // This block's row tile (x) and the column tile (y).
    __device__ __forceinline__ int2 place(int tile) const {
        int band = tile / (BAND * n_columns), within = tile % (BAND * n_columns), first_pair = band * BAND;
        int height = min(BAND, n_pairs - first_pair);
        return make_int2((first_pair + within % height) * BLOCKS + rank, within / height);
    }
};

// The registers that the warps that copy leave to those that multiply.
__device__ __forceinline__ void become_copier() { registers_give<40>(); }
__device__ __forceinline__ void become_multiplier() { registers_take<232>(); }

// The barriers of the ring and of the places, of both blocks; every thread has to come here.
__device__ __forceinline__ Ring open_ring() {
    Ring ring{smem_address(shared_memory()), 0};
    if (threadIdx.x == 0) {
        for (Ring each = ring; each.step < STAGES; each.step++) mbarrier_init(each.full(), 1), mbarrier_init(each.empty(), 4 * SHARERS * BLOCKS);
        for (int i = 1; i <= GROUPS; i++) mbarrier_init(ring.turn(i), 4);
        for (int i = 0; i < WARPS * PLACES; i++) mbarrier_init(ring.arrived(0) + 8 * i, 1);
        mbarrier_init_fence();
    }
    cluster_barrier();
    return ring;
}

// Copies the values of k of one tile: this block's rows of A from `row` on, and its half of the columns, which begins at `own` of B.
template <bool B_BY_K = false>
__device__ __forceinline__ void copy_tile(Ring& ring, const BoxMap& a, int row, const BoxMap& b, int own, int n_k) {
    static_assert(B_BY_K ? HALF % BOX_COLS == 0 : HALF == 128);
    constexpr unsigned short BOTH = (1 << BLOCKS) - 1;
    const unsigned half = cluster_rank() * (B_BYTES / BLOCKS);
    for (int k = 0; k < n_k; k++, ring.step++) {
        mbarrier_wait(ring.empty(), ring.parity() ^ 1);
        mbarrier_expect(ring.full(), STAGE_BYTES);
        box_load(ring.a(), a, k * TILE_K, row, ring.full());
        if constexpr (B_BY_K) {
            #pragma unroll
            for (int i = 0; i < HALF / BOX_COLS; i++)
                box_load_to(ring.b() + half + i * BOX_BYTES, b, own + i * BOX_COLS, k * TILE_K, ring.full(), BOTH);
        } else {
            box_load_to(ring.b() + half, b, k * TILE_K, own, ring.full(), BOTH);
        }
    }
}

// Copies all tiles of a block, by the one thread that copies: of the factor of columns, a tile's are `width` apart, and this block's half begins
// `own` behind the first.
template <bool B_BY_K = false>
__device__ __forceinline__ void copy_tiles(Ring& ring, const Tiles& tiles, const BoxMap& a, const BoxMap& b, int width, int own) {
    become_copier();
    if (threadIdx.x > 0) return;
    for (int tile = tiles.first; tile < tiles.count(); tile += tiles.step) {
        int2 place = tiles.place(tile);
        copy_tile<B_BY_K>(ring, a, place.x * TILE_ROWS, b, place.y * width + own, tiles.n_k);
    }
}

// Hands the stage of the step before back to the threads that copy: the half of B is the other block's.
__device__ __forceinline__ void release_last(Ring ring) {
    ring.step--;
    int lane = threadIdx.x % 32;
    if (lane < BLOCKS) mbarrier_arrive_at(ring.empty(), lane);
}

// Half of the sums of a group with a tile of its own.
template <int FIRST> __device__ __forceinline__ float (&pieces_from(float (&sums)[ALL_PIECES][4]))[ALL_PIECES / 2][4] {
    return reinterpret_cast<float (&)[ALL_PIECES / 2][4]>(sums[FIRST]);
}

// This group's part of a tile. Of a thread's `sums`, those of piece p are of columns 8 p + 2 t and 8 p + 2 t + 1, where its lane is 4 g + t: two
// of row g of its warp's 16, then two of row g + 8. Where the tile is its own, the lower 64 rows have the pieces from PIECES on.
// `meanwhile` is called once, beside the first products.
template <bool B_BY_K, class Work>
__device__ __forceinline__ void multiply_tile(float (&sums)[ALL_PIECES][4], Ring& ring, int group, int n_k, Work meanwhile) {
    // A stage can be waited for once the one before in its place has come, of which the other group knows.
    if constexpr (SHARERS == 1) mbarrier_wait(ring.turn(group), (ring.step / n_k / GROUPS + group) & 1);
    // 16 values of k, in the units of an operand's address: 32 bytes of each row, or 16 rows.
    constexpr int A_STEP = 2, B_STEP = B_BY_K ? 16 * ROW_BYTES / 16 : 2, A_LOWER = PRODUCT_ROWS * ROW_BYTES / 16;
    for (int k = 0; k < n_k; k++, ring.step++) {
        mbarrier_wait(ring.full(), ring.parity());
        unsigned long long a = wgmma_operand(ring.a() + (SHARERS == 2 ? group - 1 : 0) * PRODUCT_ROWS * ROW_BYTES, 0, 8 * ROW_BYTES);
        unsigned long long b = wgmma_operand(ring.b(), B_BY_K ? BOX_BYTES : 0, 8 * ROW_BYTES);
        wgmma_hold(sums);
        wgmma_fence();
        #pragma unroll
        for (int i = 0; i < TILE_K / 16; i++) {
            bool add = k > 0 || i > 0;
            if constexpr (SHARERS == 2) {
                wgmma_64x256<B_BY_K>(sums, a + A_STEP * i, b + B_STEP * i, add);
            } else {
                wgmma_64x128<B_BY_K>(pieces_from<0>(sums), a + A_STEP * i, b + B_STEP * i, add);
                wgmma_64x128<B_BY_K>(pieces_from<PIECES>(sums), a + A_LOWER + A_STEP * i, b + B_STEP * i, add);
            }
        }
        wgmma_commit();
        if (k == 0) meanwhile();
        wgmma_wait<1>();
        if (k > 0) release_last(ring);
    }
    if (SHARERS == 1 && threadIdx.x % 32 == 0) mbarrier_arrive(ring.turn(GROUPS + 1 - group));
    wgmma_wait<0>();
    wgmma_hold(sums);
    release_last(ring);
}
__device__ __forceinline__ void multiply_tile(float (&sums)[ALL_PIECES][4], Ring& ring, int group, int n_k) {
    multiply_tile<false>(sums, ring, group, n_k, [] {});
}

// Where this lane finds its part of 16 rows x 16 columns of a panel, with `stmatrix_x4` and `ldmatrix_x4`, whose four matrices of 8 x 8 are
// the upper and the lower rows of 8 columns, and those of the next 8.
__device__ __forceinline__ unsigned in_panel(unsigned place, int pair) {
    const int lane = threadIdx.x % 32;
    return place + ((lane % PANEL_ROWS * ROW_BYTES + (lane / 16 ^ lane % 8) * 16) ^ pair * 32);
}

// Before panels are sent that lanes have written to their places.
__device__ __forceinline__ void publish() {
    wgmma_publish();
    __syncwarp();
}

// Sends a panel to 16 rows x 64 columns of `to`.
__device__ __forceinline__ void send(const BoxMap& to, int column, int row, unsigned place) {
    if (threadIdx.x % 32 == 0) box_store(to, column, row, place), box_commit();
}

// Writes a panel to its place once what was sent from there is read, and sends it. `words(piece, half)` gives two neighbours, packed, of row
// g (half 0) or g + 8 (half 1). The places have to take turns, from tile to tile as well.
template <class Words> __device__ __forceinline__ void send_panel(const BoxMap& to, int column, int row, unsigned place, Words words) {
    if (threadIdx.x % 32 == 0) box_wait_read<PLACES - 1>();
    __syncwarp();
    #pragma unroll
    for (int pair = 0; pair < PANEL_COLS / 16; pair++) {
        unsigned four[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) four[i] = words(2 * pair + i / 2, i % 2);
        stmatrix_x4(in_panel(place, pair), four);
    }
    publish();
    send(to, column, row, place);
}

// Leaves the stages of a tile to the other group.
__device__ __forceinline__ void skip_tile(Ring& ring, int n_k) { ring.step += n_k; }

// Before a block ends: its shared memory stays until all that it sent has been read, and until no other block copies to it.
__device__ __forceinline__ void close_ring(int group) {
    if (group > 0 && threadIdx.x % 32 == 0) box_wait_read<0>();
    cluster_barrier();
}
#endif
