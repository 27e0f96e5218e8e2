// out = in * factor, rounded to another dtype or the same, the factor a number on the device.
//
//   in [n], out [n], f32 or bf16, contiguous; factor one f32
//
// The gradients that the LM head finds in its forward pass wait for the gradient that comes in. Reading it on the device spares
// waiting for it. Where the type stays, the product is taken in place, and not at all if the factor is 1, as it is where the loss
// is the end of the graph. A thread takes words of 4 elements, four words at once.
//
// Variants: IN_KIND, OUT_KIND 0 f32, 1 bf16.
#include "flowhn.cuh"

typedef DtypeOf<IN_KIND>::type In;
typedef DtypeOf<OUT_KIND>::type Out;
constexpr int VEC = 4, WORDS = 4, THREADS = 256;

__device__ __forceinline__ void multiply(const In* in, float by, Out* out, i64 n) {
    i64 first = (i64)blockIdx.x * (THREADS * WORDS * VEC) + threadIdx.x * VEC;
    if (first + (WORDS - 1) * THREADS * VEC + VEC <= n) {
        float x[WORDS][VEC];
        #pragma unroll
        for (int w = 0; w < WORDS; w++) load_vec<VEC>(x[w], in + first + w * THREADS * VEC);
        #pragma unroll
        for (int w = 0; w < WORDS; w++) {
            #pragma unroll
            for (int i = 0; i < VEC; i++) x[w][i] *= by;
            store_vec<VEC>(out + first + w * THREADS * VEC, x[w]);
        }
        return;
    }
    for (int w = 0; w < WORDS; w++) {
        for (int i = 0; i < VEC; i++) {
            i64 idx = first + w * THREADS * VEC + i;
            if (idx < n) out[idx] = from_f32<Out>(to_f32(in[idx]) * by);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) scaled_cast(
    const In* __restrict__ in, const float* __restrict__ factor, Out* __restrict__ out, i64 n) {
    multiply(in, *factor, out, n);
}

// Of a variant with one type.
extern "C" __global__ void __launch_bounds__(THREADS) scale_in_place(Out* x, const float* __restrict__ factor, i64 n) {
    if (*factor != 1.f) multiply(reinterpret_cast<const In*>(x), *factor, x, n);
}
