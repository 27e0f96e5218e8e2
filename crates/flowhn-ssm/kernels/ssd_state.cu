// The pass of SSD's state over the chunks of a sequence, alone: forward for the segments of a long sequence, reverse for the
// gradient by the state.
//
//   forward   h <- 2^(s_end) h + x^T (2^(s_end - s_j) dt_j b)            chunks in order
//   REVERSE   h <- 2^(s_end) h + dy^T (2^(s_i) c)                        chunks from the last
//
//   x (dy) [batch, seq_len, n_heads, d_head], b (c) [batch, seq_len, n_groups, d_state] bf16, any strides, last axis dense.
//   states (optional) bf16 [batch, chunks, n_heads, d_head, d_state]: what comes to each chunk. last f32
//   [batch, segments, n_heads, d_head, d_state]: what leaves each segment; decays (optional) [batch, segments, n_heads]: by how much
//   a segment multiplies what comes to it.
//
// A block of 8 warps takes one head (or 64 channels of a wider one) of one segment; the state stays in f32 registers, three
// chunks are under way, one barrier a chunk.
//
// ssd_carry then turns what left the segments into what comes to them, one thread an element.
#include "ssd_tile.cuh"

constexpr int P = P_TILE, N = N_TILE, THREADS = 256, STAGES = 3;
constexpr bool ALIGN16 = ALIGNED;
constexpr int STATE_M = P / 32, STATE_N = N / 32;
constexpr int STAGE_BYTES = Tile<N>::bytes(CHUNK) + Tile<P>::bytes(CHUNK) + sizeof(Steps);

