// The backward of the selective scan. With s_t = silu(z_t) and dy' = dy s, g_t the gradient by the state after token t:
//
//     g_t = c_t dy'_t + exp(dt_{t+1} a) g_{t+1}            k_t = exp(dt_t a) g_t h_{t-1}, what flows through the decay
//     dc_t = sum_e dy'_t h_t     db_t = sum_e g_t dt_t x_t     dx_t = dt_t sum_n g_t b_t + d dy'_t
//     ddt_t = (sum_n a k_t + x_t sum_n g_t b_t) softplus'(..)    da = sum_t dt_t k_t     dz_t = dy_t (c_t h_t + d x_t) silu'(z_t)
//
// Shapes and strides as in selective_scan_forward.cu, which has recorded the state before every CHUNK-th token. Grid: blocks of
// channels, segments of the sequence, batch. A block walks the chunks of its segment from the last to the first:
//
// 1. pairs of channels make step sizes and dy' of the whole chunk in shared memory;
// 2. every lane scans the chunk once and leaves its 4 states at every 8th token in shared memory;
// 3. from the last 8 tokens to the first, it scans them again, now keeping states and decays in registers, and walks back;
// 4. pairs of channels finish dx, ddt and dz.
//
// What makes it fast: two exponentials a state and token are cheap beside the arithmetic, so that recomputing beats memory
// traffic. Sums over a channel's states take 3 shuffles for 4 tokens. Sums over channels, for db and dc, would take a shuffle a
// value; instead a tensor core multiplies the values with a pattern of ones: lanes are laid out so that the operand is what each
// lane holds already, and 4 instructions and 2 shuffles sum up 16 values a lane. These products see 11 bits of each value, more
// than bf16 keeps; where anything is f32, a second product adds the bits cut off (EXACT).
//
// No atomics: partial sums of blocks go to memory, and selective_scan_sum_states and selective_scan_sum_channels add them up in
// a fixed order.
#include "selective_scan_tile.cuh"

#ifndef MIN_BLOCKS
#define MIN_BLOCKS 3
#endif

constexpr bool EXACT = X_KIND == 0 || B_KIND == 0 || C_KIND == 0;
// Tokens whose states and decays a lane keeps in registers.
constexpr int STRIP = 8;
constexpr int STRIPS = CHUNK / STRIP;

// Sums over the 8 channels of a warp. A lane brings values of 4 tokens and 4 states, and keeps the sums of token lane % 4 and of
// the two states from lane / 4 * 2 on. `ones[r]` is 1 where lane / 4 == r.
__device__ __forceinline__ float2 sum_over_channels(const float (&v)[4][4], const unsigned (&ones)[8]) {
    float sums[4] = {0.f, 0.f, 0.f, 0.f};
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        // What lanes hold is a 16x8 matrix: a row for each group of 4 lanes and each of states 0 and 2, a column for each of the
        // 4 lanes and each of states 0 and 1. The pattern adds up 4 columns each into columns 2 k and 2 k + 1 of the sums.
        unsigned values[4] = {__float_as_uint(v[k][0]), __float_as_uint(v[k][2]), __float_as_uint(v[k][1]), __float_as_uint(v[k][3])};
        unsigned pattern[2] = {ones[2 * k], ones[2 * k + 1]};
        if (EXACT) {
            unsigned upper[4], lower[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                upper[i] = values[i] & 0xffffe000u;
                lower[i] = __float_as_uint(__uint_as_float(values[i]) - __uint_as_float(upper[i]));
            }
            mma_tf32(sums, lower, pattern, sums);
            mma_tf32(sums, upper, pattern, sums);
        } else {
            mma_tf32(sums, values, pattern, sums);
        }
    }
    bool odd = threadIdx.x & 4;
    float lo = (odd ? sums[2] : sums[0]) + __shfl_xor_sync(FULL_WARP, odd ? sums[0] : sums[2], 4);
    float hi = (odd ? sums[3] : sums[1]) + __shfl_xor_sync(FULL_WARP, odd ? sums[1] : sums[3], 4);
    return make_float2(lo, hi);
}

