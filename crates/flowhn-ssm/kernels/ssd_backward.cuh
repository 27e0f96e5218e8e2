// What both forms of SSD's backward share: sums over lanes, and how a warp closes the books of a head in a chunk.
#pragma once
#include "ssd_tile.cuh"

__device__ __forceinline__ float sum_quad(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

// The sum over lanes with the same place in their quad.
__device__ __forceinline__ float sum_rows(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 4);
    x += __shfl_xor_sync(FULL_WARP, x, 8);
    return x + __shfl_xor_sync(FULL_WARP, x, 16);
}

// Whether a state and its gradient are cut off from some tokens of a chunk, by a reset or by a decay to 0.
__device__ __forceinline__ bool cuts_states(const Steps& steps) { return steps.from_start[CHUNK - 1] == 0.f; }

// Makes bf16 values in shared memory finite, those that are not the largest of their sign. A token that is cut off from a state gives
// it a weight of 0 in products, which then have to be 0.
template <int THREADS> __device__ __forceinline__ void make_finite(char* values, int n_bytes) {
    auto finite = [](unsigned pair) {
        if ((pair & 0x7f80) == 0x7f80) pair = (pair & 0xffff8000) | 0x7f7f;
        if ((pair & 0x7f800000) == 0x7f800000) pair = (pair & 0x8000ffff) | 0x7f7f0000;
        return pair;
    };
    #pragma unroll 1
    for (int i = threadIdx.x; i < n_bytes / 16; i += THREADS) {
        uint4* at = reinterpret_cast<uint4*>(values) + i;
        uint4 v = *at;
        *at = make_uint4(finite(v.x), finite(v.y), finite(v.z), finite(v.w));
    }
}

// What is left of `x` by a weight of which 0 leaves nothing, whatever `x` is.
__device__ __forceinline__ float left_by(float weight, float x) { return weight == 0.f ? 0.f : weight * x; }

// What the steps of a head's tokens in a chunk get, and the chunk's share of the gradients of a, d and dt_bias.
struct Books {
    // What the warps have found out, of this lane's tokens 2 lane and 2 lane + 1: r and q of the formulas in ssd_backward.cu.
    struct Found {
        float r[2], q[2];
        float u[2];           // the second part of q, 2^(s_end - s_j) x_j . dh b_j
        float states, skips;  // of the whole chunk: <dh, h> and the sum of dy . x
    };

    // Gradients of this lane's steps; the chunk's share of those of a, d and dt_bias.
    float dt[2], a, skip, bias;

    __device__ __forceinline__ void open() { dt[0] = dt[1] = a = skip = bias = 0.f; }

    // Adds a turn of a head that decays at `rate`; of its tokens `n_rows` are there.
    __device__ __forceinline__ void add(const Steps& steps, const Found& found, float rate, int n_rows, int activate) {
        int lane = threadIdx.x & 31;
        float net[2], added = 0.f;
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            int t = 2 * lane + k;
            net[k] = found.r[k] - steps.dt[t] * found.q[k];
            added += steps.dt[t] * found.u[k];
        }
        float all = warp_sum(added), keep = steps.from_start[CHUNK - 1];
        if (keep != 0.f) all += keep * found.states;
        // Sums from each token to the last that sees it.
        const unsigned char* ends = steps.end;
        bool stop[2] = {ends[2 * lane] == 2 * lane + 1, ends[2 * lane + 1] == 2 * lane + 2};
        float later = net[0] + (stop[0] ? 0.f : net[1]);
        bool stopped = stop[0] || stop[1];
        #pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            float after = __shfl_down_sync(FULL_WARP, later, offset);
            int after_stopped = __shfl_down_sync(FULL_WARP, (int)stopped, offset);
            if (lane + offset < 32) {
                if (!stopped) later += after;
                stopped = stopped || after_stopped;
            }
        }
        float after = __shfl_down_sync(FULL_WARP, later, 1);
        float by_step[2] = {later, net[1] + (stop[1] || lane == 31 ? 0.f : after)};
        #pragma unroll
        for (int k = 0; k < 2; k++)
            if (ends[2 * lane + k] == CHUNK) by_step[k] += all;
        float a_part = 0.f, bias_part = 0.f;
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            int t = 2 * lane + k;
            // A step that was cut off has no derivative, nor has one at a reset.
            bool cut = steps.dt[t] * (rate * LOG2_E) <= MIN_STEP || (t > 0 ? steps.begin[t] == t : steps.from_start[0] == 0.f);
            float step = cut ? 0.f : by_step[k];
            // With dt = softplus(z), the derivative by z is sigmoid(z) = 1 - exp(-dt).
            float grad = (rate * step + found.q[k]) * (activate ? -expm1f(-steps.dt[t]) : 1.f);
            if (t >= n_rows) grad = 0.f;
            a_part += steps.dt[t] * step, bias_part += grad, dt[k] += grad;
        }
        a += warp_sum(a_part), bias += warp_sum(bias_part), skip += found.skips;
    }

    // d_dt: the gradients of the chunk's first token's steps, [tokens, n_heads], at this head; sums: three arrays of `n_all` numbers, at
    // this chunk and head.
    template <class DT>
    __device__ __forceinline__ void write(DT* d_dt, i64 n_heads, int n_rows, float* sums, i64 n_all) const {
        int lane = threadIdx.x & 31;
        #pragma unroll
        for (int k = 0; k < 2; k++)
            if (2 * lane + k < n_rows) d_dt[(2 * lane + k) * n_heads] = from_f32<DT>(dt[k]);
        if (lane < 3) sums[lane * n_all] = lane == 0 ? a : lane == 1 ? skip : bias;
    }
};
