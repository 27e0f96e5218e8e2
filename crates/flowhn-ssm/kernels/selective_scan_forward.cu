// The selective scan of Mamba-1, fused with what surrounds it:
//
//     dt_t = softplus(dt_t + dt_bias)
//     h_t  = exp(dt_t a) h_{t-1} + dt_t b_t x_t
//     y_t  = (c_t h_t + d x_t) silu(z_t)
//
// x, dt, z `[batch, seq_len, d_inner]` and b, c `[batch, seq_len, d_state]` with any strides of batch and token; a
// `[d_inner, d_state]`, d and dt_bias `[d_inner]`, states f32.
//
// Grid: blocks of channels, segments of the sequence, batch. A block walks its segment in tiles of 32 tokens. Between two
// barriers its threads turn a tile's x and dt, fetched while the tile before was scanned, into step sizes in shared memory, one
// pair of channels a thread; then every lane scans 4 states of one channel (see the header), and the sums over states of 4
// tokens at a time cost 3 shuffles; last the pairs of channels are gated and stored.
//
// With one segment, start and final_state may be one tensor: each lane reads its states before the first token, writes the same after
// the last, and nobody else touches them.
//
// What makes it fast: an exponential a state and token is all the special-function work beside four of softplus and gate, which
// is what bounds the kernel; nothing is transposed, since neighbouring lanes are neighbouring channels; and the sequence is only
// cut into segments (see selective_scan_carry.cu) where channels and batch do not fill the chip.
#include "selective_scan_tile.cuh"

#ifndef MIN_BLOCKS
#define MIN_BLOCKS 3
#endif

