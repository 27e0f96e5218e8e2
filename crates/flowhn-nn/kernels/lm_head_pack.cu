// What precedes the LM head's first product where that writes exponentials (lm_head_sm90.cu): its factors in tiles, and the logits of
// the targets, from which the exponentials are measured.
//
//   c_r = x_r W_target / ln 2
//
//   W  [vocab_size, d], bf16, d a multiple of 64                 x  [n_rows, d], bf16
//   targets  [n_rows], i64                                       c  [n_rows, up to a multiple of 128], f32
//   tiles: lm_head_tiles.cuh
//
// Both are copies at the speed of memory. A warp has a word of W or a row of x, a lane 8 neighbours.
#include "lm_head_tiles.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
// Stands for a logit, in units of ln 2, from which all exponentials are 0.
constexpr float NOTHING = 1e30f;

// The words of W in tiles; those past the end become 0.
extern "C" __global__ void __launch_bounds__(THREADS) lm_head_pack_weight(
    const bf16* __restrict__ w, char* __restrict__ tiles, int vocab_size, int d) {
    int word = blockIdx.x * WARPS + threadIdx.x / 32, n_k = d / TILE_K;
    for (int piece = threadIdx.x % 32; piece < d / 8; piece += 32) {
        float values[8] = {};
        if (word < vocab_size) load_vec<8>(values, w + (i64)word * d + 8 * piece);
        store_vec<8>(reinterpret_cast<bf16*>(tiles + w_piece_at(word, piece, n_k)), values);
    }
}

// The rows of x in tiles, and c in units of ln 2: that which turns all to 0 where there is no target.
extern "C" __global__ void __launch_bounds__(THREADS) lm_head_pack_x(
    const bf16* __restrict__ x, const char* __restrict__ w, const i64* __restrict__ targets, i64 ignored, char* __restrict__ tiles,
    float* __restrict__ c, int n_rows, int vocab_size, int d) {
    int row = blockIdx.x * WARPS + threadIdx.x / 32, n_k = d / TILE_K;
    i64 target = row < n_rows ? targets[row] : -1;
    bool has_target = target != ignored && target >= 0 && target < vocab_size;
    float dot = 0.f;
    for (int piece = threadIdx.x % 32; piece < d / 8; piece += 32) {
        float a[8] = {}, b[8];
        if (row < n_rows) load_vec<8>(a, x + (i64)row * d + 8 * piece);
        store_vec<8>(reinterpret_cast<bf16*>(tiles + x_piece_at(row, piece, n_k)), a);
        if (!has_target) continue;
        load_vec<8>(b, reinterpret_cast<const bf16*>(w + w_piece_at((int)target, piece, n_k)));
        #pragma unroll
        for (int i = 0; i < 8; i++) dot = fmaf(a[i], b[i], dot);
    }
    dot = warp_sum(dot);
    if (threadIdx.x % 32 == 0) c[row] = has_target ? dot * LOG2_E : NOTHING;
}
