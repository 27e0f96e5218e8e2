// ssd_forward.cu with Hopper's asynchronous products, for heads of up to 64 channels and states of up to 128, rows aligned.
//
// Formula, shapes and arguments as there. A block of one warpgroup takes one head of one sequence (or segment) and walks its chunks.
// Warp w has rows 16 w .. 16 w + 15 of every result: of the scores c b^T, of y, and of the state, which is
// [d_head, d_state] in 64 registers a thread.
//
// What makes it faster than the one for all architectures: operands come straight from shared memory, so that a chunk takes
// 24 products of the whole warpgroup instead of 750 of warps, and no loads of fragments; the scores are computed while the
// state is written to shared memory, and the weights for the next state while y is computed.
#include "ssd_panels.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int P = 64, N = 128, THREADS = 128;
constexpr int STAGE_BYTES = 5 * PANEL;  // b, c, x

// From scores to m: those that a token sees, by their decay and step size. Without RESETS a token sees all before it in the chunk, and
// `begin` is not read.
template <bool RESETS>
__device__ __forceinline__ void weigh(unsigned (&m)[4][4], const float (&scores)[8][4], const Steps& own, int warp, int row) {
    int t = threadIdx.x & 3;
    float s_row[2] = {own.s[row], own.s[row + 8]};
    #pragma unroll
    for (int n = 0; n < 8; n++) {
        float v[4] = {0.f, 0.f, 0.f, 0.f};
        if (n * 8 <= warp * 16 + 15) {
            float2 s_col = *reinterpret_cast<const float2*>(&own.s[n * 8 + 2 * t]);
            float2 dt_col = *reinterpret_cast<const float2*>(&own.dt[n * 8 + 2 * t]);
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                int i = row + k / 2 * 8, j = n * 8 + 2 * t + k % 2;
                bool seen = j <= i && (!RESETS || j >= own.begin[i]);
                float decay = ex2(s_row[k / 2] - (k % 2 ? s_col.y : s_col.x));
                v[k] = seen ? scores[n][k] * decay * (k % 2 ? dt_col.y : dt_col.x) : 0.f;
            }
        }
        m[n / 2][n % 2 * 2] = pack_bf16(v[0], v[1]), m[n / 2][n % 2 * 2 + 1] = pack_bf16(v[2], v[3]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) ssd_forward_sm90(
    const bf16* x, i64 x_b, i64 x_l, i64 x_h, const Steps* steps,
    const bf16* b, i64 b_b, i64 b_l, i64 b_g, const bf16* c, i64 c_b, i64 c_l, i64 c_g,
    const float* d, const float* initial,
    bf16* y, bf16* states, float* final_state,
    int seq_len, int n_heads, int n_groups, int d_head, int d_state, int p_blocks, int n_segments, int segment_chunks) {
    char* memory = shared_memory();
    unsigned stages = smem_address(memory);
    Panels state_tile{stages + 2 * STAGE_BYTES};
    char* state_bytes = memory + 2 * STAGE_BYTES;
    Steps* chunk_steps = reinterpret_cast<Steps*>(memory + 2 * STAGE_BYTES + 2 * PANEL);
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, row = warp * 16 + g;
    int head_blocks = n_heads * p_blocks;
    int head = blockIdx.x % head_blocks / p_blocks, p0 = blockIdx.x % p_blocks * P;
    int segment = blockIdx.x / head_blocks % n_segments, batch = blockIdx.x / head_blocks / n_segments;
    int group = head / (n_heads / n_groups);
    int n_chunks = (seq_len + CHUNK - 1) / CHUNK;
    int chunk = segment * segment_chunks, end_chunk = min(chunk + segment_chunks, n_chunks);
    int n_p = min(P, d_head - p0);
    x += batch * x_b + head * x_h + p0;
    b += batch * b_b + group * b_g, c += batch * c_b + group * c_g;
    i64 y_l = (i64)n_heads * d_head;
    y += batch * (i64)seq_len * y_l + (i64)head * d_head + p0;
    float skip = d ? d[head] : 0.f;
    steps += (i64)batch * n_chunks * n_heads + head;

    float state[N / 8][4];
    i64 state_at = (((i64)batch * n_segments + segment) * n_heads + head) * d_head + p0;
    #pragma unroll
    for (int n = 0; n < N / 8; n++)
        #pragma unroll
        for (int k = 0; k < 4; k += 2) {
            int pi = row + k * 4, ni = n * 8 + 2 * t;
            float2 v = make_float2(0.f, 0.f);
            if (initial && pi < n_p && ni < d_state) v = *reinterpret_cast<const float2*>(initial + (state_at + pi) * d_state + ni);
            state[n][k] = v.x, state[n][k + 1] = v.y;
        }

    auto load = [&](int chunk) {
        int first = chunk * CHUNK, rows = min(CHUNK, seq_len - first);
        unsigned stage = stages + (chunk & 1) * STAGE_BYTES;
        load_panels<N, THREADS>(Panels{stage}, b + first * b_l, b_l, rows, d_state);
        load_panels<N, THREADS>(Panels{stage + 2 * PANEL}, c + first * c_l, c_l, rows, d_state);
        load_panels<P, THREADS>(Panels{stage + 4 * PANEL}, x + first * x_l, x_l, rows, n_p);
        load_steps(chunk_steps + (chunk & 1), steps + (i64)chunk * n_heads);
        cp_async_commit();
    };
    load(chunk);

    for (; chunk < end_chunk; chunk++) {
        int first = chunk * CHUNK;
        unsigned stage = stages + (chunk & 1) * STAGE_BYTES;
        Panels b_tile{stage}, c_tile{stage + 2 * PANEL}, x_tile{stage + 4 * PANEL};
        const char* x_bytes = memory + (chunk & 1) * STAGE_BYTES + 4 * PANEL;
        const Steps& own = chunk_steps[chunk & 1];
        cp_async_wait<0>();
        wgmma_publish();
        __syncthreads();
        if (chunk + 1 < end_chunk) load(chunk + 1);

        float scores[8][4];
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < N / 16; k++) wgmma_64x64(scores, c_tile.along(k), b_tile.along(k), k > 0);
        wgmma_commit();

        // The state as an operand.
        #pragma unroll
        for (int n = 0; n < N / 8; n++)
            #pragma unroll
            for (int k = 0; k < 2; k++)
                *reinterpret_cast<unsigned*>(state_bytes + n / 8 * PANEL + (row + k * 8) * 128 + ((n & 7) ^ g) * 16 + t * 4) =
                    pack_bf16(state[n][2 * k], state[n][2 * k + 1]);
        wgmma_publish();

        // From scores to m, the left operand of y.
        wgmma_wait<0>();
        wgmma_hold(scores);
        unsigned mix[4][4];
        // Borders never go back, so the last token's tells of all.
        if (own.begin[CHUNK - 1] == 0) weigh<false>(mix, scores, own, warp, row);
        else weigh<true>(mix, scores, own, warp, row);
        __syncthreads();

        // y, first from the state.
        float out[8][4];
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < N / 16; k++) wgmma_64x64(out, c_tile.along(k), state_tile.along(k), k > 0);
        wgmma_commit();
        // Meanwhile x^T with the weights of its tokens in the next state.
        unsigned xs[4][4];
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            int matrix = lane >> 3;
            ldmatrix_x4_trans(xs[k], x_tile.address(k * 16 + (lane & 7) + (matrix >> 1) * 8, warp * 2 + (matrix & 1)));
            scale_columns(xs[k], own.to_end[k * 8 + t], own.to_end[k * 8 + 4 + t]);
        }
        wgmma_wait<0>();
        wgmma_hold(out);
        float keep[2] = {own.from_start[row], own.from_start[row + 8]}, decay = own.from_start[CHUNK - 1];
        // Two loops: one that asks each time makes the compiler wait for every product (C7511).
        if (decay != 0.f) {
            #pragma unroll
            for (int n = 0; n < 8; n++)
                #pragma unroll
                for (int k = 0; k < 4; k++) out[n][k] *= keep[k / 2];
        } else {
            #pragma unroll
            for (int n = 0; n < 8; n++)
                #pragma unroll
                for (int k = 0; k < 4; k++) out[n][k] = keep[k / 2] == 0.f ? 0.f : out[n][k] * keep[k / 2];
        }
        #pragma unroll
        for (int n = 0; n < N / 8; n++)
            #pragma unroll
            for (int k = 0; k < 4; k++)
                if (decay == 0.f) state[n][k] = 0.f;
                else state[n][k] *= decay;
        wgmma_hold(out);
        wgmma_hold(state);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 4; k++) wgmma_64x64(out, mix[k], x_tile.across(k), true);
        wgmma_commit();
        #pragma unroll
        for (int k = 0; k < 4; k++) wgmma_64x128(state, xs[k], b_tile.across(k), true);
        wgmma_commit();

        if (states) {
            bf16* to = states + ((((i64)batch * n_chunks + chunk) * n_heads + head) * d_head + p0) * d_state;
            int piece = threadIdx.x % 16;
            #pragma unroll 2
            for (int i = 0; i < 8; i++) {
                int pi = threadIdx.x / 16 + i * 8;
                const char* from = state_bytes + (state_tile.address(pi, piece) - state_tile.base);
                if (pi < n_p && piece * 8 < d_state)
                    *reinterpret_cast<uint4*>(to + pi * d_state + piece * 8) = *reinterpret_cast<const uint4*>(from);
            }
        }
        wgmma_wait<1>();
        wgmma_hold(out);
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            int i = row + k * 8;
            unsigned pairs[8];
            #pragma unroll
            for (int n = 0; n < 8; n++) {
                unsigned v = *reinterpret_cast<const unsigned*>(x_bytes + i * 128 + (n ^ g) * 16 + t * 4);
                pairs[n] = pack_bf16(out[n][2 * k] + skip * low_bf16(v), out[n][2 * k + 1] + skip * high_bf16(v));
            }
            store_row<8, true>(y + (first + i) * y_l, 0, n_p, first + i < seq_len, pairs);
        }
        wgmma_wait<0>();
        wgmma_hold(state);
    }

    if (end_chunk < n_chunks) return;
    i64 final_at = ((i64)batch * n_heads + head) * d_head + p0;
    #pragma unroll
    for (int n = 0; n < N / 8; n++)
        #pragma unroll
        for (int k = 0; k < 4; k += 2) {
            int pi = row + k * 4, ni = n * 8 + 2 * t;
            if (pi < n_p && ni < d_state)
                *reinterpret_cast<float2*>(final_state + (final_at + pi) * d_state + ni) = make_float2(state[n][k], state[n][k + 1]);
        }
}

#endif
