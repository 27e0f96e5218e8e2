// The states at the borders of segments, so that segments of a long sequence can be scanned side by side.
//
// Of each segment the first kernel sums what it adds to the state at its far end, with the decays from token to that end:
//
//     forward:   h_end   = sum_t exp(a S_t) dt_t b_t x_t       S_t the sum of dt over the segment's tokens after t
//     backward:  g_start = sum_t exp(a P_t) c_t dy_t silu(z_t)  P_t the sum of dt over the segment's tokens up to t
//
// (REVERSE chooses), and the decay over the whole segment. The second kernel links the segments one after the other; it is tiny.
// Shapes: states and decays `[batch, n_segments, d_inner, d_state]` f32; after the link, states[s] is the state before segment s
// (forward) or the gradient by the state after it (backward). Blocks, lanes and tiles are those of the scan.
//
// What makes it fast: a tile is fetched while the one before is summed; tokens are visited from the far end, so that a token's weight
// is one power of two without a chain of products; and a block stops as soon as all its weights are 0 in f32: behind that, nothing can change the result. Sums of dt are
// made tile by tile, so that small steps are not lost in a large sum.
#include "selective_scan_tile.cuh"

#ifndef REVERSE
#define REVERSE 0
#endif

#if REVERSE
typedef C W;
#else
typedef B W;
#endif

constexpr int TILE = 32;
constexpr int STEPS = TILE / ROWS;
// Powers of two below this exponent are 0 in f32.
constexpr float VANISHED = -150.f;

