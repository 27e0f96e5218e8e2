// The steps of SSD: what the heads make of dt in each chunk of 64 tokens, once for all kernels of the forward and the backward.
//
//   dt_t = softplus(dt_t + bias),  s_t = sum of dt a log2(e) over the chunk's tokens up to t
//
// dt [batch, seq_len, n_heads] bf16 or f32, any strides; steps [batch, chunks, n_heads] of 1 KiB, see Steps in ssd_tile.cuh.
// Token i reads token j <= i through 2^(s_i - s_j). A step is cut off at -160, where 2^step is 0 in f32 already: sums over 64 tokens
// stay so small that their differences are exact to 1e-3 whatever dt and a are. A reset is such a step.
//
// A warp takes one head of one chunk, a lane two neighbouring tokens. A hundredth of the work, but a chain of slow functions and
// shuffles on the way of every chunk if each kernel did it itself.
#include "ssd_tile.cuh"

typedef DtypeOf<DT_KIND>::type DT;

extern "C" __global__ void __launch_bounds__(256) ssd_steps(
    const DT* dt, i64 dt_b, i64 dt_l, i64 dt_h, const float* a, const float* dt_bias, const unsigned char* reset, Steps* steps,
    int seq_len, int n_heads, i64 n_all, int activate) {
    int lane = threadIdx.x & 31;
    i64 idx = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    if (idx >= n_all) return;
    int head = idx % n_heads, n_chunks = (seq_len + CHUNK - 1) / CHUNK;
    i64 batch = idx / n_heads / n_chunks;
    int first = idx / n_heads % n_chunks * CHUNK + 2 * lane;
    float bias = dt_bias ? dt_bias[head] : 0.f, rate = a[head] * LOG2_E, size[2], step[2];
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        int t = first + k;
        size[k] = step[k] = 0.f;
        if (t < seq_len) {
            float raw = to_f32(dt[batch * dt_b + t * dt_l + head * dt_h]) + bias;
            size[k] = activate ? softplus(raw) : raw;
            bool cut = reset && reset[batch * seq_len + t];
            step[k] = cut ? MIN_STEP : fmaxf(size[k] * rate, MIN_STEP);
        }
    }
    float sum = step[0] + step[1];
    #pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        float before = __shfl_up_sync(FULL_WARP, sum, offset);
        if (lane >= offset) sum += before;
    }
    float s[2] = {sum - step[1], sum}, end = __shfl_sync(FULL_WARP, sum, 31);
    Steps& out = steps[idx];
    auto put = [&](float* row, float x, float y) { *reinterpret_cast<float2*>(row + 2 * lane) = make_float2(x, y); };
    put(out.dt, size[0], size[1]);
    put(out.s, s[0], s[1]);
    put(out.from_start, ex2(s[0]), ex2(s[1]));
    out.to_end[lane] = pack_bf16(size[0] * ex2(end - s[0]), size[1] * ex2(end - s[1]));
}
