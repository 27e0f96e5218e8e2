// SSD (Mamba-2) forward: h_t = 2^(step_t) h_{t-1} + dt_t x_t b_t^T,  y_t = h_t c_t + d x_t, a state [d_head, d_state] per head.
//
//   x [batch, seq_len, n_heads, d_head], b and c [batch, seq_len, n_groups, d_state] bf16, any strides, last axis dense; steps from
//   ssd_steps.cu; d, initial f32. y bf16, final_state f32; states bf16 [batch, chunks, n_heads, d_head, d_state]: the
//   state before each chunk, for the backward.
//
// A block of 8 warps takes one head (or 64 channels of a wider one) of one sequence, or of one segment of it, and walks its chunks
// of 64 tokens in order. With s the running sums of the steps, a chunk is four matrix products:
//
//   m  = (c b^T) 2^(s_i - s_j) dt_j, j <= i          y = m x + 2^(s_i) (c h^T) + d x
//   h <- 2^(s_end) h + x^T (2^(s_end - s_j) dt_j b)
//
// What makes it fast: x, b, c are read once and y is written once, nothing goes to memory between the products; the state
// stays in f32 registers; m goes from accumulator to operand registers without a change of layout; the copies of the next
// chunk run under the products of this one; two barriers a chunk.
#include "ssd_tile.cuh"

constexpr int P = P_TILE, N = N_TILE, THREADS = 256;
constexpr bool ALIGN16 = ALIGNED;
constexpr int STATE_M = P / 32, STATE_N = N / 32;  // a warp's share of the state: 16-row by 8-column results
constexpr int OUT_N = P / 16;                      // a warp's share of y: 16 rows by 8-column results

constexpr int STAGE_BYTES = 2 * Tile<N>::bytes(CHUNK) + Tile<P>::bytes(CHUNK) + sizeof(Steps);

