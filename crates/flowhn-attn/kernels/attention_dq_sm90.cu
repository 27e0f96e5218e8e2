// The gradient of the queries of attention on Hopper, and what the kernel for keys and values needs.
//
//   P = exp(scale q k^T - lse ln 2),   delta = sum over d of do o,   dS = P (do v^T - delta),   dq = scale dS k
//
//   q, o, do, dq  boxes of [batch, heads, n, 64], bf16: 128 rows, dq 16;   k, v  of [batch, key heads, n, 64], 128 rows
//   lse         [batch, heads, padded(n)], f32, base 2, a large number behind n;   delta  the same, written, 0 there
//   first_keys  [batch, padded(n)], i32, with SEES 2: the first key that a query sees; never less than that of the query before
//
// Tiles are of queries. Of the keys at the diagonal the first group sees the first half only. The product with the keys is under way while the
// next two begin.
//
// Variants: STAGES, SEES.
#include "attention_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int Q = 0, DO = 1, O = 2, K = 0, V = 1, LSE = 0, FIRST_KEY = 1;
typedef Layout<3, 1 + SPANS, 0> Memory;

// The sum over a row of do o, of which a lane has 16 of 64 columns; all four lanes of the row have it.
__device__ __forceinline__ float row_delta(unsigned o_tile, unsigned do_tile, int row) {
    float sum = 0.f;
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        unsigned at = row * ROW_BYTES + ((threadIdx.x % 4 * 2 + i) ^ row % 8) * 16;
        float a[8], b[8];
        load_vec<8>(a, reinterpret_cast<const bf16*>(shared_memory() + (o_tile - smem_address(shared_memory())) + at));
        load_vec<8>(b, reinterpret_cast<const bf16*>(shared_memory() + (do_tile - smem_address(shared_memory())) + at));
        #pragma unroll
        for (int j = 0; j < 8; j++) sum = fmaf(a[j], b[j], sum);
    }
    sum += __shfl_xor_sync(FULL_WARP, sum, 1);
    return sum + __shfl_xor_sync(FULL_WARP, sum, 2);
}

// What a thread knows of its two queries.
struct Own {
    float lse[2], delta[2];
    int first_key[2];
};

