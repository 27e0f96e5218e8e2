// A matrix times one vector: y[o] = sum_i w[o, i] x[i].
//
// x: [d_in], w: [d_out, d_in] with rows `w_row` elements apart, y: [d_out], all bf16, rows aligned to 16 bytes, 8 divides d_in. Sums
// are f32, in a fixed order, rounded once.
//
// A warp takes a row of w: a lane AHEAD vectors of 8 at a time, all loads under way before the first is used. Nothing of w is read
// twice, so it passes by the cache, where x stays.
#include "rows.cuh"

constexpr int WARPS = 2, AHEAD = 3;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
linear_row(const bf16* x, const bf16* w, bf16* y, i64 w_row, int d_out, int d_in) {
    int lane = threadIdx.x % 32, o = blockIdx.x * WARPS + threadIdx.x / 32;
    if (o >= d_out) return;
    const bf16* row = w + o * w_row;
    float sum = 0.f;
    for (int start = lane * VEC; start < d_in; start += AHEAD * 32 * VEC) {
        Pack<bf16> weights[AHEAD], inputs[AHEAD];
        #pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            int column = start + u * 32 * VEC;
            weights[u] = Pack<bf16>{};
            if (column < d_in) weights[u].words = __ldcs(reinterpret_cast<const uint4*>(row + column));
        }
        #pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            int column = start + u * 32 * VEC;
            inputs[u] = Pack<bf16>{};
            if (column < d_in) inputs[u].load(x + column);
        }
        #pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            float a[VEC], b[VEC];
            weights[u].get(a), inputs[u].get(b);
            #pragma unroll
            for (int i = 0; i < VEC; i++) sum += a[i] * b[i];
        }
    }
    sum = warp_sum(sum);
    if (lane == 0) y[o] = from_f32<bf16>(sum);
}
