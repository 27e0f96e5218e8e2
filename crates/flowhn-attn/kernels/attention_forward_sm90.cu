// Attention on Hopper.
//
//   o = softmax(scale q k^T) v,   lse = log2 sum exp(scale q k^T)
//
//   q, o  boxes of [batch, heads, n, 64], bf16: 128 rows, o 16;   k, v  of [batch, key heads, n, 64], 128 rows
//   lse   [batch, heads, padded(n)], f32, written, a large number behind n; or none
//   first_keys  [batch, padded(n)], i32, with SEES 2: the first key that a query sees, never less than that of the query before; below 0 for NaN
//
// Tiles are of queries. Each begins with its last keys, of which most rows see some, and goes on with the others from the first on. The products of one
// step's weights with v are begun together with the next step's scores. One group's exponentials pass beside the other's products.
//
// Variants: STAGES, SEES.
#include "attention_sm90.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int Q = 0, FIRST_KEY = 0, K = 0, V = 1;
typedef Layout<1, SPANS, 0> Memory;

// Below all scores, and with them a number.
constexpr float LOWEST = -1e30f;
// Written as the logarithm of the sum of rows behind `n`: it makes all their weights 0.
constexpr float NO_WEIGHT = 1e30f;

// The softmax of a thread's two rows so far: the largest score, and the sum over the thread's own columns of exp(scale (score - largest)).
struct Softmax {
    float largest[2], sum[2];

    // Turns scores into weights; what was summed before counts `kept` times as much from now on.
    template <int PIECES> __device__ __forceinline__ void take(float (&scores)[PIECES][4], float c, float (&kept)[2]) {
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            float now = largest[half];
            #pragma unroll
            for (int piece = 0; piece < PIECES; piece++) now = fmaxf(now, fmaxf(scores[piece][2 * half], scores[piece][2 * half + 1]));
            now = fmaxf(now, __shfl_xor_sync(FULL_WARP, now, 1));
            now = fmaxf(now, __shfl_xor_sync(FULL_WARP, now, 2));
            kept[half] = ex2((largest[half] - now) * c);
            largest[half] = now;
            sum[half] *= kept[half];
            const float shift = now * c;
            #pragma unroll
            for (int i = 0; i < 2 * PIECES; i++) {
                float& score = scores[i / 2][2 * half + i % 2];
                score = ex2(fmaf(score, c, -shift));
                sum[half] += score;
            }
        }
    }
};

__device__ __forceinline__ void scale_rows(float (&sums)[D_HEAD / 8][4], const float (&by)[2]) {
    #pragma unroll
    for (int i = 0; i < D_HEAD / 2; i++) sums[i / 4][i % 4] *= by[i % 4 / 2];
}

