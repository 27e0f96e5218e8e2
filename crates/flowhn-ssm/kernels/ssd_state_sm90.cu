// ssd_state.cu with Hopper's asynchronous products, for heads of up to 64 channels and states of up to 128, rows aligned.
//
// Formula, shapes and arguments as there. A block of one warpgroup takes one head of one segment; warp w has rows 16 w .. 16 w + 15
// of the state. b (c) is read from shared memory as it is, x (dy) passes through registers to take the weights of its tokens. Three
// blocks a multiprocessor with two chunks under way each keep memory busy.
#include "ssd_panels.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int P = 64, N = 128, THREADS = 128, STAGES = 3;
constexpr int STAGE_BYTES = 3 * PANEL;  // b, x

extern "C" __global__ void __launch_bounds__(THREADS, 3) ssd_state_sm90(
    const bf16* x, i64 x_b, i64 x_l, i64 x_h, const Steps* steps,
    const bf16* b, i64 b_b, i64 b_l, i64 b_g, const float* initial,
    bf16* states, float* last, float* decays,
    int seq_len, int n_heads, int n_groups, int d_head, int d_state, int p_blocks, int n_segments, int segment_chunks) {
    char* memory = shared_memory();
    unsigned stages = smem_address(memory);
    Steps* chunk_steps = reinterpret_cast<Steps*>(memory + STAGES * STAGE_BYTES);
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4, row = warp * 16 + g;
    int head_blocks = n_heads * p_blocks;
    int head = blockIdx.x % head_blocks / p_blocks, p0 = blockIdx.x % p_blocks * P;
    int segment = blockIdx.x / head_blocks % n_segments, batch = blockIdx.x / head_blocks / n_segments;
    int group = head / (n_heads / n_groups);
    int n_chunks = (seq_len + CHUNK - 1) / CHUNK;
    int begin = segment * segment_chunks, n_own = min(segment_chunks, n_chunks - begin);
    int n_p = min(P, d_head - p0);
    x += batch * x_b + head * x_h + p0, b += batch * b_b + group * b_g;
    steps += (i64)batch * n_chunks * n_heads + head;
    if (states) states += (((i64)batch * n_chunks * n_heads + head) * d_head + p0) * d_state;
    auto chunk_at = [&](int i) { return REVERSE ? begin + n_own - 1 - i : begin + i; };

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

    auto load = [&](int i) {
        if (i < n_own) {
            int first = chunk_at(i) * CHUNK, rows = min(CHUNK, seq_len - first);
            unsigned stage = stages + i % STAGES * STAGE_BYTES;
            load_panels<N, THREADS>(Panels{stage}, b + first * b_l, b_l, rows, d_state);
            load_panels<P, THREADS>(Panels{stage + 2 * PANEL}, x + first * x_l, x_l, rows, n_p);
            load_steps(chunk_steps + i % STAGES, steps + (i64)chunk_at(i) * n_heads);
        }
        cp_async_commit();
    };
    #pragma unroll
    for (int i = 0; i < STAGES - 1; i++) load(i);

    float total = 1.f;
    for (int i = 0; i < n_own; i++) {
        unsigned stage = stages + i % STAGES * STAGE_BYTES;
        Panels b_tile{stage}, x_tile{stage + 2 * PANEL};
        const Steps& own = chunk_steps[i % STAGES];
        cp_async_wait<STAGES - 2>();
        wgmma_publish();
        __syncthreads();
        load(i + STAGES - 1);
        if (states) {
            bf16* out = states + (i64)chunk_at(i) * n_heads * d_head * d_state;
            #pragma unroll
            for (int k = 0; k < 2; k++) {
                int pi = row + k * 8;
                unsigned pairs[N / 8];
                #pragma unroll
                for (int n = 0; n < N / 8; n++) pairs[n] = pack_bf16(state[n][2 * k], state[n][2 * k + 1]);
                store_row<N / 8, true>(out + (i64)pi * d_state, 0, d_state, pi < n_p, pairs);
            }
        }
        float decay = own.from_start[CHUNK - 1];
        total *= decay;
        #pragma unroll
        for (int n = 0; n < N / 8; n++)
            #pragma unroll
            for (int k = 0; k < 4; k++)
                if (decay == 0.f) state[n][k] = 0.f;
                else state[n][k] *= decay;
        unsigned xs[4][4];
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            int matrix = lane >> 3;
            ldmatrix_x4_trans(xs[k], x_tile.address(k * 16 + (lane & 7) + (matrix >> 1) * 8, warp * 2 + (matrix & 1)));
            if constexpr (REVERSE) {
                float2 early = *reinterpret_cast<const float2*>(&own.from_start[k * 16 + 2 * t]);
                float2 late = *reinterpret_cast<const float2*>(&own.from_start[k * 16 + 8 + 2 * t]);
                xs[k][0] = scale_pair(xs[k][0], early.x, early.y), xs[k][1] = scale_pair(xs[k][1], early.x, early.y);
                xs[k][2] = scale_pair(xs[k][2], late.x, late.y), xs[k][3] = scale_pair(xs[k][3], late.x, late.y);
            } else {
                scale_columns(xs[k], own.to_end[k * 8 + t], own.to_end[k * 8 + 4 + t]);
            }
        }
        wgmma_hold(state);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 4; k++) wgmma_64x128(state, xs[k], b_tile.across(k), true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(state);
    }

    if (decays && threadIdx.x == 0 && p0 == 0) decays[((i64)batch * n_segments + segment) * n_heads + head] = total;
    if (last == nullptr) return;
    #pragma unroll
    for (int n = 0; n < N / 8; n++)
        #pragma unroll
        for (int k = 0; k < 4; k += 2) {
            int pi = row + k * 4, ni = n * 8 + 2 * t;
            if (pi < n_p && ni < d_state)
                *reinterpret_cast<float2*>(last + (state_at + pi) * d_state + ni) = make_float2(state[n][k], state[n][k + 1]);
        }
}

#endif