extern "C" __global__ void __launch_bounds__(THREADS)
selective_scan_carry(float* states, float* decays, const X* x, const Dt* dt, const Z* z, const W* w, i64 x_batch, i64 x_token,
                     i64 dt_batch, i64 dt_token, i64 z_batch, i64 z_token, i64 w_batch, i64 w_token, const float* a,
                     const float* dt_bias, const unsigned char* reset, i64 reset_batch, i64 reset_token, int seq_len,
                     int d_inner, int d_state, int segment_len) {
    float* steps = reinterpret_cast<float*>(shared_memory());  // [TILE][CHANNELS] pairs of dt and what the token adds
    float* w_tile = steps + TILE * CHANNELS * 2;               // [TILE][SLICE]
    float4* slices = reinterpret_cast<float4*>(w_tile + TILE * SLICE);  // [SLICES][THREADS] states and rates

    int tid = threadIdx.x, lane = tid % 32, group = lane / 8;
    int channel = tid / 32 * 8 + lane % 8, e = blockIdx.x * CHANNELS + channel;
    int pair = tid % PAIRS * 2, pair_e = blockIdx.x * CHANNELS + pair, row = tid / PAIRS;
    i64 batch = blockIdx.z;
    int n_segments = gridDim.y, segment = blockIdx.y;
    int first = segment * segment_len, end = min(seq_len, first + segment_len);
    // Nobody asks for the last segment's forward end, or the first one's backward start.
    if (segment == (REVERSE ? 0 : n_segments - 1)) return;
    x += batch * x_batch, dt += batch * dt_batch, w += batch * w_batch;
    if (REVERSE && GATED) z += batch * z_batch;

    int width = max(0, min(2, d_inner - pair_e));
    float2 bias = load_parameters(dt_bias, pair_e, width);
    States sum = {{0.f, 0.f, 0.f, 0.f}}, rate = sum;
    // The state that vanishes last decides when a lane has nothing more to add.
    float slowest = -1e30f;
    #pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
        rate = load_states(a, e, slice * SLICE + group * 4, d_inner, d_state);
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            rate.v[i] *= LOG2_E;
            if (e < d_inner && slice * SLICE + group * 4 + i < d_state) slowest = fmaxf(slowest, rate.v[i]);
        }
        if (SLICES > 1) {
            slices[slice * THREADS + tid] = to_float4(sum);
            slices[(SLICES + slice) * THREADS + tid] = to_float4(rate);
        }
    }

    Pair<X> x_next[STEPS];
    Pair<Dt> dt_next[STEPS];
    Pair<Z> z_next[STEPS];
    StateTile<W, TILE> w_next;
    int n_tiles = (end - first + TILE - 1) / TILE;
    auto first_token = [&](int visit) { return first + (REVERSE ? visit : n_tiles - 1 - visit) * TILE; };
    auto fetch_channels = [&](int visit) {
        int token = first_token(visit);
        #pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int t = token + row + k * ROWS, w = visit < n_tiles && t < end ? width : 0;
            x_next[k] = load_pair<PAIRED_CHANNELS>(x + t * x_token + pair_e, w);
            dt_next[k] = load_pair<PAIRED_CHANNELS>(dt + t * dt_token + pair_e, w);
            if (REVERSE && GATED) z_next[k] = load_pair<PAIRED_CHANNELS>(z + t * z_token + pair_e, w);
        }
    };
    auto fetch_states = [&](int visit, int slice) {
        int token = first_token(visit);
        w_next.load(w + token * w_token, w_token, visit < n_tiles ? end - token : 0, slice, d_state);
    };
    fetch_channels(0);
    fetch_states(0, 0);

    float passed = 0.f;  // the sum of dt over the tiles already visited
    bool cut = false;    // whether a reset hides the rest of the segment
    for (int visit = 0; visit < n_tiles; visit++) {
        int token = first_token(visit), n_tokens = min(TILE, end - token);
        #pragma unroll
        for (int k = 0; k < STEPS; k++) {
            int t = row + k * ROWS;
            float2 u = x_next[k].unpack(), v = dt_next[k].unpack();
            bool valid = t < n_tokens && width > 0;
            float lo = valid ? step_size(v.x + bias.x) : 0.f, hi = valid ? step_size(v.y + bias.y) : 0.f;
            if (!REVERSE) {
                u = make_float2(lo * u.x, hi * u.y);
            } else if (GATED) {
                float2 g = z_next[k].unpack();
                u = make_float2(u.x * gate(g.x), u.y * gate(g.y));
            }
            reinterpret_cast<float4*>(steps)[(t * CHANNELS + pair) / 2] = make_float4(lo, u.x, hi, u.y);
        }
        // Visited tokens of the tile: all, or those on this side of a reset.
        int from = 0, to = n_tokens;
        if (RESET) {
            const unsigned char* flags = reset + batch * reset_batch + token * reset_token;
            unsigned resets = __ballot_sync(FULL_WARP, lane < n_tokens && flags[lane < n_tokens ? lane * reset_token : 0]);
            cut = resets != 0;
            if (resets && REVERSE) to = __ffs(resets) - 1;
            if (resets && !REVERSE) from = 31 - __clz(resets);
        }

        float in_tile;
        #pragma unroll 1
        for (int slice = 0; slice < SLICES; slice++) {
            if (slice > 0) __syncthreads();
            w_next.store(w_tile);
            if (SLICES > 1) {
                sum = to_states(slices[slice * THREADS + tid]);
                rate = to_states(slices[(SLICES + slice) * THREADS + tid]);
            }
            __syncthreads();
            // What comes next is on its way while this is summed.
            if (slice == 0) fetch_channels(visit + 1);
            fetch_states(slice + 1 < SLICES ? visit : visit + 1, slice + 1 < SLICES ? slice + 1 : 0);
            in_tile = 0.f;
            #pragma unroll 4
            for (int i = 0; i < to - from; i++) {
                int t = REVERSE ? from + i : to - 1 - i;
                float2 step = reinterpret_cast<const float2*>(steps)[t * CHANNELS + channel];
                States w_t = to_states(reinterpret_cast<const float4*>(w_tile)[t * 4 + group]);
                if (REVERSE) in_tile += step.x;
                float between = passed + in_tile;
                #pragma unroll
                for (int j = 0; j < 4; j++) sum.v[j] = fmaf(ex2(between * rate.v[j]), step.y * w_t.v[j], sum.v[j]);
                if (!REVERSE) in_tile += step.x;
            }
            if (SLICES > 1) slices[slice * THREADS + tid] = to_float4(sum);
        }
        passed += in_tile;
        // Step sizes that were not made by softplus may be negative, and weights grow again.
        if (!__syncthreads_or(!SOFTPLUS || passed * slowest > VANISHED) || cut) break;
    }

    i64 at = (batch * n_segments + segment) * d_inner * d_state;
    #pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
        if (SLICES > 1) {
            sum = to_states(slices[slice * THREADS + tid]);
            rate = to_states(slices[(SLICES + slice) * THREADS + tid]);
        }
        States decay;
        #pragma unroll
        for (int i = 0; i < 4; i++) decay.v[i] = cut ? 0.f : ex2(passed * rate.v[i]);
        store_states(states + at, e, slice * SLICE + group * 4, d_inner, d_state, sum);
        store_states(decays + at, e, slice * SLICE + group * 4, d_inner, d_state, decay);
    }
}

// Replaces each segment's own sum by the state that enters it, starting from `ends` `[batch, d_inner, d_state]` (null: zeros):
// the initial state, or the gradient by the final state. A thread owns one of the `n_states` states of a sequence.
extern "C" __global__ void selective_scan_link(float* states, const float* decays, const float* ends, int n_segments,
                                               i64 n_states) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, batch = blockIdx.y;
    if (i >= n_states) return;
    float entering = ends ? ends[batch * n_states + i] : 0.f;
    for (int k = 0; k < n_segments; k++) {
        i64 at = (batch * n_segments + (REVERSE ? n_segments - 1 - k : k)) * n_states + i;
        float own = 0.f, decay = 0.f;
        if (k < n_segments - 1) own = states[at], decay = decays[at];
        states[at] = entering;
        entering = fmaf(decay, entering, own);
    }
}
