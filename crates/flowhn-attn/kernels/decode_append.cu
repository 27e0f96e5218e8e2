// Puts the key and the value of one token a sequence into the cache, at the place that the device counts; with ROTARY, queries and
// keys turn on the way as in rotary.cu.
//
//   keys[b, len] = turned k[b],   values[b, len] = v[b],   positions[len] = position,   len <- len + 1;   turned q -> turned_q
//
// q, k, v: [batch, heads or kv_heads, d_head], last axis dense, f32 or bf16; q may be null, with no heads. keys, values: [batch,
// capacity, kv_heads, d_head]; turned_q: [batch, heads, d_head], null without ROTARY. cos, sin: [d_head / 2], f32, of this token;
// positions: [capacity]; position: [1]. count: two ints, the cached tokens and 0.
//
// A block copies one sequence's token, a thread 8 features, or with ROTARY 8 pairs of a query or key. Every block reads the length
// before it says that it has; the last to say so counts the token.
//
// X_KIND: dtype. ROTARY: 0 or 1.
#include "rows.cuh"

typedef DtypeOf<X_KIND>::type X;

__device__ __forceinline__ void load(Pack<X>& pack, const X* from, int n, int aligned) {
    if (aligned) pack.load(from);
    else load_some(pack, from, n);
}

__device__ __forceinline__ void store(const Pack<X>& pack, X* to, int n, int aligned) {
    if (aligned) pack.store(to);
    else store_some(pack, to, n);
}

// Turns up to 8 pairs, the first `n` of them there.
__device__ __forceinline__ void turn(const X* from, X* to, const float* cosines, const float* sines, int half, int n, int aligned) {
    Pack<X> first, second;
    load(first, from, n, aligned), load(second, from + half, n, aligned);
    float a[VEC], b[VEC];
    first.get(a), second.get(b);
    #pragma unroll
    for (int i = 0; i < VEC; i++) {
        float cosine = i < n ? cosines[i] : 1.f, sine = i < n ? sines[i] : 0.f;
        float turned = a[i] * cosine - b[i] * sine;
        b[i] = b[i] * cosine + a[i] * sine;
        a[i] = turned;
    }
    first.set(a), second.set(b);
    store(first, to, n, aligned), store(second, to + half, n, aligned);
}

__device__ __forceinline__ void copy(const X* from, X* to, int n, int aligned) {
    Pack<X> pack;
    load(pack, from, n, aligned);
    store(pack, to, n, aligned);
}

extern "C" __global__ void __launch_bounds__(256)
decode_append(const X* q, i64 q_batch, i64 q_head, const X* k, i64 k_batch, i64 k_head, const X* v, i64 v_batch, i64 v_head,
              const float* cosines, const float* sines, X* turned_q, X* keys, X* values, i64* positions, const i64* position,
              int* count, int capacity, int heads, int kv_heads, int d_head, int aligned) {
    int b = blockIdx.x, len = count[0];
    i64 row = ((i64)b * capacity + len) * kv_heads * d_head;
    int width = ROTARY ? d_head / 2 : d_head, per_head = (width + VEC - 1) / VEC;
    for (int item = threadIdx.x; item < (heads + kv_heads) * per_head; item += blockDim.x) {
        int head = item / per_head, column = (item - head * per_head) * VEC, n = width - column;
        bool is_query = head < heads;
        int own = is_query ? head : head - heads;
        const X* from = (is_query ? q + b * q_batch + own * q_head : k + b * k_batch + own * k_head) + column;
        X* to = (is_query ? turned_q + ((i64)b * heads + own) * d_head : keys + row + own * d_head) + column;
        if constexpr (ROTARY) turn(from, to, cosines + column, sines + column, width, n, aligned);
        else if (!is_query) copy(from, to, n, aligned);
    }
    int per_value = (d_head + VEC - 1) / VEC;
    for (int item = threadIdx.x; item < kv_heads * per_value; item += blockDim.x) {
        int head = item / per_value, column = (item - head * per_value) * VEC;
        copy(v + b * v_batch + head * v_head + column, values + row + head * d_head + column, d_head - column, aligned);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (b == 0) positions[len] = *position;
        __threadfence();
        if (atomicAdd(count + 1, 1) == (int)gridDim.x - 1) count[0] = len + 1, count[1] = 0;
    }
}