// Where the sums of a warp stand in shared memory, `[db, dc][STRIP][SLICE]`; halves of rows swap so that stores miss each other.
__device__ __forceinline__ int warp_sum_at(int which, int t, int n) {
    return (which * STRIP + t) * SLICE + (n ^ (t & 2) << 2);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
selective_scan_backward(X* dx, Dt* ddt, Z* dz, i64 dz_batch, i64 dz_token, float* state_parts, float* rate_parts, float* channel_parts, float* start_grad,
                        const X* dy, const X* x, const Dt* dt, const Z* z, const B* b, const C* c, i64 dy_batch, i64 dy_token,
                        i64 x_batch, i64 x_token, i64 dt_batch, i64 dt_token, i64 z_batch, i64 z_token, i64 b_batch,
                        i64 b_token, i64 c_batch, i64 c_token, const float* a, const float* d, const float* dt_bias,
                        const float* chunk_states, const float* end_grad, const unsigned char* reset, i64 reset_batch,
                        i64 reset_token, int seq_len, int d_inner, int d_state, int segment_len) {
    float* steps = reinterpret_cast<float*>(shared_memory());  // [CHUNK][SUM_STRIDE] pairs of dt and dt x
    float* gated = steps + CHUNK * SUM_STRIDE * 2;             // [CHUNK][CHANNELS] dy'
    float* y_sums = gated + CHUNK * CHANNELS;                  // [CHUNK][SUM_STRIDE] c h, if there is a gate
    // [CHUNK][SUM_STRIDE] pairs of sum_n g b and sum_n a k, in the place of steps that no slice will need any more.
    float* step_sums = SLICES == 1 ? steps : y_sums + (GATED ? CHUNK * SUM_STRIDE : 0);
    float* b_tile = y_sums + ((GATED ? 1 : 0) + (SLICES == 1 ? 0 : 2)) * CHUNK * SUM_STRIDE; // [CHUNK][SLICE]
    float* c_tile = b_tile + CHUNK * SLICE;
    float* warp_sums = c_tile + CHUNK * SLICE;                 // [2][WARPS][db, dc][STRIP][SLICE]
    float4* marks = reinterpret_cast<float4*>(warp_sums + 2 * WARPS * 2 * STRIP * SLICE);  // [STRIPS][THREADS]
    float4* parts = marks + STRIPS * THREADS;                  // [THREADS] gradients of skip and bias so far
    float4* slices = parts + THREADS;                          // [2 SLICES][THREADS] g and da, if they are not in registers

    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, group = lane / 8;
    int channel = warp * 8 + lane % 8, e = blockIdx.x * CHANNELS + channel;
    int pair = tid % PAIRS * 2, pair_e = blockIdx.x * CHANNELS + pair, row = tid / PAIRS;
    i64 batch = blockIdx.z;
    int n_segments = gridDim.y, segment = blockIdx.y;
    int first = segment * segment_len, end = min(seq_len, first + segment_len);
    int n_chunks = (seq_len + CHUNK - 1) / CHUNK;
    i64 border = batch * n_segments + segment;
    dy += batch * dy_batch, x += batch * x_batch, dt += batch * dt_batch, b += batch * b_batch, c += batch * c_batch;
    dx += batch * seq_len * d_inner, ddt += batch * seq_len * d_inner;
    if (GATED) z += batch * z_batch, dz += batch * dz_batch;
    state_parts += ((i64)blockIdx.x * gridDim.z + batch) * seq_len * (2 * SLICE * SLICES);
    if (end_grad) end_grad += border * d_inner * d_state;

    int width = max(0, min(2, d_inner - pair_e));
    parts[tid] = make_float4(0.f, 0.f, 0.f, 0.f);

    unsigned ones[8];
    #pragma unroll
    for (int r = 0; r < 8; r++) ones[r] = __float_as_uint(lane / 4 == r ? 1.f : 0.f);

    States rate = load_states(a, e, group * 4, d_inner, d_state), g, rate_grad = {{0.f, 0.f, 0.f, 0.f}};
    #pragma unroll
    for (int i = 0; i < 4; i++) rate.v[i] *= LOG2_E;
    #pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
        g = load_states(end_grad, e, slice * SLICE + group * 4, d_inner, d_state);
        if (SLICES > 1) {
            slices[slice * THREADS + tid] = to_float4(g);
            slices[(SLICES + slice) * THREADS + tid] = to_float4(rate_grad);
        }
    }

    for (int token = first + (end - first - 1) / CHUNK * CHUNK; token >= first; token -= CHUNK) {
        int n_tokens = min(CHUNK, end - token), n_strips = (n_tokens + STRIP - 1) / STRIP;
        // Parameters are read anew for every chunk, which leaves registers to the scan.
        float2 bias = load_parameters(dt_bias, pair_e, width);
        const X* x_at = x + (token + row) * x_token + pair_e;
        const X* dy_at = dy + (token + row) * dy_token + pair_e;
        const Dt* dt_at = dt + (token + row) * dt_token + pair_e;
        const Z* z_at = z + (token + row) * z_token + pair_e;
        #pragma unroll 2
        for (int t = row; t < n_strips * STRIP; t += ROWS) {
            int w = t < n_tokens ? width : 0;
            float2 u = load_pair<PAIRED_CHANNELS>(x_at, w).unpack(), v = load_pair<PAIRED_CHANNELS>(dt_at, w).unpack();
            float2 o = load_pair<PAIRED_CHANNELS>(dy_at, w).unpack();
            if (GATED) {
                float2 g_t = load_pair<PAIRED_CHANNELS>(z_at, w).unpack();
                o = make_float2(o.x * gate(g_t.x), o.y * gate(g_t.y));
            }
            x_at += ROWS * x_token, dy_at += ROWS * dy_token, dt_at += ROWS * dt_token, z_at += ROWS * z_token;
            float lo = w ? step_size(v.x + bias.x) : 0.f, hi = w ? step_size(v.y + bias.y) : 0.f;
            reinterpret_cast<float4*>(steps)[(t * SUM_STRIDE + pair) / 2] = make_float4(lo, lo * u.x, hi, hi * u.y);
            store_pair_f32(gated + t * CHANNELS + pair, o);
        }
        unsigned resets[CHUNK / 32];
        if (RESET) {
            #pragma unroll
            for (int k = 0; k < CHUNK / 32; k++) {
                int t = k * 32 + lane;
                i64 at = batch * reset_batch + (token + (t < n_tokens ? t : 0)) * reset_token;
                resets[k] = __ballot_sync(FULL_WARP, t < n_tokens && reset[at]);
            }
        }

        #pragma unroll 1
        for (int slice = 0; slice < SLICES; slice++) {
            if (slice > 0) __syncthreads();
            StateTile<B, CHUNK> b_next;
            StateTile<C, CHUNK> c_next;
            b_next.load(b + token * b_token, b_token, n_tokens, slice, d_state);
            c_next.load(c + token * c_token, c_token, n_tokens, slice, d_state);
            b_next.store(b_tile);
            c_next.store(c_tile);
            States h = {{0.f, 0.f, 0.f, 0.f}};
            if (e < d_inner) {
                i64 at = ((batch * n_chunks + token / CHUNK) * SLICES + slice) * 4 + group;
                h = to_states(reinterpret_cast<const float4*>(chunk_states)[at * d_inner + e]);
            }
            if (SLICES > 1) {
                g = to_states(slices[slice * THREADS + tid]);
                rate_grad = to_states(slices[(SLICES + slice) * THREADS + tid]);
                rate = load_states(a, e, slice * SLICE + group * 4, d_inner, d_state);
                #pragma unroll
                for (int i = 0; i < 4; i++) rate.v[i] *= LOG2_E;
            }
            __syncthreads();

            #pragma unroll 1
            for (int strip = 0; strip < n_strips - 1; strip++) {
                marks[strip * THREADS + tid] = to_float4(h);
                unsigned reset_bits = 0;
                if (RESET) reset_bits = resets[strip * STRIP / 32] >> strip * STRIP % 32;
                #pragma unroll
                for (int k = 0; k < STRIP; k++) {
                    int t = strip * STRIP + k;
                    float2 step = reinterpret_cast<const float2*>(steps)[t * SUM_STRIDE + channel];
                    States b_t = to_states(reinterpret_cast<const float4*>(b_tile)[t * 4 + group]);
                    if (RESET && (reset_bits >> k & 1)) h = States{{0.f, 0.f, 0.f, 0.f}};
                    #pragma unroll
                    for (int i = 0; i < 4; i++) h.v[i] = fmaf(ex2(step.x * rate.v[i]), h.v[i], step.y * b_t.v[i]);
                }
            }

            #pragma unroll 1
            for (int strip = n_strips - 1; strip >= 0; strip--) {
                unsigned reset_bits = 0;
                if (RESET) reset_bits = resets[strip * STRIP / 32] >> strip * STRIP % 32;
                if (strip < n_strips - 1) h = to_states(marks[strip * THREADS + tid]);
                float* sums = warp_sums + (strip % 2 * WARPS + warp) * 2 * STRIP * SLICE;
                float before[STRIP][4], decay[STRIP][4];
                #pragma unroll
                for (int part = 0; part < STRIP; part += 4) {
                    float y_part[4], c_part[4][4];
                    #pragma unroll
                    for (int k = 0; k < 4; k++) {
                        int q = part + k, t = strip * STRIP + q;
                        float2 step = reinterpret_cast<const float2*>(steps)[t * SUM_STRIDE + channel];
                        float out = gated[t * CHANNELS + channel];
                        States b_t = to_states(reinterpret_cast<const float4*>(b_tile)[t * 4 + group]);
                        bool cleared = RESET && (reset_bits >> q & 1);
                        #pragma unroll
                        for (int i = 0; i < 4; i++) {
                            before[q][i] = cleared ? 0.f : h.v[i];
                            decay[q][i] = cleared ? 0.f : ex2(step.x * rate.v[i]);
                            h.v[i] = fmaf(decay[q][i], before[q][i], step.y * b_t.v[i]);
                            c_part[k][i] = out * h.v[i];
                        }
                        if (GATED) {
                            States c_t = to_states(reinterpret_cast<const float4*>(c_tile)[t * 4 + group]);
                            y_part[k] = c_t.v[0] * h.v[0];
                            #pragma unroll
                            for (int i = 1; i < 4; i++) y_part[k] = fmaf(c_t.v[i], h.v[i], y_part[k]);
                        }
                    }
                    if (GATED) {
                        float* sum = y_sums + (strip * STRIP + part + group) * SUM_STRIDE + channel;
                        float total = sum_over_states(y_part);
                        *sum = slice == 0 ? total : *sum + total;
                    }
                    float2 c_sums = sum_over_channels(c_part, ones);
                    store_pair_f32(sums + warp_sum_at(1, part + lane % 4, lane / 4 * 2), c_sums);
                }
                #pragma unroll
                for (int part = STRIP - 4; part >= 0; part -= 4) {
                    float input_part[4], rate_part[4], b_part[4][4];
                    #pragma unroll
                    for (int k = 3; k >= 0; k--) {
                        int q = part + k, t = strip * STRIP + q;
                        float2 step = reinterpret_cast<const float2*>(steps)[t * SUM_STRIDE + channel];
                        float out = gated[t * CHANNELS + channel];
                        States b_t = to_states(reinterpret_cast<const float4*>(b_tile)[t * 4 + group]);
                        States c_t = to_states(reinterpret_cast<const float4*>(c_tile)[t * 4 + group]);
                        input_part[k] = rate_part[k] = 0.f;
                        #pragma unroll
                        for (int i = 0; i < 4; i++) {
                            float by_state = fmaf(c_t.v[i], out, g.v[i]);
                            b_part[k][i] = by_state * step.y;
                            input_part[k] = fmaf(by_state, b_t.v[i], input_part[k]);
                            g.v[i] = by_state * decay[q][i];
                            float through_decay = g.v[i] * before[q][i];
                            rate_part[k] = fmaf(through_decay, rate.v[i], rate_part[k]);
                            rate_grad.v[i] = fmaf(through_decay, step.x, rate_grad.v[i]);
                        }
                    }
                    float2 total = make_float2(sum_over_states(input_part), sum_over_states(rate_part));
                    // Other lanes have read the steps that these sums replace: the sums above need what they read.
                    if (SLICES == 1) __syncwarp();
                    float2* to = reinterpret_cast<float2*>(step_sums) + (strip * STRIP + part + group) * SUM_STRIDE + channel;
                    *to = slice == 0 ? total : make_float2(to->x + total.x, to->y + total.y);
                    float2 b_sums = sum_over_channels(b_part, ones);
                    store_pair_f32(sums + warp_sum_at(0, part + lane % 4, lane / 4 * 2), b_sums);
                }
                __syncthreads();
                // Two neighbouring sums over the warps a thread.
                #pragma unroll
                for (int i = 0; i < STRIP * SLICE; i += THREADS) {
                    int own = i + tid, t = own / SLICE, n = own % SLICE * 2;
                    if (THREADS <= STRIP * SLICE || own < STRIP * SLICE) {
                        const float* from = warp_sums + strip % 2 * WARPS * 2 * STRIP * SLICE + warp_sum_at(n / SLICE, t, n % SLICE);
                        float2 total = make_float2(0.f, 0.f);
                        #pragma unroll
                        for (int w = 0; w < WARPS; w++) {
                            float2 sum = *reinterpret_cast<const float2*>(from + w * 2 * STRIP * SLICE);
                            total = make_float2(total.x + sum.x, total.y + sum.y);
                        }
                        i64 at = (token + strip * STRIP + t) * (i64)SLICES + slice;
                        if (strip * STRIP + t < n_tokens) store_pair_f32(state_parts + at * (2 * SLICE) + n, total);
                    }
                }
            }
            if (SLICES > 1) {
                slices[slice * THREADS + tid] = to_float4(g);
                slices[(SLICES + slice) * THREADS + tid] = to_float4(rate_grad);
            }
        }

        float2 skip = load_parameters(d, pair_e, width);
        float4 part = parts[tid];
        bias = load_parameters(dt_bias, pair_e, width);
        x_at = x + (token + row) * x_token + pair_e, dy_at = dy + (token + row) * dy_token + pair_e;
        dt_at = dt + (token + row) * dt_token + pair_e, z_at = z + (token + row) * z_token + pair_e;
        i64 at = (i64)(token + row) * d_inner + pair_e;
        Z* dz_at = dz + (token + row) * dz_token + pair_e;
        #pragma unroll 2
        for (int t = row; t < n_tokens; t += ROWS) {
            float2 u = load_pair<PAIRED_CHANNELS>(x_at, width).unpack(), v = load_pair<PAIRED_CHANNELS>(dt_at, width).unpack();
            float2 out = *reinterpret_cast<const float2*>(gated + t * CHANNELS + pair);
            // Sums by the input and by the rate, of both channels.
            float4 by = reinterpret_cast<const float4*>(step_sums)[(t * SUM_STRIDE + pair) / 2];
            v = make_float2(v.x + bias.x, v.y + bias.y);
            float2 by_x = make_float2(fmaf(by.x, step_size(v.x), skip.x * out.x), fmaf(by.z, step_size(v.y), skip.y * out.y));
            float2 by_dt = make_float2(fmaf(by.y, LN_2, by.x * u.x) * step_slope(v.x),
                                       fmaf(by.w, LN_2, by.z * u.y) * step_slope(v.y));
            store_pair<PAIRED_CHANNELS>(dx + at, width, by_x);
            store_pair<PAIRED_CHANNELS>(ddt + at, width, by_dt);
            part = make_float4(fmaf(out.x, u.x, part.x), fmaf(out.y, u.y, part.y), part.z + by_dt.x, part.w + by_dt.y);
            if (GATED) {
                float2 w = load_pair<PAIRED_CHANNELS>(z_at, width).unpack(), o = load_pair<PAIRED_CHANNELS>(dy_at, width).unpack();
                float2 y = *reinterpret_cast<const float2*>(y_sums + t * SUM_STRIDE + pair);
                float2 by_z = make_float2(o.x * fmaf(skip.x, u.x, y.x) * gate_slope(w.x),
                                          o.y * fmaf(skip.y, u.y, y.y) * gate_slope(w.y));
                store_pair<PAIRED_CHANNELS>(dz_at, width, by_z);
            }
            x_at += ROWS * x_token, dy_at += ROWS * dy_token, dt_at += ROWS * dt_token, z_at += ROWS * z_token;
            at += (i64)ROWS * d_inner, dz_at += ROWS * dz_token;
        }
        parts[tid] = part;
        // The next chunk's steps go where this one's are still read only by the same thread; its other sums wait for a barrier.
    }

    #pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
        if (SLICES > 1) {
            g = to_states(slices[slice * THREADS + tid]);
            rate_grad = to_states(slices[(SLICES + slice) * THREADS + tid]);
        }
        int n = slice * SLICE + group * 4;
        store_states(rate_parts + border * d_inner * d_state, e, n, d_inner, d_state, rate_grad);
        if (start_grad && segment == 0) store_states(start_grad + batch * d_inner * d_state, e, n, d_inner, d_state, g);
    }
    __syncthreads();
    if (row == 0) {
        float4 total = parts[tid];
        for (int r = 1; r < ROWS; r++) {
            float4 other = parts[r * PAIRS + tid];
            total = make_float4(total.x + other.x, total.y + other.y, total.z + other.z, total.w + other.w);
        }
        store_pair<false>(channel_parts + border * 2 * d_inner + pair_e, width, make_float2(total.x, total.y));
        store_pair<false>(channel_parts + (border * 2 + 1) * d_inner + pair_e, width, make_float2(total.z, total.w));
    }
}

