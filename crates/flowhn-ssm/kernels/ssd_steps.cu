// The steps of SSD: what the heads make of dt in each chunk of 64 tokens, once for all kernels of the forward and the backward.
//
//   dt_t = softplus(dt_t + bias),  s_t = sum of dt a log2(e) over the chunk's tokens up to t
//
// dt [batch, seq_len, n_heads] bf16 or f32, any strides; steps [batch, chunks, n_heads] of 1 KiB, see Steps in ssd_tile.cuh.
// Token i reads token j <= i through 2^(s_i - s_j). A step is cut off at -160, where 2^step is 0 in f32 already: sums over 64 tokens
// stay so small that their differences are exact to 1e-3 whatever dt and a are. At a reset the sum begins anew, and borders say who
// sees whom: so no document of a pack changes another, not even by rounding.
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
    bool cut[2];
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        int t = first + k;
        size[k] = step[k] = 0.f;
        cut[k] = t < seq_len && reset && reset[batch * seq_len + t];
        if (t < seq_len) {
            float raw = to_f32(dt[batch * dt_b + t * dt_l + head * dt_h]) + bias;
            size[k] = activate ? softplus(raw) : raw;
            step[k] = cut[k] ? 0.f : fmaxf(size[k] * rate, MIN_STEP);
        }
    }
    // Inclusive scans over the lanes: the sum since the latest reset, the latest reset, and from the right the next one.
    float sum = cut[1] ? 0.f : step[0] + step[1];
    bool begun = cut[0] || cut[1];
    int latest = cut[1] ? 2 * lane + 1 : cut[0] ? 2 * lane : -1, next = cut[0] ? 2 * lane : cut[1] ? 2 * lane + 1 : CHUNK;
    #pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        float before = __shfl_up_sync(FULL_WARP, sum, offset);
        int before_begun = __shfl_up_sync(FULL_WARP, (int)begun, offset), before_latest = __shfl_up_sync(FULL_WARP, latest, offset);
        int after_next = __shfl_down_sync(FULL_WARP, next, offset);
        if (lane >= offset) {
            if (!begun) sum += before;
            begun = begun || before_begun, latest = max(latest, before_latest);
        }
        if (lane + offset < 32) next = min(next, after_next);
    }
    float before = __shfl_up_sync(FULL_WARP, sum, 1);
    int latest_before = __shfl_up_sync(FULL_WARP, latest, 1), next_after = __shfl_down_sync(FULL_WARP, next, 1);
    if (lane == 0) before = 0.f, latest_before = -1;
    if (lane == 31) next_after = CHUNK;
    float s[2];
    int begin[2], end[2];
    s[0] = cut[0] ? 0.f : before + step[0];
    s[1] = cut[1] ? 0.f : s[0] + step[1];
    begin[0] = cut[0] ? 2 * lane : latest_before;
    begin[1] = cut[1] ? 2 * lane + 1 : begin[0];
    end[1] = next_after;
    end[0] = cut[1] ? 2 * lane + 1 : next_after;
    float total = __shfl_sync(FULL_WARP, s[1], 31), to_end[2], from_start[2];
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        to_end[k] = end[k] == CHUNK ? size[k] * ex2(total - s[k]) : 0.f;
        from_start[k] = begin[k] < 0 ? ex2(s[k]) : 0.f;
    }
    Steps& out = steps[idx];
    auto put = [&](float* row, float x, float y) { *reinterpret_cast<float2*>(row + 2 * lane) = make_float2(x, y); };
    put(out.dt, size[0], size[1]);
    put(out.s, s[0], s[1]);
    put(out.from_start, from_start[0], from_start[1]);
    out.to_end[lane] = pack_bf16(to_end[0], to_end[1]);
    #pragma unroll
    for (int k = 0; k < 2; k++) out.begin[2 * lane + k] = max(begin[k], 0), out.end[2 * lane + k] = end[k];
}