// One chunk's inputs.
struct Stage {
    Tile<N> b, c;
    Tile<P> x;
    const Steps& steps;
    __device__ __forceinline__ explicit Stage(char* at) : steps(*reinterpret_cast<Steps*>(at + STAGE_BYTES - sizeof(Steps))) {
        b.base = at, c.base = at + Tile<N>::bytes(CHUNK), x.base = at + 2 * Tile<N>::bytes(CHUNK);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, N <= 128 ? 2 : 1) ssd_forward(
    const bf16* x, i64 x_b, i64 x_l, i64 x_h, const Steps* steps,
    const bf16* b, i64 b_b, i64 b_l, i64 b_g, const bf16* c, i64 c_b, i64 c_l, i64 c_g,
    const float* d, const float* initial,
    bf16* y, bf16* states, float* final_state,
    int seq_len, int n_heads, int n_groups, int d_head, int d_state, int p_blocks, int n_segments, int segment_chunks) {
    char* memory = shared_memory();
    Tile<N> state_tile{memory + 2 * STAGE_BYTES};
    // The operand fragments of m: block (i, j <= i) at i (i + 1) / 2 + j, one 16-byte vector a lane.
    uint4* mix_blocks = reinterpret_cast<uint4*>(memory + 2 * STAGE_BYTES + Tile<N>::bytes(P));
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
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

    // Warps 0..3 and 7..4 take the same rows of y, so that each scheduler has early and late rows; the two share the columns.
    int row = warp < 4 ? warp : 7 - warp, half = warp / 4;
    // The state: 2 warps along d_head, 4 along d_state.
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

    auto load = [&](int chunk) {
        int first = chunk * CHUNK, rows = min(CHUNK, seq_len - first);
        Stage stage(memory + (chunk & 1) * STAGE_BYTES);
        load_tile<CHUNK, N, THREADS, ALIGN16>(stage.b, b + first * b_l, b_l, rows, d_state);
        load_tile<CHUNK, N, THREADS, ALIGN16>(stage.c, c + first * c_l, c_l, rows, d_state);
        load_tile<CHUNK, P, THREADS, ALIGN16>(stage.x, x + first * x_l, x_l, rows, n_p);
        load_steps(&stage.steps, steps + (i64)chunk * n_heads);
        cp_async_commit();
    };
    load(chunk);

    for (; chunk < end_chunk; chunk++) {
        int first = chunk * CHUNK;
        Stage in(memory + (chunk & 1) * STAGE_BYTES);
        cp_async_wait<0>();
        __syncthreads();
        if (chunk + 1 < end_chunk) load(chunk + 1);

        // The state as an operand for all warps.
        #pragma unroll
        for (int m = 0; m < STATE_M; m++)
            #pragma unroll
            for (int k = 0; k < 2; k++) {
                int pi = state_p + m * 16 + g + k * 8;
                #pragma unroll
                for (int n = 0; n < STATE_N; n++)
                    state_tile.set_pair(pi, state_n + n * 8 + 2 * t, pack_bf16(state[m][n][2 * k], state[m][n][2 * k + 1]));
            }

        // m, shared between the two warps of a row: blocks of 16 tokens j in turn.
        float s_row[2] = {in.steps.s[row * 16 + g], in.steps.s[row * 16 + g + 8]};
        int begin[2] = {in.steps.begin[row * 16 + g], in.steps.begin[row * 16 + g + 8]};
        for (int block = half; block <= row; block += 2) {
            float score[2][4] = {};
            #pragma unroll
            for (int k = 0; k < N / 16; k++) {
                unsigned c_rows[4], b_cols[2][2];
                load_a(c_rows, in.c, row * 16, k * 16);
                load_b(b_cols, in.b, k * 16, block * 16);
                add_product(score[0], c_rows, b_cols[0]);
                add_product(score[1], c_rows, b_cols[1]);
            }
            #pragma unroll
            for (int n = 0; n < 2; n++) {
                float2 s_col = *reinterpret_cast<const float2*>(&in.steps.s[block * 16 + n * 8 + 2 * t]);
                float2 dt_col = *reinterpret_cast<const float2*>(&in.steps.dt[block * 16 + n * 8 + 2 * t]);
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    int i = row * 16 + g + k / 2 * 8, j = block * 16 + n * 8 + 2 * t + k % 2;
                    float decay = ex2(s_row[k / 2] - (k % 2 ? s_col.y : s_col.x));
                    score[n][k] = j <= i && j >= begin[k / 2] ? score[n][k] * decay * (k % 2 ? dt_col.y : dt_col.x) : 0.f;
                }
            }
            mix_blocks[(row * (row + 1) / 2 + block) * 32 + lane] =
                make_uint4(pack_bf16(score[0][0], score[0][1]), pack_bf16(score[0][2], score[0][3]),
                           pack_bf16(score[1][0], score[1][1]), pack_bf16(score[1][2], score[1][3]));
        }
        __syncthreads();

        // y
        int out_p = half * (P / 2);
        float out[OUT_N][4] = {};
        #pragma unroll
        for (int k = 0; k < N / 16; k++) {
            unsigned c_rows[4];
            load_a(c_rows, in.c, row * 16, k * 16);
            #pragma unroll
            for (int n = 0; n < OUT_N; n += 2) {
                unsigned h[2][2];
                load_b(h, state_tile, k * 16, out_p + n * 8);
                add_product(out[n], c_rows, h[0]);
                add_product(out[n + 1], c_rows, h[1]);
            }
        }
        float keep[2] = {in.steps.from_start[row * 16 + g], in.steps.from_start[row * 16 + g + 8]};
        #pragma unroll
        for (int n = 0; n < OUT_N; n++)
            #pragma unroll
            for (int k = 0; k < 4; k++) out[n][k] = keep[k / 2] == 0.f ? 0.f : out[n][k] * keep[k / 2];
        for (int block = 0; block <= row; block++) {
            uint4 v = mix_blocks[(row * (row + 1) / 2 + block) * 32 + lane];
            unsigned mix[4] = {v.x, v.y, v.z, v.w};
            #pragma unroll
            for (int n = 0; n < OUT_N; n += 2) {
                unsigned xs[2][2];
                load_b_trans(xs, in.x, block * 16, out_p + n * 8);
                add_product(out[n], mix, xs[0]);
                add_product(out[n + 1], mix, xs[1]);
            }
        }
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            int i = row * 16 + g + k * 8;
            unsigned pairs[OUT_N];
            #pragma unroll
            for (int n = 0; n < OUT_N; n++) {
                unsigned xs = in.x.pair(i, out_p + n * 8 + 2 * t);
                pairs[n] = pack_bf16(out[n][2 * k] + skip * low_bf16(xs), out[n][2 * k + 1] + skip * high_bf16(xs));
            }
            store_row<OUT_N, ALIGN16>(y + (first + i) * y_l, out_p, n_p, first + i < seq_len, pairs);
        }

        if (states) {
            bf16* out = states + ((((i64)batch * n_chunks + chunk) * n_heads + head) * d_head + p0) * d_state;
            store_tile<P, N, THREADS, ALIGN16>(out, state_tile, n_p, d_state);
        }

        // The state after the chunk.
        float decay = in.steps.from_start[CHUNK - 1];
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
            unsigned early = in.steps.to_end[k * 8 + t], late = in.steps.to_end[k * 8 + 4 + t];
            unsigned xs[STATE_M][4];
            #pragma unroll
            for (int m = 0; m < STATE_M; m++) {
                load_a_trans(xs[m], in.x, state_p + m * 16, k * 16);
                scale_columns(xs[m], early, late);
            }
            #pragma unroll
            for (int n = 0; n < STATE_N; n += 2) {
                unsigned bs[2][2];
                load_b_trans(bs, in.b, k * 16, state_n + n * 8);
                #pragma unroll
                for (int m = 0; m < STATE_M; m++) {
                    add_product(state[m][n], xs[m], bs[0]);
                    add_product(state[m][n + 1], xs[m], bs[1]);
                }
            }
        }
    }

    if (end_chunk < n_chunks) return;
    i64 final_at = ((i64)batch * n_heads + head) * d_head + p0;
    #pragma unroll
    for (int m = 0; m < STATE_M; m++)
        #pragma unroll
        for (int n = 0; n < STATE_N; n++)
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                int pi = state_p + m * 16 + g + k / 2 * 8, ni = state_n + n * 8 + 2 * t + k % 2;
                if (pi < n_p && ni < d_state) final_state[(final_at + pi) * d_state + ni] = state[m][n][k];
            }
}
