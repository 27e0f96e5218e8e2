// The scales of the casts to fp8 (fp8_cast.cu) of the next step, from what the casts of the last one saw.
//
//   held = max(largest, 15/16 held)     scale = 2^(top - floor(log2 held))     inverse = 1 / scale     largest = 0
//
//   slots  [n_slots, 4], f32: inverse, scale, largest, held
//
// `top` is the exponent of the format's largest number less one: what is as large as `held` is then rounded to a value between a quarter
// and half of that number's power of two, and 1.75 times as large still fits. A slot whose `held` is negative has seen nothing; a largest
// value that is not finite counts as none. While all was zero, the scale is 2^start.
//
// Slots come in threes: activation, weight (both E4M3), gradient (E5M2). One thread a slot.
#include "flowhn.cuh"

constexpr int LIMIT = 96;

extern "C" __global__ void fp8_scales(float* __restrict__ slots, int n_slots, int first_role) {
    int slot = blockIdx.x * blockDim.x + threadIdx.x;
    if (slot >= n_slots) return;
    int role = (first_role + slot) % 3, top = role == 2 ? 14 : 7, start = role == 2 ? 20 : 4;
    float4* numbers = reinterpret_cast<float4*>(slots) + slot;
    float largest = numbers->z, held = numbers->w;
    if (!(largest < __uint_as_float(0x7f800000))) largest = 0.f;
    if (held >= 0.f || largest > 0.f) held = fmaxf(largest, held * 0.9375f);
    int exponent = held > 0.f ? top - ((int)(__float_as_uint(held) >> 23) - 127) : start;
    exponent = min(max(exponent, -LIMIT), LIMIT);
    *numbers = make_float4(__uint_as_float((unsigned)(127 - exponent) << 23), __uint_as_float((unsigned)(127 + exponent) << 23), 0.f, held);
}
