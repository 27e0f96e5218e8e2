// Rotary position embedding: feature i of the first half of a head and feature i of the second half turn together.
//
//   y[i]        = x[i] cos - x[half + i] sin
//   y[half + i] = x[half + i] cos + x[i] sin      with cos, sin of [token, i]
//
// The gradient is the same rotation back: sense = -1.
//
// x: [batch, n, heads, 2 half], last axis dense, any other strides, f32 or bf16; cos, sin: [n, half], f32; y: as x. All
// arithmetic is f32, rounded once.
//
// A thread turns 8 pairs: one vector of each half. A block takes `n_tokens` neighbouring tokens, whose heads share the table
// from the cache. Where rows are not aligned or 8 does not divide half, the same vectors are read element by element.
//
// X_KIND: dtype.
#include "rows.cuh"

typedef DtypeOf<X_KIND>::type X;

extern "C" __global__ void __launch_bounds__(256)
rotary(const X* x, const float* cos, const float* sin, X* y, i64 x_batch, i64 x_token, i64 x_head, i64 y_batch, i64 y_token, i64 y_head,
       int batch, int n, int heads,
       int half, int n_tokens, int aligned, float sense) {
    int n_vectors = (half + VEC - 1) / VEC, per_token = heads * n_vectors;
    for (int item = threadIdx.x; item < n_tokens * per_token; item += blockDim.x) {
        int token_idx = item / per_token, rest = item - token_idx * per_token;
        i64 token = (i64)blockIdx.x * n_tokens + token_idx;
        if (token >= (i64)batch * n) return;
        int head = rest / n_vectors, column = (rest - head * n_vectors) * VEC, n_columns = half - column;
        int b = (unsigned)token / (unsigned)n, i = (int)token - b * n;
        const X* from = x + b * x_batch + i * x_token + head * x_head + column;
        X* to = y + b * y_batch + i * y_token + head * y_head + column;
        const float* cos_at = cos + (i64)i * half + column;
        const float* sin_at = sin + (i64)i * half + column;
        Pack<X> first, second;
        Pack<float> c, s;
        if (aligned) {
            first.load(from), second.load(from + half), c.load(cos_at), s.load(sin_at);
        } else {
            load_some(first, from, n_columns), load_some(second, from + half, n_columns);
            load_some(c, cos_at, n_columns), load_some(s, sin_at, n_columns);
        }
        float a[VEC], b2[VEC], cosine[VEC], sine[VEC];
        first.get(a), second.get(b2), c.get(cosine), s.get(sine);
        #pragma unroll
        for (int k = 0; k < VEC; k++) {
            float turned = a[k] * cosine[k] - b2[k] * (sense * sine[k]);
            b2[k] = b2[k] * cosine[k] + a[k] * (sense * sine[k]);
            a[k] = turned;
        }
        first.set(a), second.set(b2);
        if (aligned) first.store(to), second.store(to + half);
        else store_some(first, to, n_columns), store_some(second, to + half, n_columns);
    }
}
