// SSD token by token, exact to f32: single steps of decoding in any dtype, and whole sequences forward and backward in f32, where
// the tensor cores would round.
//
//   h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t^T,  y_t = h_t c_t + d x_t      shapes and strides as in ssd_forward.cu
//   backward, from the last token:  dh_t = dy_t c_t^T + exp(dt_{t+1} a) dh_{t+1}
//     dc_t += h_t^T dy_t,  db_t += dt_t dh_t^T x_t,  dx_t = dt_t dh_t b_t + d dy_t
//     d(dt_t) = x_t . dh_t b_t + a exp(dt_t a) <dh_t, h_{t-1}>
//
// Forward, a warp holds ROWS rows of the state, d_state spread over its lanes; a block is 8 warps. With few rows, one token and
// a small batch fill the chip: reading and writing the state once bounds it. initial and final_state may be one tensor: each lane reads
// its elements before the first token, writes the same after the last, and nobody else touches them. checkpoints f32
// [batch, ceil(seq_len / 32), n_heads, d_head, d_state] is the state before every 32nd token.
//
// Backward, a block takes one head of one sequence, a warp one row after the other. A window of tokens is run forward from the
// checkpoint into shared memory, then backward; what tokens get from all rows is summed over a warp's rows in shared memory, then
// over the warps in order. db and dc leave as parts [heads of a group, batch, seq_len, n_groups, d_state] for ssd_reduce.cu. On entry
// d_states [batch, n_heads, d_head, d_state] is the gradient of the final state, on return that of the initial one.
#include "flowhn.cuh"
#include "smem.cuh"

typedef DtypeOf<X_KIND>::type T;
typedef DtypeOf<DT_KIND>::type DT;
constexpr int N = N_TILE, PER_LANE = N / 32, CHECKPOINT = 32;

// One head's steps.
struct Steps {
    const DT* dt;
    i64 stride;
    const unsigned char* reset;
    int seq_len;
    float bias, rate;
    bool activate;

    __device__ __forceinline__ float raw(int t) const { return to_f32(dt[t * stride]) + bias; }
    // Step size and decay of a token; past the end those of a token that changes nothing.
    __device__ __forceinline__ void load(int t, float& size, float& decay) const {
        size = 0.f, decay = 1.f;
        if (t < seq_len) {
            size = activate ? softplus(raw(t)) : raw(t);
            decay = reset && reset[t] ? 0.f : expf(size * rate);
        }
    }
};

// A decay of 0 clears whatever was there.
__device__ __forceinline__ float advance(float state, float decay, float input, float b) {
    return (decay == 0.f ? 0.f : decay * state) + input * b;
}

