// The first product of a gated MLP on Hopper, which leaves the activation as well: gate = x Wg^T, up = x Wu^T, h = silu(gate) up.
//
//   x             the factor: [n_rows, d];   Wg, Wu  [f, d] each, the halves of one matrix
//   gate, up, h   boxes of 16 rows of [n_rows, f], bf16; gate and up rounded before h is made of them, so that h has the bits of swiglu.cu
//
// A tile has 128 rows and 128 columns of gate beside the same columns of up, so that a thread has both factors of its elements of h.
//
// Variants: TILE_COLUMNS 256, STAGES, PLACES; KEEP 1: writes gate and up, which a backward pass reads, 0: h only, without the parameters.
#include "product_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

extern "C" __global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(THREADS, 1) gated_product(
    const __grid_constant__ BoxMap x, const __grid_constant__ BoxMap w_gate, const __grid_constant__ BoxMap w_up,
    const __grid_constant__ BoxMap h,
#if KEEP
    const __grid_constant__ BoxMap gate, const __grid_constant__ BoxMap up,
#endif
    int n_rows, int f, int d) {
    Ring ring = open_ring();
    const int group = threadIdx.x / GROUP;
    const Tiles tiles(n_rows, ceil_div(f, HALF), d);

    if (group == 0) {
        copy_tiles(ring, tiles, x, tiles.rank == 0 ? w_gate : w_up, HALF, 0);
    } else {
        become_multiplier();
        const int warp = threadIdx.x / 32 - GROUP / 32;
        float sums[ALL_PIECES][4];
        for (int tile = tiles.first; tile < tiles.count(); tile += tiles.step) {
            int2 place = tiles.place(tile);
            int row = place.x * TILE_ROWS + warp * PANEL_ROWS;
            multiply_tile(sums, ring, group, tiles.n_k);
            int n_sent = 0;
            static_assert((KEEP ? 3 : 1) * HALF / PANEL_COLS % PLACES == 0);
            auto next_place = [&] { return ring.places(warp) + n_sent++ % PLACES * PANEL_BYTES; };
            #pragma unroll
            for (int panel = 0; panel < HALF / PANEL_COLS; panel++) {
                int column = place.y * HALF + panel * PANEL_COLS;
                auto word = [&](int piece, int half) {
                    piece += panel * (PANEL_COLS / 8);
                    return pack_bf16(sums[piece][2 * half], sums[piece][2 * half + 1]);
                };
#if KEEP
                send_panel(gate, column, row, next_place(), word);
                send_panel(up, column, row, next_place(), [&](int piece, int half) { return word(piece + PIECES / 2, half); });
#endif
                send_panel(h, column, row, next_place(), [&](int piece, int half) {
                    unsigned g = word(piece, half), u = word(piece + PIECES / 2, half);
                    return pack_bf16(swiglu<bf16>(low_bf16(g), low_bf16(u)), swiglu<bf16>(high_bf16(g), high_bf16(u)));
                });
            }
        }
    }
    close_ring(group);
}
#endif
