// The gradients of the keys and values of attention on Hopper.
//
//   P = exp(scale q k^T - lse ln 2),   dS = P (do v^T - delta),   dv = P^T do,   dk = scale dS^T q,   summed over the heads that share a key head
//
//   q, do   boxes of 128 rows of [batch, heads, n, 64], bf16;   k, v  of [batch, key heads, n, 64];   dk, dv  the same, 16 rows
//   lse, delta    [batch, heads, padded(n)], f32, lse base 2; behind n a large number and 0
//   last_queries  [batch, padded(n)], i32, with SEES 2: the last query that sees a key; never less than that of the key before
//
// Tiles are of keys and multiplied transposed: scores are k q^T, so that P^T and dS^T are in registers as products take their first factor. Of the
// queries at the diagonal the second group is seen by the second half only.
//
// Variants: STAGES, SEES.
#include "attention_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int K = 0, V = 1, LAST_QUERY = 0, Q = 0, DO = 1, LSE = 0, DELTA = 1;
typedef Layout<2, SPANS, 2> Memory;

// P^T do and dS^T q of the group's keys and 8 PIECES queries.
template <int PIECES> __device__ __forceinline__ void add_queries(float (&v_sums)[D_HEAD / 8][4], float (&k_sums)[D_HEAD / 8][4], unsigned k_tile,
                                                                  unsigned v_tile, int slot, float c, int first, int first_query, int skipped, int last_query_low,
                                                                  int last_query_high, bool has_border, bool is_first) {
    const int group = own_group(), t = threadIdx.x % 4;
    const unsigned q_tile = Memory::ring_tile(slot, Q) + skipped * ROW_BYTES, do_tile = Memory::ring_tile(slot, DO) + skipped * ROW_BYTES;
    float scores[PIECES][4], grads[PIECES][4];
    wgmma_fence();
    multiply(scores, k_tile, group, q_tile);
    wgmma_commit();
    multiply(grads, v_tile, group, do_tile);
    wgmma_commit();
    wgmma_wait<1>();
    wgmma_hold(scores);
    if (has_border) {
        // Keys after the last are never seen by queries before it where attention is causal; elsewhere their sums go nowhere.
        const int key = first + own_row(), query = first_query + skipped + 2 * t;
        hide(scores, [&](int piece, int half, int j) {
            int q = query + 8 * piece + j;
            return key + 8 * half > q || SPANS && q > (half ? last_query_high : last_query_low);
        });
    }
    const float *of_lse = Memory::ring_rows<float>(slot, LSE) + skipped + 2 * t, *of_delta = Memory::ring_rows<float>(slot, DELTA) + skipped + 2 * t;
    #pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        float2 log_sums = *reinterpret_cast<const float2*>(of_lse + 8 * piece);
        #pragma unroll
        for (int i = 0; i < 4; i++) scores[piece][i] = ex2(fmaf(scores[piece][i], c, -(i % 2 ? log_sums.y : log_sums.x)));
    }
    wgmma_wait<0>();
    wgmma_hold(grads);
    unsigned p_rounded[PIECES / 2][4], ds_rounded[PIECES / 2][4];
    #pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        float2 deltas = *reinterpret_cast<const float2*>(of_delta + 8 * piece);
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const float *p = &scores[piece][2 * half], *dp = &grads[piece][2 * half];
            p_rounded[piece / 2][piece % 2 * 2 + half] = pack_bf16(p[0], p[1]);
            ds_rounded[piece / 2][piece % 2 * 2 + half] = pack_bf16(p[0] * (dp[0] - deltas.x), p[1] * (dp[1] - deltas.y));
        }
    }
    // Without this, two registers spill with SEES 2.
    __syncwarp();
    wgmma_hold(p_rounded), wgmma_hold(ds_rounded);
    wgmma_hold(v_sums), wgmma_hold(k_sums);
    wgmma_fence();
    multiply_add(v_sums, p_rounded, do_tile, !is_first);
    multiply_add(k_sums, ds_rounded, q_tile, !is_first);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(v_sums), wgmma_hold(k_sums);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_dkv(
    const __grid_constant__ BoxMap q, const __grid_constant__ BoxMap k, const __grid_constant__ BoxMap v, const __grid_constant__ BoxMap dout,
    const __grid_constant__ BoxMap dk, const __grid_constant__ BoxMap dv, const float* lse, const float* delta, const int* last_queries, int n_batches,
    int n_key_heads, int group_size, int n, float scale) {
    const int n_blocks = ceil_div(n, ROWS);
    const unsigned own_barriers = Memory::own_barriers(), ring_barriers = Memory::ring_barriers();
    Memory::init();
    Memory::OwnRing own;
    Memory::PairRing ring;

    if (threadIdx.x < GROUP) {
        registers_give<40>();
        for (Tiles<false> tiles(n, n_batches, n_key_heads); threadIdx.x == 0 && tiles.has_one(); tiles.next()) {
            const auto [block, first, sequence, key_head, batch] = tiles.tile();
            own.wait_empty(own_barriers);
            mbarrier_expect(own.full(own_barriers), 2 * TILE_BYTES + SPANS * NUMBERS_BYTES);
            box_load(Memory::own_tile(own.slot, K), k, 0, first, key_head, batch, own.full(own_barriers));
            box_load(Memory::own_tile(own.slot, V), v, 0, first, key_head, batch, own.full(own_barriers));
            int last_block = n_blocks - 1;
            if constexpr (SPANS) {
                const int* of_tile = last_queries + (i64)batch * padded(n) + first;
                bulk_load(smem_address(Memory::own_rows<int>(own.slot, LAST_QUERY)), of_tile, NUMBERS_BYTES, own.full(own_barriers));
                last_block = of_tile[ROWS - 1] / ROWS;
            }
            own.next();
            for (int head = key_head * group_size; head < (key_head + 1) * group_size; head++) {
                const i64 at = ((i64)batch * (n_key_heads * group_size) + head) * padded(n);
                for (int query_block = CAUSAL ? block : 0; query_block <= last_block; query_block++, ring.next()) {
                    const int first_query = query_block * ROWS;
                    copy_pair<Memory>(ring, q, dout, first_query, head, batch, 2 * NUMBERS_BYTES);
                    const unsigned full = ring.full(ring_barriers);
                    bulk_load(smem_address(Memory::ring_rows<float>(ring.slot, LSE)), lse + at + first_query, NUMBERS_BYTES, full);
                    bulk_load(smem_address(Memory::ring_rows<float>(ring.slot, DELTA)), delta + at + first_query, NUMBERS_BYTES, full);
                }
            }
        }
    } else {
        registers_take<232>();
        const float c = scale * LOG2_E;
        unsigned sent_from = 0;
        for (Tiles<false> tiles(n, n_batches, n_key_heads); tiles.has_one(); tiles.next(), own.next()) {
            const auto [block, first, sequence, key_head, batch] = tiles.tile();
            const int first_block = CAUSAL ? block : 0;
            const unsigned k_tile = Memory::own_tile(own.slot, K), v_tile = Memory::own_tile(own.slot, V);
            own.wait_full(own_barriers);
            int last_block = n_blocks - 1, last_query[2] = {};
            const int* own_lasts = Memory::own_rows<int>(own.slot, LAST_QUERY);
            if constexpr (SPANS) {
                last_block = own_lasts[ROWS - 1] / ROWS;
                last_query[0] = own_lasts[own_row()], last_query[1] = own_lasts[own_row() + 8];
            }
            float k_sums[D_HEAD / 8][4], v_sums[D_HEAD / 8][4];
            bool is_first = true;
            for (int head = 0; head < group_size; head++) {
                for (int query_block = first_block; query_block <= last_block; query_block++, ring.next(), is_first = false) {
                    ring.wait_full(ring_barriers);
                    const int first_query = query_block * ROWS;
                    const bool is_diagonal = CAUSAL && query_block == block;
                    const bool has_border = SPANS && first_query + ROWS - 1 > own_lasts[0];
                    if (is_diagonal) {
                        for (int half = own_group(); half < GROUPS; half++) {
                            add_queries<8>(v_sums, k_sums, k_tile, v_tile, ring.slot, c, first, first_query, half * GROUP_ROWS, last_query[0], last_query[1], true, is_first);
                            is_first = false;
                        }
                    } else {
                        add_queries<16>(v_sums, k_sums, k_tile, v_tile, ring.slot, c, first, first_query, 0, last_query[0], last_query[1], has_border, is_first);
                    }
                    ring.hand_back(ring.empty(ring_barriers));
                    if (sent_from) hand_back_sent<Memory>(sent_from);
                    sent_from = 0;
                }
            }
            // Of the tiles of keys and values each group has read its own rows only.
            send(dk, k_sums, scale, scale, k_tile, first, key_head, batch, n);
            send(dv, v_sums, 1.f, 1.f, v_tile, first, key_head, batch, n);
            sent_from = own.empty(own_barriers);
        }
        wait_for_sent();
    }
}
#endif