extern "C" __global__ void __launch_bounds__(256) ssd_recurrent(
    const T* x, i64 x_b, i64 x_l, i64 x_h, const DT* dt, i64 dt_b, i64 dt_l, i64 dt_h, const float* a,
    const T* b, i64 b_b, i64 b_l, i64 b_g, const T* c, i64 c_b, i64 c_l, i64 c_g,
    const float* d, const float* dt_bias, const float* initial, const unsigned char* reset,
    T* y, float* checkpoints, float* final_state,
    int seq_len, int n_heads, int n_groups, int d_head, int d_state, int row_blocks, int activate) {
    int lane = threadIdx.x & 31, p0 = (blockIdx.x % row_blocks * 8 + threadIdx.x / 32) * ROWS;
    int head = blockIdx.x / row_blocks % n_heads, batch = blockIdx.x / row_blocks / n_heads;
    if (p0 >= d_head) return;
    int group = head / (n_heads / n_groups), n_rows = min(ROWS, d_head - p0);
    x += batch * x_b + head * x_h + p0;
    b += batch * b_b + group * b_g, c += batch * c_b + group * c_g;
    y += ((i64)batch * seq_len * n_heads + head) * d_head + p0;
    Steps steps{dt + batch * dt_b + head * dt_h, dt_l, reset ? reset + (i64)batch * seq_len : nullptr, seq_len,
                dt_bias ? dt_bias[head] : 0.f, a[head], activate != 0};
    float skip = d ? d[head] : 0.f;
    i64 state_at = (((i64)batch * n_heads + head) * d_head + p0) * d_state;
    i64 checkpoint_size = (i64)n_heads * d_head * d_state;
    i64 checkpoint_at = ((i64)batch * ((seq_len + CHECKPOINT - 1) / CHECKPOINT) * n_heads + head) * d_head * d_state + (i64)p0 * d_state;

    float state[ROWS][PER_LANE];
    #pragma unroll
    for (int r = 0; r < ROWS; r++)
        #pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            int n = lane + 32 * k;
            state[r][k] = initial && r < n_rows && n < d_state ? initial[state_at + r * d_state + n] : 0.f;
        }

    // b and c of the next token are under way while one is worked on.
    T next_b[PER_LANE], next_c[PER_LANE];
    auto fetch = [&](i64 t) {
        #pragma unroll
        for (int k = 0; k < PER_LANE; k++) {
            int n = lane + 32 * k;
            bool inside = t < seq_len && n < d_state;
            next_b[k] = inside ? b[t * b_l + n] : from_f32<T>(0.f), next_c[k] = inside ? c[t * c_l + n] : from_f32<T>(0.f);
        }
    };
    fetch(0);
    for (int first = 0; first < seq_len; first += CHECKPOINT) {
        if (checkpoints) {
            float* out = checkpoints + checkpoint_at + first / CHECKPOINT * checkpoint_size;
            #pragma unroll
            for (int r = 0; r < ROWS; r++)
                #pragma unroll
                for (int k = 0; k < PER_LANE; k++)
                    if (r < n_rows && lane + 32 * k < d_state) out[r * d_state + lane + 32 * k] = state[r][k];
        }
        // Lane i has the scalars of token first + i.
        float size, decay, xs[ROWS];
        steps.load(first + lane, size, decay);
        #pragma unroll
        for (int r = 0; r < ROWS; r++) xs[r] = first + lane < seq_len && r < n_rows ? to_f32(x[(first + lane) * x_l + r]) : 0.f;
        int n_tokens = min(CHECKPOINT, seq_len - first);
        for (int i = 0; i < n_tokens; i++) {
            i64 t = first + i;
            float size_t = __shfl_sync(FULL_WARP, size, i), decay_t = __shfl_sync(FULL_WARP, decay, i);
            float bs[PER_LANE], cs[PER_LANE];
            #pragma unroll
            for (int k = 0; k < PER_LANE; k++) bs[k] = to_f32(next_b[k]), cs[k] = to_f32(next_c[k]);
            fetch(t + 1);
            #pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float x_t = __shfl_sync(FULL_WARP, xs[r], i), sum = 0.f;
                #pragma unroll
                for (int k = 0; k < PER_LANE; k++) {
                    state[r][k] = advance(state[r][k], decay_t, size_t * x_t, bs[k]);
                    sum += state[r][k] * cs[k];
                }
                sum = warp_sum(sum) + skip * x_t;
                if (lane == r && r < n_rows) y[t * n_heads * d_head + r] = from_f32<T>(sum);
            }
        }
    }
    #pragma unroll
    for (int r = 0; r < ROWS; r++)
        #pragma unroll
        for (int k = 0; k < PER_LANE; k++)
            if (r < n_rows && lane + 32 * k < d_state) final_state[state_at + r * d_state + lane + 32 * k] = state[r][k];
}

#if ROWS == 8
constexpr int WARPS = N <= 128 ? 8 : 4, WINDOW = N <= 128 ? 16 : 8;