template <int PIECES> __device__ __forceinline__ void round_weights(unsigned (&rounded)[PIECES / 2][4], const float (&weights)[PIECES][4]) {
    #pragma unroll
    for (int i = 0; i < 2 * PIECES; i++) rounded[i / 4][i % 4] = pack_bf16(weights[i / 2][i % 2 * 2], weights[i / 2][i % 2 * 2 + 1]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) attention_forward(
    const __grid_constant__ BoxMap q, const __grid_constant__ BoxMap k, const __grid_constant__ BoxMap v, const __grid_constant__ BoxMap o, float* lse,
    const int* first_keys, int n_batches, int n_heads, int group_size, int n, float scale) {
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
            mbarrier_expect(own.full(own_barriers), TILE_BYTES + SPANS * NUMBERS_BYTES);
            box_load(Memory::own_tile(own.slot, Q), q, 0, first, head, batch, own.full(own_barriers));
            int first_block = 0;
            if constexpr (SPANS) {
                const int* of_tile = first_keys + (i64)batch * padded(n) + first;
                bulk_load(smem_address(Memory::own_rows<int>(own.slot, FIRST_KEY)), of_tile, NUMBERS_BYTES, own.full(own_barriers));
                first_block = of_tile[0] / ROWS;
            }
            own.next();
            const int last_block = CAUSAL ? block : n_blocks - 1;
            for (int i = first_block; i <= last_block; i++, ring.next()) {
                const int key_block = i == first_block ? last_block : i - 1;
                copy_pair<Memory>(ring, k, v, key_block * ROWS, key_head, batch, 0);
            }
        }
    } else {
        registers_take<232>();
        const int t = threadIdx.x % 4, group = own_group();
        const float c = scale * LOG2_E;
        unsigned sent_from = 0;
        for (Tiles<true> tiles(n, n_batches, n_heads); tiles.has_one(); tiles.next(), own.next()) {
            const auto [block, first, sequence, head, batch] = tiles.tile();
            const int query = first + own_row();
            const unsigned q_tile = Memory::own_tile(own.slot, Q);
            own.wait_full(own_barriers);
            const int* own_firsts = Memory::own_rows<int>(own.slot, FIRST_KEY);
            int first_block = 0, first_key[2] = {};
            if constexpr (SPANS) first_block = own_firsts[0] / ROWS, first_key[0] = own_firsts[own_row()], first_key[1] = own_firsts[own_row() + 8];
            const int last_block = CAUSAL ? block : n_blocks - 1;
            Softmax softmax{{LOWEST, LOWEST}, {0.f, 0.f}};
            float scores[16][4], sums[D_HEAD / 8][4], kept[2];
            unsigned rounded[8][4];
            auto weigh = [&](int key_block, bool has_border) {
                if (has_border) {
                    const int key = key_block * ROWS + 2 * t;
                    hide(scores, [&](int piece, int half, int j) {
                        int k = key + 8 * piece + j;
                        return CAUSAL ? k > query + 8 * half || SPANS && k < first_key[half] : k >= n;
                    });
                }
                softmax.take(scores, c, kept);
            };

            ring.wait_full(ring_barriers);
            wgmma_fence();
            multiply(scores, q_tile, group, Memory::ring_tile(ring.slot, K));
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_hold(scores);
            if (sent_from) hand_back_sent<Memory>(sent_from);
            weigh(last_block, CAUSAL || last_block * ROWS + ROWS > n);
            round_weights<16>(rounded, scores);
            wgmma_hold(rounded), wgmma_hold(sums);
            for (int key_block = first_block; key_block < last_block; key_block++) {
                const unsigned v_tile = Memory::ring_tile(ring.slot, V), held = ring.empty(ring_barriers);
                ring.next();
                ring.wait_full(ring_barriers);
                wgmma_fence();
                multiply(scores, q_tile, group, Memory::ring_tile(ring.slot, K));
                wgmma_commit();
                multiply_add(sums, rounded, v_tile, key_block > first_block);
                wgmma_commit();
                wgmma_wait<1>();
                wgmma_hold(scores);
                weigh(key_block, SPANS && key_block * ROWS < own_firsts[ROWS - 1]);
                wgmma_wait<0>();
                wgmma_hold(sums);
                Memory::PairRing::hand_back(held);
                scale_rows(sums, kept);
                round_weights<16>(rounded, scores);
                wgmma_hold(rounded), wgmma_hold(sums);
            }
            wgmma_fence();
            multiply_add(sums, rounded, Memory::ring_tile(ring.slot, V), first_block < last_block);
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_hold(sums);
            ring.hand_back(ring.empty(ring_barriers));
            ring.next();

            float inverse[2];
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                float sum = softmax.sum[half];
                sum += __shfl_xor_sync(FULL_WARP, sum, 1);
                sum += __shfl_xor_sync(FULL_WARP, sum, 2);
                if (SPANS && first_key[half] < 0) sum = __uint_as_float(0x7fc00000u);
                inverse[half] = 1.f / sum;
                if (lse && t == 0) lse[(i64)sequence * padded(n) + query + 8 * half] = query + 8 * half < n ? fmaf(softmax.largest[half], c, lg2(sum)) : NO_WEIGHT;
            }
            send(o, sums, inverse[0], inverse[1], q_tile, first, head, batch, n);
            sent_from = own.empty(own_barriers);
        }
        wait_for_sent();
    }
}
#endif