constexpr int TILE = 32;
constexpr int STEPS = TILE / ROWS;

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
selective_scan_forward(X* y, float* final_state, float* chunk_states, const X* x, const Dt* dt, const Z* z, const B* b,
                       const C* c, i64 x_batch, i64 x_token, i64 dt_batch, i64 dt_token, i64 z_batch, i64 z_token,
                       i64 b_batch, i64 b_token, i64 c_batch, i64 c_token, const float* a, const float* d,
                       const float* dt_bias, const float* start, const unsigned char* reset, i64 reset_batch,
                       i64 reset_token, int seq_len, int d_inner, int d_state, int segment_len) {
    float* steps = reinterpret_cast<float*>(shared_memory());   // [TILE][CHANNELS] pairs of dt and dt x
    float* sums = steps + TILE * CHANNELS * 2;                  // [TILE][SUM_STRIDE] c h
    float* b_tile = sums + TILE * SUM_STRIDE;                   // [TILE][SLICE]
    float* c_tile = b_tile + TILE * SLICE;
    float4* slices = reinterpret_cast<float4*>(c_tile + TILE * SLICE);  // [SLICES][THREADS] states, if they are not in registers

    int tid = threadIdx.x, lane = tid % 32, group = lane / 8;
    int channel = tid / 32 * 8 + lane % 8, e = blockIdx.x * CHANNELS + channel;
    int pair = tid % PAIRS * 2, pair_e = blockIdx.x * CHANNELS + pair, row = tid / PAIRS;
    i64 batch = blockIdx.z;
    int n_segments = gridDim.y, segment = blockIdx.y;
    int first = segment * segment_len, end = min(seq_len, first + segment_len);
    int n_chunks = (seq_len + CHUNK - 1) / CHUNK;
    x += batch * x_batch, dt += batch * dt_batch, b += batch * b_batch, c += batch * c_batch;
    y += batch * seq_len * d_inner;
    if (GATED) z += batch * z_batch;
    if (start) start += (batch * n_segments + segment) * d_inner * d_state;

    int width = max(0, min(2, d_inner - pair_e));
    float2 skip = load_parameters(d, pair_e, width), bias = load_parameters(dt_bias, pair_e, width);
    const X* x_at = x + (first + row) * x_token + pair_e;
    const Dt* dt_at = dt + (first + row) * dt_token + pair_e;
    const Z* z_at = GATED ? z + (first + row) * z_token + pair_e : z;
    X* y_at = y + (i64)(first + row) * d_inner + pair_e;

    // Decay rates are scaled so that a decay is one power of two.
    States rate, h;
    #pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
        h = load_states(start, e, slice * SLICE + group * 4, d_inner, d_state);
        if (SLICES > 1) slices[slice * THREADS + tid] = to_float4(h);
    }
    if (SLICES == 1) rate = load_states(a, e, group * 4, d_inner, d_state);
    #pragma unroll
    for (int i = 0; i < 4; i++) rate.v[i] *= LOG2_E;

    Pair<X> x_next[STEPS];
    Pair<Dt> dt_next[STEPS];
    Pair<Z> z_next[STEPS];
    StateTile<B, TILE> b_next;
    StateTile<C, TILE> c_next;
    auto fetch_channels = [&](int token) {
        #pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int w = token + row + k * ROWS < end ? width : 0;
            x_next[k] = load_pair<PAIRED_CHANNELS>(x_at, w);
            dt_next[k] = load_pair<PAIRED_CHANNELS>(dt_at, w);
            if (GATED) z_next[k] = load_pair<PAIRED_CHANNELS>(z_at, w);
            x_at += ROWS * x_token, dt_at += ROWS * dt_token;
            if (GATED) z_at += ROWS * z_token;
        }
    };
    auto fetch_states = [&](int token, int slice) {
        b_next.load(b + token * b_token, b_token, end - token, slice, d_state);
        c_next.load(c + token * c_token, c_token, end - token, slice, d_state);
    };
    fetch_channels(first);
    fetch_states(first, 0);

    for (int token = first; token < end; token += TILE) {
        int n_tokens = min(TILE, end - token);
        Pair<X> x_tile[STEPS];
        Pair<Z> z_tile[STEPS];
        #pragma unroll
        for (int k = 0; k < STEPS; k++) {
            x_tile[k] = x_next[k];
            if (GATED) z_tile[k] = z_next[k];
            float2 u = x_next[k].unpack(), v = dt_next[k].unpack();
            bool valid = row + k * ROWS < n_tokens;
            float lo = valid ? step_size(v.x + bias.x) : 0.f, hi = valid ? step_size(v.y + bias.y) : 0.f;
            reinterpret_cast<float4*>(steps)[((row + k * ROWS) * CHANNELS + pair) / 2] = make_float4(lo, lo * u.x, hi, hi * u.y);
        }
        unsigned resets = 0;
        if (RESET) {
            const unsigned char* flags = reset + batch * reset_batch + token * reset_token;
            resets = __ballot_sync(FULL_WARP, lane < n_tokens && flags[lane < n_tokens ? lane * reset_token : 0]);
        }

        #pragma unroll 1
        for (int slice = 0; slice < SLICES; slice++) {
            b_next.store(b_tile);
            c_next.store(c_tile);
            if (SLICES > 1) {
                h = to_states(slices[slice * THREADS + tid]);
                rate = load_states(a, e, slice * SLICE + group * 4, d_inner, d_state);
                #pragma unroll
                for (int i = 0; i < 4; i++) rate.v[i] *= LOG2_E;
            }
            __syncthreads();
            if (slice == 0) fetch_channels(token + TILE);
            fetch_states(slice + 1 < SLICES ? token : token + TILE, slice + 1 < SLICES ? slice + 1 : 0);

            if (chunk_states && token % CHUNK == 0 && e < d_inner) {
                i64 at = ((batch * n_chunks + token / CHUNK) * SLICES + slice) * 4 + group;
                reinterpret_cast<float4*>(chunk_states)[at * d_inner + e] = to_float4(h);
            }
            #pragma unroll 2
            for (int t = 0; t < n_tokens; t += 4) {
                float part[4];
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    float2 step = reinterpret_cast<const float2*>(steps)[(t + k) * CHANNELS + channel];
                    States b_t = to_states(reinterpret_cast<const float4*>(b_tile)[(t + k) * 4 + group]);
                    States c_t = to_states(reinterpret_cast<const float4*>(c_tile)[(t + k) * 4 + group]);
                    if (RESET && (resets >> (t + k) & 1)) h = States{{0.f, 0.f, 0.f, 0.f}};
                    #pragma unroll
                    for (int i = 0; i < 4; i++) h.v[i] = fmaf(ex2(step.x * rate.v[i]), h.v[i], step.y * b_t.v[i]);
                    part[k] = c_t.v[0] * h.v[0];
                    #pragma unroll
                    for (int i = 1; i < 4; i++) part[k] = fmaf(c_t.v[i], h.v[i], part[k]);
                }
                float* sum = sums + (t + group) * SUM_STRIDE + channel;
                float total = sum_over_states(part);
                *sum = slice == 0 ? total : *sum + total;
            }
            if (SLICES > 1) slices[slice * THREADS + tid] = to_float4(h);
            __syncthreads();
        }

        #pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int t = row + k * ROWS;
            float2 u = x_tile[k].unpack(), out = *reinterpret_cast<const float2*>(sums + t * SUM_STRIDE + pair);
            out = make_float2(fmaf(skip.x, u.x, out.x), fmaf(skip.y, u.y, out.y));
            if (GATED) {
                float2 v = z_tile[k].unpack();
                out = make_float2(out.x * gate(v.x), out.y * gate(v.y));
            }
            store_pair<PAIRED_CHANNELS>(y_at, t < n_tokens ? width : 0, out);
            y_at += (i64)ROWS * d_inner;
        }
    }

    if (segment == n_segments - 1) {
        #pragma unroll
        for (int slice = 0; slice < SLICES; slice++) {
            if (SLICES > 1) h = to_states(slices[slice * THREADS + tid]);
            store_states(final_state + batch * d_inner * d_state, e, slice * SLICE + group * 4, d_inner, d_state, h);
        }
    }
}
