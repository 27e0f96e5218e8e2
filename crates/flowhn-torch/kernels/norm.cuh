// RMSNorm of a row that a team holds (rows.cuh), forward and backward:
//
//   y = round(x r) w,   g = r dy w - x r^3 mean(dy w x),   dw += dy x r,   where r = 1 / sqrt(mean(x^2) + eps)
#pragma once
#include "rows.cuh"

// This thread's part of the sum of a row's squares.
template <int N, class T> __device__ __forceinline__ float sum_of_squares(const Pack<T> (&row)[N]) {
    float sum = 0.f;
    #pragma unroll
    for (int v = 0; v < N; v++) {
        float a[VEC];
        row[v].get(a);
        #pragma unroll
        for (int i = 0; i < VEC; i++) sum += a[i] * a[i];
    }
    return sum;
}

// x r w, where x r is rounded to the dtype of x before the weight multiplies it.
template <class T> __device__ __forceinline__ Pack<T> normed_vector(const Pack<T>& x, float r, const float (&w)[VEC]) {
    float a[VEC];
    Pack<T> normed;
    x.get(a);
    #pragma unroll
    for (int i = 0; i < VEC; i++) a[i] *= r;
    normed.set(a), normed.get(a);
    #pragma unroll
    for (int i = 0; i < VEC; i++) a[i] *= w[i];
    normed.set(a);
    return normed;
}

// sum + dy w x over a vector.
template <class T>
__device__ __forceinline__ float add_product(float sum, const Pack<T>& x, const Pack<T>& dy, const float (&w)[VEC]) {
    float a[VEC], b[VEC];
    x.get(a), dy.get(b);
    #pragma unroll
    for (int i = 0; i < VEC; i++) sum += b[i] * w[i] * a[i];
    return sum;
}

// This thread's columns of a weight, which wait in shared memory so that registers are left for rows; more than two vectors a thread would be
// more than the shared memory of some GPUs, and stay in registers.
template <int N> struct OwnWeight {
    static constexpr bool SHARED = N <= 2;
    float4* own;
    float kept[SHARED ? 1 : N][VEC];
    template <bool ALIGNED>
    __device__ __forceinline__ OwnWeight(float* slots, const float* weight, const Team& team, const Width<ALIGNED>& width)
        : own(reinterpret_cast<float4*>(slots) + threadIdx.x) {
        if constexpr (SHARED) {
            float w[N][VEC];
            load_weight(w, weight, team, width);
            #pragma unroll
            for (int v = 0; v < N; v++) {
                at(v, 0) = make_float4(w[v][0], w[v][1], w[v][2], w[v][3]);
                at(v, 1) = make_float4(w[v][4], w[v][5], w[v][6], w[v][7]);
            }
        } else {
            load_weight(kept, weight, team, width);
        }
    }
    // Half of a vector; those of neighbouring threads are neighbours.
    __device__ __forceinline__ float4& at(int v, int half) const { return own[(2 * v + half) * blockDim.x]; }
    __device__ __forceinline__ void get(float (&w)[N][VEC]) const {
        #pragma unroll
        for (int v = 0; v < N; v++) get(w[v], v);
    }
    __device__ __forceinline__ void get(float (&w)[VEC], int v) const {
        if constexpr (SHARED) {
            float4 low = at(v, 0), high = at(v, 1);
            w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w, w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
        } else {
            #pragma unroll
            for (int i = 0; i < VEC; i++) w[i] = kept[v][i];
        }
    }
};

// This thread's part of the sum of dy w x over a row; times r^3 / d the sum is the slope that norm_gradient takes.
template <int N, class T>
__device__ __forceinline__ float weighted_product(const Pack<T> (&x)[N], const Pack<T> (&dy)[N], const float (&w)[N][VEC]) {
    float sum = 0.f;
    #pragma unroll
    for (int v = 0; v < N; v++) sum = add_product(sum, x[v], dy[v], w[v]);
    return sum;
}

// g = r dy w - x slope; adds to dw.
template <class T>
__device__ __forceinline__ void norm_gradient(float (&g)[VEC], float (&dw)[VEC], const Pack<T>& x, const Pack<T>& dy, const float (&w)[VEC],
                                              float r, float slope) {
    float b[VEC];
    x.get(g), dy.get(b);
    #pragma unroll
    for (int i = 0; i < VEC; i++) {
        dw[i] += b[i] * (g[i] * r);
        g[i] = r * (b[i] * w[i]) - g[i] * slope;
    }
}

// a += x.
template <class T> __device__ __forceinline__ void add_vector(float (&a)[VEC], const Pack<T>& x) {
    float b[VEC];
    x.get(b);
    #pragma unroll
    for (int i = 0; i < VEC; i++) a[i] += b[i];
}