// dS of the group's queries and 8 PIECES keys times those keys, begun; `held` is the barrier of the slot that is read until then, or 0.
template <int PIECES> __device__ __forceinline__ void add_keys(float (&sums)[D_HEAD / 8][4], unsigned own_q, unsigned own_do, unsigned k_tile,
                                                               unsigned v_tile, const Own& own, float c, int first, int first_key, int n, bool has_border,
                                                               bool is_first, unsigned held) {
    float scores[PIECES][4], grads[PIECES][4];
    wgmma_fence();
    multiply(scores, own_q, own_group(), k_tile);
    wgmma_commit();
    multiply(grads, own_do, own_group(), v_tile);
    wgmma_commit();
    wgmma_wait<1>();
    wgmma_hold(scores);
    if (held) Memory::PairRing::hand_back(held);
    if (has_border) {
        const int query = first + own_row(), key = first_key + threadIdx.x % 4 * 2;
        hide(scores, [&](int piece, int half, int j) {
            int k = key + 8 * piece + j, q = query + 8 * half;
            return CAUSAL ? k > q || SPANS && k < own.first_key[half] : k >= n;
        });
    }
    #pragma unroll
    for (int i = 0; i < 4 * PIECES; i++) scores[i / 4][i % 4] = ex2(fmaf(scores[i / 4][i % 4], c, -own.lse[i % 4 / 2]));
    wgmma_wait<0>();
    wgmma_hold(grads);
    unsigned rounded[PIECES / 2][4];
    #pragma unroll
    for (int i = 0; i < 2 * PIECES; i++) {
        int piece = i / 2, half = i % 2;
        const float *p = &scores[piece][2 * half], *dp = &grads[piece][2 * half];
        rounded[piece / 2][piece % 2 * 2 + half] = pack_bf16(p[0] * (dp[0] - own.delta[half]), p[1] * (dp[1] - own.delta[half]));
    }
    wgmma_hold(rounded);
    wgmma_hold(sums);
    wgmma_fence();
    multiply_add(sums, rounded, k_tile, !is_first);
    wgmma_commit();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_dq(
    const __grid_constant__ BoxMap q, const __grid_constant__ BoxMap k, const __grid_constant__ BoxMap v, const __grid_constant__ BoxMap o,
    const __grid_constant__ BoxMap dout, const __grid_constant__ BoxMap dq, const float* lse, float* delta, const int* first_keys, int n_batches,
    int n_heads, int group_size, int n, float scale) {
    const int n_blocks = ceil_div(n, ROWS);
    const unsigned own_barriers = Memory::own_barriers(), ring_barriers = Memory::ring_barriers();
    Memory::init();
    Memory::OwnRing own;
    Memory::PairRing ring;

    if (threadIdx.x < GROUP) {
        registers_give<40>();
        for (Tiles<true> tiles(n, n_batches, n_heads); threadIdx.x == 0 && tiles.has_one(); tiles.next()) {
            const auto [block, first, sequence, head, batch] = tiles.tile();
            const int key_head = head / group_size;
            own.wait_empty(own_barriers);
            mbarrier_expect(own.full(own_barriers), 3 * TILE_BYTES + (1 + SPANS) * NUMBERS_BYTES);
            box_load(Memory::own_tile(own.slot, Q), q, 0, first, head, batch, own.full(own_barriers));
            box_load(Memory::own_tile(own.slot, DO), dout, 0, first, head, batch, own.full(own_barriers));
            box_load(Memory::own_tile(own.slot, O), o, 0, first, head, batch, own.full(own_barriers));
            const float* of_lse = lse + (i64)sequence * padded(n) + first;
            bulk_load(smem_address(Memory::own_rows<float>(own.slot, LSE)), of_lse, NUMBERS_BYTES, own.full(own_barriers));
            int first_block = 0;
            if constexpr (SPANS) {
                const int* of_tile = first_keys + (i64)batch * padded(n) + first;
                bulk_load(smem_address(Memory::own_rows<int>(own.slot, FIRST_KEY)), of_tile, NUMBERS_BYTES, own.full(own_barriers));
                first_block = of_tile[0] / ROWS;
            }
            own.next();
            for (int key_block = first_block; key_block < (CAUSAL ? block + 1 : n_blocks); key_block++, ring.next()) {
                copy_pair<Memory>(ring, k, v, key_block * ROWS, key_head, batch, 0);
            }
        }
    } else {
        registers_take<232>();
        const float c = scale * LOG2_E;
        unsigned sent_from = 0;
        for (Tiles<true> tiles(n, n_batches, n_heads); tiles.has_one(); tiles.next(), own.next()) {
            const auto [block, first, sequence, head, batch] = tiles.tile();
            const unsigned q_tile = Memory::own_tile(own.slot, Q), do_tile = Memory::own_tile(own.slot, DO), o_tile = Memory::own_tile(own.slot, O);
            own.wait_full(own_barriers);
            Own mine;
            const int* own_firsts = Memory::own_rows<int>(own.slot, FIRST_KEY);
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = own_row() + 8 * half;
                mine.lse[half] = Memory::own_rows<float>(own.slot, LSE)[row];
                mine.first_key[half] = SPANS ? own_firsts[row] : 0;
                mine.delta[half] = row_delta(o_tile, do_tile, row);
                if (threadIdx.x % 4 == 0) delta[(i64)sequence * padded(n) + first + row] = mine.delta[half];
            }
            if (sent_from) hand_back_sent<Memory>(sent_from);
            const int first_block = SPANS ? own_firsts[0] / ROWS : 0, last_block = CAUSAL ? block : n_blocks - 1;
            float sums[D_HEAD / 8][4];
            unsigned held = 0;
            for (int key_block = first_block; key_block < last_block; key_block++, ring.next()) {
                ring.wait_full(ring_barriers);
                const bool has_border = SPANS && key_block * ROWS < own_firsts[ROWS - 1];
                add_keys<16>(sums, q_tile, do_tile, Memory::ring_tile(ring.slot, K), Memory::ring_tile(ring.slot, V), mine, c, first, key_block * ROWS, n,
                             has_border, key_block == first_block, held);
                held = ring.empty(ring_barriers);
            }
            ring.wait_full(ring_barriers);
            const unsigned k_tile = Memory::ring_tile(ring.slot, K), v_tile = Memory::ring_tile(ring.slot, V);
            const bool has_border = CAUSAL || last_block * ROWS + ROWS > n;
            if constexpr (CAUSAL) {
                for (int half = 0; half <= own_group(); half++) {
                    const int skipped = half * GROUP_ROWS;
                    add_keys<8>(sums, q_tile, do_tile, k_tile + skipped * ROW_BYTES, v_tile + skipped * ROW_BYTES, mine, c, first,
                                last_block * ROWS + skipped, n, has_border, first_block == last_block && half == 0, held);
                    held = 0;
                }
            } else {
                add_keys<16>(sums, q_tile, do_tile, k_tile, v_tile, mine, c, first, last_block * ROWS, n, has_border, first_block == last_block, held);
            }
            wgmma_wait<0>();
            wgmma_hold(sums);
            ring.hand_back(ring.empty(ring_barriers));
            ring.next();
            send(dq, sums, scale, scale, q_tile, first, head, batch, n);
            sent_from = own.empty(own_barriers);
        }
        wait_for_sent();
    }
}
#endif