// db and dc `[tokens, d_state]` from the blocks' parts `[n_parts, tokens, SLICES, 2, SLICE]`. A thread owns one sum.
extern "C" __global__ void selective_scan_sum_states(B* db, C* dc, const float* state_parts, int n_parts, i64 n_tokens,
                                                     int d_state) {
    constexpr int WIDTH = 2 * SLICE * SLICES;
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, n_sums = n_tokens * WIDTH;
    if (i >= n_sums) return;
    float total = 0.f;
    #pragma unroll 8
    for (int k = 0; k < n_parts; k++) total += state_parts[k * n_sums + i];
    // Cutting values off after 11 bits has made them smaller by 2^-11 / (2 ln 2) on average.
    if (!EXACT) total *= 1.000352f;
    int n = i % WIDTH / (2 * SLICE) * SLICE + i % SLICE;
    i64 at = i / WIDTH * d_state + n;
    if (n < d_state) {
        if (i / SLICE % 2 == 0) db[at] = from_f32<B>(total);
        else dc[at] = from_f32<C>(total);
    }
}

// da `[d_inner, d_state]`, dd and ddt_bias `[d_inner]` (null where not wanted) from the parts of `n_parts` segments.
extern "C" __global__ void selective_scan_sum_channels(float* da, float* dd, float* dbias, const float* rate_parts,
                                                       const float* channel_parts, int n_parts, int d_inner, int d_state) {
    i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, n_rates = (i64)d_inner * d_state;
    const float* parts = i < n_rates ? rate_parts + i : channel_parts + (i - n_rates);
    i64 stride = i < n_rates ? n_rates : 2 * d_inner;
    if (i >= n_rates + 2 * d_inner) return;
    float total = 0.f;
    for (int k = 0; k < n_parts; k++) total += parts[k * stride];
    if (i < n_rates) da[i] = total;
    else if (i < n_rates + d_inner) {
        if (dd) dd[i - n_rates] = total;
    } else if (dbias) dbias[i - n_rates - d_inner] = total;
}