// Rows of N values: what a warp has of a window, and what all share.
struct WarpWindow {
    float before[WINDOW][N], db[WINDOW][N], dc[WINDOW][N];
};
struct Shared {
    WarpWindow warps[WARPS];
    float b[CHECKPOINT][N], c[WINDOW][N];
    float size[CHECKPOINT], decay[CHECKPOINT];
    float by_size[WARPS][WINDOW], by_decay[WARPS][WINDOW];  // summed over a warp's rows: x . dh b, and exp(dt a) <dh, h before>
    float skips[WARPS], rates[WINDOW], biases[WINDOW];
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) ssd_recurrent_backward(
    const T* x, i64 x_b, i64 x_l, i64 x_h, const DT* dt, i64 dt_b, i64 dt_l, i64 dt_h, const float* a,
    const T* b, i64 b_b, i64 b_l, i64 b_g, const T* c, i64 c_b, i64 c_l, i64 c_g,
    const float* d, const float* dt_bias, const unsigned char* reset,
    const T* dy, i64 dy_b, i64 dy_l, i64 dy_h, const float* checkpoints,
    float* d_states, T* dx, DT* d_dt, float* db, float* dc, float* sums,
    int batches, int seq_len, int n_heads, int n_groups, int d_head, int d_state, int activate) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory());
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int head = blockIdx.x % n_heads, batch = blockIdx.x / n_heads, group = head / (n_heads / n_groups);
    x += batch * x_b + head * x_h, dy += batch * dy_b + head * dy_h;
    b += batch * b_b + group * b_g, c += batch * c_b + group * c_g;
    i64 dx_l = (i64)n_heads * d_head;
    dx += batch * (i64)seq_len * dx_l + (i64)head * d_head;
    Steps steps{dt + batch * dt_b + head * dt_h, dt_l, reset ? reset + (i64)batch * seq_len : nullptr, seq_len,
                dt_bias ? dt_bias[head] : 0.f, a[head], activate != 0};
    float skip = d ? d[head] : 0.f, skip_sum = 0.f, rate_sum = 0.f, bias_sum = 0.f;
    d_states += ((i64)batch * n_heads + head) * d_head * d_state;
    i64 part_at = ((i64)(head % (n_heads / n_groups)) * batches + batch) * seq_len * n_groups * d_state + (i64)group * d_state;
    int n_checkpoints = (seq_len + CHECKPOINT - 1) / CHECKPOINT;
    WarpWindow& own = shared.warps[warp];

    for (int checkpoint = n_checkpoints - 1; checkpoint >= 0; checkpoint--) {
        int first = checkpoint * CHECKPOINT;
        const float* before = checkpoints + ((i64)batch * n_checkpoints + checkpoint) * dx_l * d_state + (i64)head * d_head * d_state;
        for (int i = threadIdx.x; i < CHECKPOINT * N; i += WARPS * 32) {
            int t = first + i / N, n = i % N;
            shared.b[i / N][n] = t < seq_len && n < d_state ? to_f32(b[t * b_l + n]) : 0.f;
        }
        if (threadIdx.x < CHECKPOINT) steps.load(first + threadIdx.x, shared.size[threadIdx.x], shared.decay[threadIdx.x]);
        for (int window = (min(CHECKPOINT, seq_len - first) - 1) / WINDOW * WINDOW; window >= 0; window -= WINDOW) {
            for (int i = threadIdx.x; i < WINDOW * N; i += WARPS * 32) {
                int t = first + window + i / N, n = i % N;
                shared.c[i / N][n] = t < seq_len && n < d_state ? to_f32(c[t * c_l + n]) : 0.f;
            }
            for (int i = lane; i < WINDOW * N; i += 32) own.db[i / N][i % N] = 0.f, own.dc[i / N][i % N] = 0.f;
            __syncthreads();

            // Lane i adds up token window + i.
            float by_size = 0.f, by_decay = 0.f;
            for (int p = warp; p < d_head; p += WARPS) {
                bool inside = first + lane < seq_len, in_window = lane >= window && lane < window + WINDOW;
                float x_lane = inside ? to_f32(x[(first + lane) * x_l + p]) : 0.f;
                float dy_lane = inside ? to_f32(dy[(first + lane) * dy_l + p]) : 0.f, dx_lane = 0.f;
                if (in_window) skip_sum += x_lane * dy_lane;
                float state[PER_LANE], grad[PER_LANE];
                #pragma unroll
                for (int k = 0; k < PER_LANE; k++) {
                    int n = lane + 32 * k;
                    state[k] = n < d_state ? before[(i64)p * d_state + n] : 0.f;
                    grad[k] = n < d_state ? d_states[(i64)p * d_state + n] : 0.f;
                }
                for (int i = 0; i < window + WINDOW; i++) {
                    float input = shared.size[i] * __shfl_sync(FULL_WARP, x_lane, i);
                    #pragma unroll
                    for (int k = 0; k < PER_LANE; k++) {
                        if (i >= window) own.before[i - window][lane + 32 * k] = state[k];
                        state[k] = advance(state[k], shared.decay[i], input, shared.b[i][lane + 32 * k]);
                    }
                }
                for (int i = WINDOW - 1; i >= 0; i--) {
                    int t = window + i;
                    float x_t = __shfl_sync(FULL_WARP, x_lane, t), dy_t = __shfl_sync(FULL_WARP, dy_lane, t);
                    float size = shared.size[t], decay = shared.decay[t], by_input = 0.f, by_state = 0.f;
                    #pragma unroll
                    for (int k = 0; k < PER_LANE; k++) {
                        int n = lane + 32 * k;
                        float previous = own.before[i][n];
                        grad[k] += dy_t * shared.c[i][n];
                        own.dc[i][n] += dy_t * state[k];
                        own.db[i][n] += size * x_t * grad[k];
                        by_input += grad[k] * shared.b[t][n];
                        grad[k] = decay == 0.f ? 0.f : grad[k] * decay;
                        by_state += decay == 0.f ? 0.f : grad[k] * previous;
                        state[k] = previous;
                    }
                    by_input = warp_sum(by_input), by_state = warp_sum(by_state);
                    if (lane == t) by_size += x_t * by_input, by_decay += by_state, dx_lane = size * by_input + skip * dy_t;
                }
                if (inside && in_window) dx[(first + lane) * dx_l + p] = from_f32<T>(dx_lane);
                #pragma unroll
                for (int k = 0; k < PER_LANE; k++)
                    if (lane + 32 * k < d_state) d_states[(i64)p * d_state + lane + 32 * k] = grad[k];
            }
            if (lane >= window && lane < window + WINDOW)
                shared.by_size[warp][lane - window] = by_size, shared.by_decay[warp][lane - window] = by_decay;
            __syncthreads();

            for (int i = threadIdx.x; i < WINDOW * N; i += WARPS * 32) {
                int t = first + window + i / N, n = i % N;
                if (t >= seq_len || n >= d_state) continue;
                float db_sum = 0.f, dc_sum = 0.f;
                for (int w = 0; w < WARPS; w++) db_sum += shared.warps[w].db[i / N][n], dc_sum += shared.warps[w].dc[i / N][n];
                i64 at = part_at + (i64)t * n_groups * d_state + n;
                db[at] = db_sum, dc[at] = dc_sum;
            }
            int t = first + window + threadIdx.x;
            if (threadIdx.x < WINDOW && t < seq_len) {
                float grad = 0.f, step = 0.f;
                for (int w = 0; w < WARPS; w++) grad += shared.by_size[w][threadIdx.x], step += shared.by_decay[w][threadIdx.x];
                rate_sum += shared.size[window + threadIdx.x] * step;
                grad = (grad + steps.rate * step) * (activate ? sigmoid(steps.raw(t)) : 1.f);
                bias_sum += grad;
                d_dt[((i64)batch * seq_len + t) * n_heads + head] = from_f32<DT>(grad);
            }
            __syncthreads();
        }
    }
    skip_sum = warp_sum(skip_sum);
    if (lane == 0) shared.skips[warp] = skip_sum;
    if (threadIdx.x < WINDOW) shared.rates[threadIdx.x] = rate_sum, shared.biases[threadIdx.x] = bias_sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    float rate = 0.f, skips = 0.f, bias = 0.f;
    for (int i = 0; i < WINDOW; i++) rate += shared.rates[i], bias += shared.biases[i];
    for (int w = 0; w < WARPS; w++) skips += shared.skips[w];
    i64 at = (i64)batch * n_heads + head, kind = (i64)batches * n_heads;
    sums[at] = rate, sums[kind + at] = skips, sums[2 * kind + at] = bias;
}
#endif
