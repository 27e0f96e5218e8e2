// The backward of the selective scan. With s_t = silu(z_t) and dy' = dy s, g_t the gradient by the state after token t:
//
//     g_t = c_t dy'_t + exp(dt_{t+1} a) g_{t+1}            k_t = exp(dt_t a) g_t h_{t-1}, what flows through the decay
//     dc_t = sum_e dy'_t h_t     db_t = sum_e g_t dt_t x_t     dx_t = dt_t sum_n g_t b_t + d dy'_t
//     ddt_t = (sum_n a k_t + x_t sum_n g_t b_t) softplus'(..)    da = sum_t dt_t k_t     dz_t = dy_t (c_t h_t + d x_t) silu'(z_t)
//
// Shapes and strides as in selective_scan_forward.cu, which has recorded the state before every CHUNK-th token. Grid: blocks of
// channels, segments of the sequence, batch. A block walks the chunks of its segment from the last to the first:
//
// 1. threads make step sizes and dy' of the whole chunk in shared memory, four channels each;
// 2. every lane scans the chunk once and leaves its 4 states at every 4th token in shared memory;
// 3. from the last 4 tokens to the first, it scans them again, now keeping states, decays and operands in registers, and walks back;
// 4. threads finish dx, ddt and dz, four channels each.
//
// What makes it fast: two exponentials a state and token are cheap beside the arithmetic, so that recomputing beats memory
// traffic; what a chunk will read is brought into the L2 cache while the one before is walked. Sums over a channel's states take 3 shuffles for 4 tokens. Sums over channels, for db and dc, would take a shuffle a
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
// Rows of steps are padded in shared memory, so that tokens side by side fall into different banks.
constexpr int STEP_STRIDE = CHANNELS + 4;
// Tokens whose states, decays and operands a lane keeps in registers.
constexpr int STRIP = 4;
static_assert(CHUNK <= 64 && CHUNK % ROWS == 0 && THREADS >= 2 * STRIP * SLICE, "");
// Channels of 32 bytes, and how many times as many a block has.
constexpr int PREFETCH_CHANNELS = 32 / sizeof(X);
constexpr int PREFETCHES = CHANNELS / PREFETCH_CHANNELS;

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
selective_scan_backward(X* dx, Dt* ddt, Z* dz, float* state_parts, float* rate_parts, float* channel_parts, float* start_grad,
                        const X* dy, const X* x, const Dt* dt, const Z* z, const B* b, const C* c, i64 dy_batch, i64 dy_token,
                        i64 x_batch, i64 x_token, i64 dt_batch, i64 dt_token, i64 z_batch, i64 z_token, i64 b_batch,
                        i64 b_token, i64 c_batch, i64 c_token, const float* a, const float* d, const float* dt_bias,
                        const float* chunk_states, const float* end_grad, const unsigned char* reset, i64 reset_batch,
                        i64 reset_token, int seq_len, int d_inner, int d_state, int segment_len) {
    float* steps = reinterpret_cast<float*>(shared_memory());  // [CHUNK][STEP_STRIDE] pairs of dt and dt x
    float* gated = steps + CHUNK * STEP_STRIDE * 2;             // [CHUNK][CHANNELS] dy'
    float* b_tile = gated + CHUNK * CHANNELS;                  // [CHUNK][SLICE]
    float* c_tile = b_tile + CHUNK * SLICE;
    float* warp_sums = c_tile + CHUNK * SLICE;                 // [2][WARPS][db, dc][STRIP][SLICE]
    float4* marks = reinterpret_cast<float4*>(warp_sums + 2 * WARPS * 2 * STRIP * SLICE);  // [CHUNK / STRIP][THREADS]
    float4* parts = marks + CHUNK / STRIP * THREADS;           // [2][THREADS] gradients of skip and bias so far
    float4* slices = parts + 2 * THREADS;                          // [2 SLICES][THREADS] g and da, if they are not in registers
    // Pairs of sum_n g b and sum_n a k, and c h: in the places of steps and dy' if no other slice will need those.
    float* step_sums = SLICES == 1 ? steps : reinterpret_cast<float*>(slices + 2 * SLICES * THREADS);
    float* y_sums = SLICES == 1 ? gated : step_sums + CHUNK * STEP_STRIDE * 2;

    int tid = threadIdx.x, lane = tid % 32, warp = tid / 32, group = lane / 8;
    int channel = warp * 8 + lane % 8, e = blockIdx.x * CHANNELS + channel;
    int quad = tid % QUADS * 4, quad_e = blockIdx.x * CHANNELS + quad, row = tid / QUADS;
    i64 batch = blockIdx.z;
    int n_segments = gridDim.y, segment = blockIdx.y;
    int first = segment * segment_len, end = min(seq_len, first + segment_len);
    int n_chunks = (seq_len + CHUNK - 1) / CHUNK;
    i64 border = batch * n_segments + segment;
    dy += batch * dy_batch, x += batch * x_batch, dt += batch * dt_batch, b += batch * b_batch, c += batch * c_batch;
    dx += batch * seq_len * d_inner, ddt += batch * seq_len * d_inner;
    if (GATED) z += batch * z_batch, dz += batch * seq_len * d_inner;
    state_parts += ((i64)blockIdx.x * gridDim.z + batch) * seq_len * (2 * SLICE * SLICES);
    if (end_grad) end_grad += border * d_inner * d_state;

    int width = d_inner - quad_e;
    parts[tid] = parts[THREADS + tid] = make_float4(0.f, 0.f, 0.f, 0.f);

    unsigned ones[8];
    #pragma unroll
    for (int r = 0; r < 8; r++) ones[r] = __float_as_uint(lane / 4 == r ? 1.f : 0.f);

    Four rate = load_states(a, e, group * 4, d_inner, d_state), g, rate_grad = {{0.f, 0.f, 0.f, 0.f}};
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

    // Loads of a chunk would be waited for; asked for a chunk ahead, they find their data in the L2 cache.
    auto prefetch_chunk = [&](int token) {
        #pragma unroll
        for (int k = 0; k < CHUNK * PREFETCHES / THREADS; k++) {
            unsigned i = k * THREADS + tid, t = i / PREFETCHES;
            int ahead = blockIdx.x * CHANNELS + i % PREFETCHES * PREFETCH_CHANNELS;
            if (ahead < d_inner) {
                prefetch_l2(x + token * x_token + ahead + t * (unsigned)x_token);
                prefetch_l2(dt + token * dt_token + ahead + t * (unsigned)dt_token);
                prefetch_l2(dy + token * dy_token + ahead + t * (unsigned)dy_token);
                if (GATED) prefetch_l2(z + token * z_token + ahead + t * (unsigned)z_token);
            }
        }
        if (tid < CHUNK) {
            prefetch_l2(b + (token + tid) * b_token);
            prefetch_l2(c + (token + tid) * c_token);
        }
        if (e < d_inner && lane % 2 == 0) {
            i64 at = (batch * n_chunks + token / CHUNK) * SLICES * 4 + group;
            prefetch_l2(reinterpret_cast<const float4*>(chunk_states) + at * d_inner + e);
        }
    };

    for (int token = first + (end - first - 1) / CHUNK * CHUNK; token >= first; token -= CHUNK) {
        int n_tokens = min(CHUNK, end - token), n_strips = (n_tokens + STRIP - 1) / STRIP;
        // Parameters are read anew for every chunk, which leaves registers to the scan.
        Four bias = load_parameters(dt_bias, quad_e, width);
        StateTile<B, CHUNK> b_next;
        StateTile<C, CHUNK> c_next;
        b_next.load(b + token * b_token, b_token, n_tokens, 0, d_state);
        c_next.load(c + token * c_token, c_token, n_tokens, 0, d_state);
        const X *x_tile = x + token * x_token + quad_e, *dy_tile = dy + token * dy_token + quad_e;
        const Dt* dt_tile = dt + token * dt_token + quad_e;
        const Z* z_tile = z + token * z_token + quad_e;
        #pragma unroll 2
        for (int t = row; t < CHUNK; t += ROWS) {
            int there = t < n_tokens ? width : 0;
            Four u = load_quad<ALIGNED_CHANNELS>(x_tile + t * (unsigned)x_token, there).unpack();
            Four v = load_quad<ALIGNED_CHANNELS>(dt_tile + t * (unsigned)dt_token, there).unpack();
            Four out = load_quad<ALIGNED_CHANNELS>(dy_tile + t * (unsigned)dy_token, there).unpack();
            if (GATED) {
                Four w = load_quad<ALIGNED_CHANNELS>(z_tile + t * (unsigned)z_token, there).unpack();
                #pragma unroll
                for (int i = 0; i < 4; i++) out.v[i] *= gate(w.v[i]);
            }
            Four step = step_sizes(v, bias, t < n_tokens);
            #pragma unroll
            for (int i = 0; i < 4; i++) u.v[i] *= step.v[i];
            store_pairs(reinterpret_cast<float2*>(steps) + t * STEP_STRIDE + quad, step, u);
            *reinterpret_cast<float4*>(gated + t * CHANNELS + quad) = to_float4(out);
        }
        // Bit t: whether token t resets the state.
        unsigned early_resets = 0, late_resets = 0;
        if (RESET) {
            i64 at = batch * reset_batch + token * reset_token;
            int t = lane + 32;
            early_resets = __ballot_sync(FULL_WARP, lane < n_tokens && reset[at + (lane < n_tokens ? lane : 0) * reset_token]);
            late_resets = __ballot_sync(FULL_WARP, t < n_tokens && reset[at + (t < n_tokens ? t : 0) * reset_token]);
        }
        auto resets_of = [&](int strip) {
            int t = strip * STRIP;
            return RESET ? (t < 32 ? early_resets : late_resets) >> t % 32 : 0;
        };

        #pragma unroll 1
        for (int slice = 0; slice < SLICES; slice++) {
            if (slice > 0) {
                b_next.load(b + token * b_token, b_token, n_tokens, slice, d_state);
                c_next.load(c + token * c_token, c_token, n_tokens, slice, d_state);
                __syncthreads();
            }
            b_next.store(b_tile);
            c_next.store(c_tile);
            Four h = {{0.f, 0.f, 0.f, 0.f}};
            if (e < d_inner) {
                i64 at = ((batch * n_chunks + token / CHUNK) * SLICES + slice) * 4 + group;
                h = to_four(reinterpret_cast<const float4*>(chunk_states)[at * d_inner + e]);
            }
            if (SLICES > 1) {
                g = to_four(slices[slice * THREADS + tid]);
                rate_grad = to_four(slices[(SLICES + slice) * THREADS + tid]);
                rate = load_states(a, e, slice * SLICE + group * 4, d_inner, d_state);
                #pragma unroll
                for (int i = 0; i < 4; i++) rate.v[i] *= LOG2_E;
            }
            __syncthreads();

            if (slice == 0 && token > first) prefetch_chunk(token - CHUNK);

            // What this lane reads of a strip, and where it leaves its states.
            const float2* step_at = reinterpret_cast<const float2*>(steps) + channel;
            const float* out_at = gated + channel;
            const float4 *b_at = reinterpret_cast<const float4*>(b_tile) + group, *c_at = reinterpret_cast<const float4*>(c_tile) + group;
            float4* mark_at = marks + tid;
            #pragma unroll 1
            for (int strip = 0; strip < n_strips - 1; strip++) {
                *mark_at = to_float4(h);
                unsigned reset_bits = resets_of(strip);
                #pragma unroll
                for (int k = 0; k < STRIP; k++) {
                    float2 step = step_at[k * STEP_STRIDE];
                    Four b_t = to_four(b_at[k * 4]);
                    if (RESET && (reset_bits >> k & 1)) h = Four{{0.f, 0.f, 0.f, 0.f}};
                    #pragma unroll
                    for (int i = 0; i < 4; i++) h.v[i] = fmaf(ex2(step.x * rate.v[i]), h.v[i], step.y * b_t.v[i]);
                }
                mark_at += THREADS, step_at += STRIP * STEP_STRIDE, b_at += STRIP * 4;
            }
            out_at += (n_strips - 1) * STRIP * CHANNELS;
            c_at += (n_strips - 1) * STRIP * 4;
            float2* to = reinterpret_cast<float2*>(step_sums) + ((n_strips - 1) * STRIP + group) * STEP_STRIDE + channel;
            float* y_to = y_sums + ((n_strips - 1) * STRIP + group) * CHANNELS + channel;
            // One sum over the warps for each of the first threads.
            constexpr int N_SUMS = 2 * STRIP * SLICE;
            int sum_t = tid / (2 * SLICE), sum_n = tid % (2 * SLICE);
            const float* sum_from = warp_sums + warp_sum_at(sum_n / SLICE, sum_t, sum_n % SLICE);
            float* sums_to = warp_sums + warp * N_SUMS + warp_sum_at(0, lane % 4, lane / 4 * 2);
            sum_t += (n_strips - 1) * STRIP;
            float* part_to = state_parts + ((i64)(token + sum_t) * SLICES + slice) * (2 * SLICE) + sum_n;

            #pragma unroll 1
            for (int strip = n_strips - 1; strip >= 0; strip--) {
                unsigned reset_bits = resets_of(strip);
                if (strip < n_strips - 1) h = to_four(*mark_at);
                int parity = strip % 2 * WARPS * N_SUMS;
                float before[STRIP][4], decay[STRIP][4], products[STRIP][4], y_part[STRIP];
                float2 step[STRIP];
                float out[STRIP];
                Four b_t[STRIP], c_t[STRIP];
                #pragma unroll
                for (int k = 0; k < STRIP; k++) {
                    step[k] = step_at[k * STEP_STRIDE];
                    out[k] = out_at[k * CHANNELS];
                    b_t[k] = to_four(b_at[k * 4]);
                    c_t[k] = to_four(c_at[k * 4]);
                }
                #pragma unroll
                for (int k = 0; k < STRIP; k++) {
                    bool cleared = RESET && (reset_bits >> k & 1);
                    y_part[k] = 0.f;
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        before[k][i] = cleared ? 0.f : h.v[i];
                        decay[k][i] = cleared ? 0.f : ex2(step[k].x * rate.v[i]);
                        h.v[i] = fmaf(decay[k][i], before[k][i], step[k].y * b_t[k].v[i]);
                        products[k][i] = out[k] * h.v[i];
                        if (GATED) y_part[k] = i == 0 ? c_t[k].v[i] * h.v[i] : fmaf(c_t[k].v[i], h.v[i], y_part[k]);
                    }
                }
                float2 c_sums = sum_over_channels(products, ones);
                float y_total = 0.f;
                if (GATED) y_total = sum_over_states(y_part);

                float input_part[STRIP], rate_part[STRIP];
                #pragma unroll
                for (int k = STRIP - 1; k >= 0; k--) {
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        float by_state = fmaf(c_t[k].v[i], out[k], g.v[i]);
                        products[k][i] = by_state * step[k].y;
                        input_part[k] = i == 0 ? by_state * b_t[k].v[i] : fmaf(by_state, b_t[k].v[i], input_part[k]);
                        g.v[i] = by_state * decay[k][i];
                        float through_decay = g.v[i] * before[k][i];
                        rate_part[k] = i == 0 ? through_decay * rate.v[i] : fmaf(through_decay, rate.v[i], rate_part[k]);
                        rate_grad.v[i] = fmaf(through_decay, step[k].x, rate_grad.v[i]);
                    }
                }
                float2 b_sums = sum_over_channels(products, ones);
                float2 step_total = make_float2(sum_over_states(input_part), sum_over_states(rate_part));
                if (SLICES > 1 && slice > 0) {
                    step_total = make_float2(to->x + step_total.x, to->y + step_total.y);
                    if (GATED) y_total += *y_to;
                }
                *to = step_total;
                if (GATED) *y_to = y_total;
                store_float2(sums_to + parity, b_sums);
                store_float2(sums_to + parity + STRIP * SLICE, c_sums);
                __syncthreads();
                if (THREADS == N_SUMS || tid < N_SUMS) {
                    float total = 0.f;
                    #pragma unroll
                    for (int w = 0; w < WARPS; w++) total += sum_from[parity + w * N_SUMS];
                    if (sum_t < n_tokens) *part_to = total;
                }
                mark_at -= THREADS, step_at -= STRIP * STEP_STRIDE, out_at -= STRIP * CHANNELS, b_at -= STRIP * 4, c_at -= STRIP * 4;
                to -= STRIP * STEP_STRIDE, y_to -= STRIP * CHANNELS;
                sum_t -= STRIP, part_to -= STRIP * SLICES * 2 * SLICE;
            }
            if (SLICES > 1) {
                slices[slice * THREADS + tid] = to_float4(g);
                slices[(SLICES + slice) * THREADS + tid] = to_float4(rate_grad);
            }
        }

        Four skip = load_parameters(d, quad_e, width), skip_grad = to_four(parts[tid]), bias_grad = to_four(parts[THREADS + tid]);
        bias = load_parameters(dt_bias, quad_e, width);
        X* dx_tile = dx + (i64)token * d_inner + quad_e;
        Dt* ddt_tile = ddt + (i64)token * d_inner + quad_e;
        Z* dz_tile = dz + (i64)token * d_inner + quad_e;
        #pragma unroll 2
        for (int t = row; t < n_tokens; t += ROWS) {
            Four u = load_quad<ALIGNED_CHANNELS>(x_tile + t * (unsigned)x_token, width).unpack();
            Four v = load_quad<ALIGNED_CHANNELS>(dt_tile + t * (unsigned)dt_token, width).unpack();
            Four out = load_quad<ALIGNED_CHANNELS>(dy_tile + t * (unsigned)dy_token, width).unpack();
            if (GATED) {
                Four w = load_quad<ALIGNED_CHANNELS>(z_tile + t * (unsigned)z_token, width).unpack();
                Four y = to_four(*reinterpret_cast<const float4*>(y_sums + t * CHANNELS + quad));
                #pragma unroll
                for (int i = 0; i < 4; i++) {
                    y.v[i] = out.v[i] * fmaf(skip.v[i], u.v[i], y.v[i]) * gate_slope(w.v[i]);
                    out.v[i] *= gate(w.v[i]);
                }
                store_quad<ALIGNED_CHANNELS>(dz_tile + t * (unsigned)d_inner, width, y);
            }
            // Sums by the input and by the rate, of two channels each.
            const float4* sums = reinterpret_cast<const float4*>(step_sums) + (t * STEP_STRIDE + quad) / 2;
            float4 low = sums[0], high = sums[1];
            Four by_input = {{low.x, low.z, high.x, high.z}}, by_rate = {{low.y, low.w, high.y, high.w}}, by_x, by_dt;
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                float before = v.v[i] + bias.v[i];
                by_x.v[i] = fmaf(by_input.v[i], step_size(before), skip.v[i] * out.v[i]);
                by_dt.v[i] = fmaf(by_rate.v[i], LN_2, by_input.v[i] * u.v[i]) * step_slope(before);
                skip_grad.v[i] = fmaf(out.v[i], u.v[i], skip_grad.v[i]);
                bias_grad.v[i] += by_dt.v[i];
            }
            store_quad<ALIGNED_CHANNELS>(dx_tile + t * (unsigned)d_inner, width, by_x);
            store_quad<ALIGNED_CHANNELS>(ddt_tile + t * (unsigned)d_inner, width, by_dt);
        }
        parts[tid] = to_float4(skip_grad), parts[THREADS + tid] = to_float4(bias_grad);
        // The next chunk's steps go where this one's are still read only by the same thread; its other sums wait for a barrier.
    }

    #pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
        if (SLICES > 1) {
            g = to_four(slices[slice * THREADS + tid]);
            rate_grad = to_four(slices[(SLICES + slice) * THREADS + tid]);
        }
        int n = slice * SLICE + group * 4;
        store_states(rate_parts + border * d_inner * d_state, e, n, d_inner, d_state, rate_grad);
        if (start_grad && segment == 0) store_states(start_grad + batch * d_inner * d_state, e, n, d_inner, d_state, g);
    }
    __syncthreads();
    if (row < 2) {
        Four total = {{0.f, 0.f, 0.f, 0.f}};
        for (int r = 0; r < ROWS; r++) {
            Four other = to_four(parts[row * THREADS + r * QUADS + tid % QUADS]);
            #pragma unroll
            for (int i = 0; i < 4; i++) total.v[i] += other.v[i];
        }
        store_quad<false>(channel_parts + (border * 2 + row) * d_inner + quad_e, width, total);
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