extern "C" __global__ void __launch_bounds__(THREADS, N <= 128 ? 2 : 1) ssd_state(
    const bf16* x, i64 x_b, i64 x_l, i64 x_h, const Steps* steps,
    const bf16* b, i64 b_b, i64 b_l, i64 b_g, const float* initial,
    bf16* states, float* last, float* decays,
    int seq_len, int n_heads, int n_groups, int d_head, int d_state, int p_blocks, int n_segments, int segment_chunks) {
    char* memory = shared_memory();
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int head_blocks = n_heads * p_blocks;
    int head = blockIdx.x % head_blocks / p_blocks, p0 = blockIdx.x % p_blocks * P;
    int segment = blockIdx.x / head_blocks % n_segments, batch = blockIdx.x / head_blocks / n_segments;
    int group = head / (n_heads / n_groups);
    int n_chunks = (seq_len + CHUNK - 1) / CHUNK;
    int begin = segment * segment_chunks, n_own = min(segment_chunks, n_chunks - begin);
    int n_p = min(P, d_head - p0);
    x += batch * x_b + head * x_h + p0, b += batch * b_b + group * b_g;
    steps += (i64)batch * n_chunks * n_heads + head;
    auto chunk_at = [&](int i) { return REVERSE ? begin + n_own - 1 - i : begin + i; };

    int state_p = warp % 2 * (P / 2), state_n = warp / 2 * (N / 4);
    float state[STATE_M][STATE_N][4];
    i64 state_at = (((i64)batch * n_segments + segment) * n_heads + head) * d_head + p0;
    #pragma unroll
    for (int m = 0; m < STATE_M; m++)
        #pragma unroll
        for (int n = 0; n < STATE_N; n++)
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                int pi = state_p + m * 16 + g + k / 2 * 8, ni = state_n + n * 8 + 2 * t + k % 2;
                state[m][n][k] = initial && pi < n_p && ni < d_state ? initial[(state_at + pi) * d_state + ni] : 0.f;
            }

    auto b_tile = [&](int i) { return Tile<N>{memory + i % STAGES * STAGE_BYTES}; };
    auto x_tile = [&](int i) { return Tile<P>{memory + i % STAGES * STAGE_BYTES + Tile<N>::bytes(CHUNK)}; };
    auto steps_at = [&](int i) { return reinterpret_cast<const Steps*>(memory + (i % STAGES + 1) * STAGE_BYTES - sizeof(Steps)); };
    auto load = [&](int i) {
        if (i < n_own) {
            int first = chunk_at(i) * CHUNK, rows = min(CHUNK, seq_len - first);
            load_tile<CHUNK, N, THREADS, ALIGN16>(b_tile(i), b + first * b_l, b_l, rows, d_state);
            load_tile<CHUNK, P, THREADS, ALIGN16>(x_tile(i), x + first * x_l, x_l, rows, n_p);
            load_steps(steps_at(i), steps + (i64)chunk_at(i) * n_heads);
        }
        cp_async_commit();
    };
    #pragma unroll
    for (int i = 0; i < STAGES - 1; i++) load(i);
    float total = 1.f;
    for (int i = 0; i < n_own; i++) {
        const Steps& own = *steps_at(i);
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        load(i + STAGES - 1);
        if (states) {
            #pragma unroll
            for (int m = 0; m < STATE_M; m++)
                #pragma unroll
                for (int k = 0; k < 2; k++) {
                    int pi = state_p + m * 16 + g + k * 8;
                    unsigned pairs[STATE_N];
                    #pragma unroll
                    for (int n = 0; n < STATE_N; n++) pairs[n] = pack_bf16(state[m][n][2 * k], state[m][n][2 * k + 1]);
                    bf16* out = states + ((((i64)batch * n_chunks + chunk_at(i)) * n_heads + head) * d_head + p0 + pi) * d_state;
                    store_row<STATE_N, ALIGN16>(out, state_n, d_state, pi < n_p, pairs);
                }
        }
        float decay = own.from_start[CHUNK - 1];
        total *= decay;
        // A decay of 0 clears whatever was there.
        #pragma unroll
        for (int m = 0; m < STATE_M; m++)
            #pragma unroll
            for (int n = 0; n < STATE_N; n++)
                #pragma unroll
                for (int k = 0; k < 4; k++)
                    if (decay == 0.f) state[m][n][k] = 0.f;
                    else state[m][n][k] *= decay;
        #pragma unroll
        for (int k = 0; k < CHUNK / 16; k++) {
            unsigned xs[STATE_M][4];
            #pragma unroll
            for (int m = 0; m < STATE_M; m++) {
                load_a_trans(xs[m], x_tile(i), state_p + m * 16, k * 16);
                if constexpr (REVERSE) {
                    // Not rounded to bf16 before the product: what is read from this state sums over all later chunks.
                    float2 early = *reinterpret_cast<const float2*>(&own.from_start[k * 16 + 2 * t]);
                    float2 late = *reinterpret_cast<const float2*>(&own.from_start[k * 16 + 8 + 2 * t]);
                    xs[m][0] = scale_pair(xs[m][0], early.x, early.y), xs[m][1] = scale_pair(xs[m][1], early.x, early.y);
                    xs[m][2] = scale_pair(xs[m][2], late.x, late.y), xs[m][3] = scale_pair(xs[m][3], late.x, late.y);
                } else {
                    scale_columns(xs[m], own.to_end[k * 8 + t], own.to_end[k * 8 + 4 + t]);
                }
            }
            #pragma unroll
            for (int n = 0; n < STATE_N; n += 2) {
                unsigned bs[2][2];
                load_b_trans(bs, b_tile(i), k * 16, state_n + n * 8);
                #pragma unroll
                for (int m = 0; m < STATE_M; m++) {
                    add_product(state[m][n], xs[m], bs[0]);
                    add_product(state[m][n + 1], xs[m], bs[1]);
                }
            }
        }
    }

    if (decays && threadIdx.x == 0 && p0 == 0) decays[((i64)batch * n_segments + segment) * n_heads + head] = total;
    if (last == nullptr) return;
    #pragma unroll
    for (int m = 0; m < STATE_M; m++)
        #pragma unroll
        for (int n = 0; n < STATE_N; n++)
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                int pi = state_p + m * 16 + g + k / 2 * 8, ni = state_n + n * 8 + 2 * t + k % 2;
                if (pi < n_p && ni < d_state) last[(state_at + pi) * d_state + ni] = state[m][n][k];
            }
}

// In place: states [batch, segments, n_heads, size] from what left each segment to what comes to it.
extern "C" __global__ void ssd_carry(float* states, const float* decays, const float* initial, int n_segments, int n_heads, int size) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, head_size = (i64)n_heads * size;
    int batch = blockIdx.y;
    if (i >= head_size) return;
    float state = initial ? initial[batch * head_size + i] : 0.f;
    // Eight segments at a time, so that their reads do not wait for each other.
    int head = (int)(i / size);
    for (int first = 0; first < n_segments; first += 8) {
        float own[8], decay[8];
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            if (first + k >= n_segments) continue;
            i64 at = (i64)batch * n_segments + (REVERSE ? n_segments - 1 - first - k : first + k);
            own[k] = states[at * head_size + i], decay[k] = decays[at * n_heads + head];
        }
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            if (first + k >= n_segments) continue;
            i64 at = (i64)batch * n_segments + (REVERSE ? n_segments - 1 - first - k : first + k);
            states[at * head_size + i] = state;
            state = (decay[k] == 0.f ? 0.f : decay[k] * state) + own[k];
        }
    }
}
