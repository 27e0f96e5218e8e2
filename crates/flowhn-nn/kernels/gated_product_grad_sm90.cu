// Backward through the second product of a gated MLP and its activation on Hopper: dh = dy W is never in memory.
//
//   dgate = dh up silu'(gate),   dup = dh silu(gate)
//
//   dy, W                   the factors: [n_rows, d] and [d, f]
//   gate, up, dgate, dup    boxes of 16 rows of [n_rows, f], bf16; dh is rounded to bf16 first, so that they have the bits of swiglu.cu
//
// A warp has two times 16 rows of a tile of 128 x 128, two panels of 64 columns each, and four places: the gate and the up of a panel, and
// those of the next. It asks for what it needs first while it multiplies, puts the gradients where gate and up were, and asks for what comes
// next there once those are sent.
//
// Variants: TILE_COLUMNS 128, STAGES, PLACES 4.
#include "product_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int IN_ROW = TILE_COLS / PANEL_COLS, PANELS = IN_ROW * TILE_ROWS / PRODUCT_ROWS;
static_assert(SHARERS == 1 && PANELS == 4 && PLACES == 4);

// The gate and the up of a warp's rows.
struct Panels {
    const BoxMap* gate;
    const BoxMap* up;
    unsigned places, barriers;
    int first_row, first_column;

    __device__ __forceinline__ int row(int panel) const { return first_row + panel / IN_ROW * PRODUCT_ROWS; }
    __device__ __forceinline__ int column(int panel) const { return first_column + panel % IN_ROW * PANEL_COLS; }
    __device__ __forceinline__ unsigned gate_place(int panel) const { return places + panel % 2 * 2 * PANEL_BYTES; }
    __device__ __forceinline__ unsigned up_place(int panel) const { return gate_place(panel) + PANEL_BYTES; }
    __device__ __forceinline__ unsigned arrived(int panel) const { return barriers + panel % 2 * 8; }

    // Asks for a panel once all but the last `N` places that were sent have been read.
    template <int N> __device__ __forceinline__ void ask(int panel) const {
        if (threadIdx.x % 32 == 0) {
            box_wait_read<N>();
            mbarrier_expect(arrived(panel), 2 * PANEL_BYTES);
            box_load(gate_place(panel), *gate, column(panel), row(panel), arrived(panel));
            box_load(up_place(panel), *up, column(panel), row(panel), arrived(panel));
        }
        __syncwarp();
    }
    // Two panels pass each barrier in a tile, so that all tiles begin with the same parity.
    __device__ __forceinline__ void wait(int panel) const {
        mbarrier_wait(arrived(panel), panel / 2 % 2);
        __syncwarp();
    }
};

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1) gated_product_grad(
    const __grid_constant__ BoxMap dy, const __grid_constant__ BoxMap w, const __grid_constant__ BoxMap gate,
    const __grid_constant__ BoxMap up, const __grid_constant__ BoxMap dgate, const __grid_constant__ BoxMap dup, int n_rows, int f, int d) {
    Ring ring = open_ring();
    const int group = threadIdx.x / GROUP;
    const Tiles tiles(n_rows, ceil_div(f, TILE_COLS), d);

    if (group == 0) {
        copy_tiles<true>(ring, tiles, dy, w, TILE_COLS, tiles.rank * HALF);
    } else {
        become_multiplier();
        const int warp = threadIdx.x / 32 - GROUP / 32;
        float sums[ALL_PIECES][4];
        if (group == 2) skip_tile(ring, tiles.n_k);
        for (int tile = tiles.first + (group - 1) * tiles.step; tile < tiles.count(); tile += GROUPS * tiles.step) {
            int2 place = tiles.place(tile);
            int row = place.x * TILE_ROWS + warp % 4 * PANEL_ROWS;
            Panels panels{&gate, &up, ring.places(warp), ring.arrived(warp), row, place.y * TILE_COLS};
            // The last panel of the tile before has the places of this one's second.
            panels.ask<2>(0);
            multiply_tile<true>(sums, ring, group, tiles.n_k, [&] { panels.ask<0>(1); });
            skip_tile(ring, tiles.n_k);
            #pragma unroll
            for (int panel = 0; panel < PANELS; panel++) {
                panels.wait(panel);
                #pragma unroll
                for (int pair = 0; pair < PANEL_COLS / 16; pair++) {
                    if (panel > 0 && panel + 1 < PANELS && pair == 2) panels.ask<0>(panel + 1);
                    unsigned gate_words[4], up_words[4];
                    ldmatrix_x4(gate_words, in_panel(panels.gate_place(panel), pair));
                    ldmatrix_x4(up_words, in_panel(panels.up_place(panel), pair));
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const float* both = &sums[panel * (PANEL_COLS / 8) + 2 * pair + i / 2][i % 2 * 2];
                        unsigned dh = pack_bf16(both[0], both[1]);
                        float2 low = swiglu_grad<bf16>(low_bf16(gate_words[i]), low_bf16(up_words[i]), low_bf16(dh));
                        float2 high = swiglu_grad<bf16>(high_bf16(gate_words[i]), high_bf16(up_words[i]), high_bf16(dh));
                        gate_words[i] = pack_bf16(low.x, high.x), up_words[i] = pack_bf16(low.y, high.y);
                    }
                    stmatrix_x4(in_panel(panels.gate_place(panel), pair), gate_words);
                    stmatrix_x4(in_panel(panels.up_place(panel), pair), up_words);
                }
                publish();
                send(dgate, panels.column(panel), panels.row(panel), panels.gate_place(panel));
                send(dup, panels.column(panel), panels.row(panel), panels.up_place(panel));
            }
        }
    }
    close_ring(group);
}
#endif
