// The position of the token that a step of decoding reads, and its rotary angles.
//
//   position <- position + 1,   cos[i], sin[i] = cos, sin(position rates[i])
//
// position: [1]; rates: [half], f64, those of `RotaryTable`; cos, sin: [half], f32. Far positions keep their exactness because angles
// are f64, as on the host. One block: a step that is captured in a CUDA graph thus reads a new position in every replay.
#include "flowhn.cuh"

extern "C" __global__ void __launch_bounds__(128)
decode_clock(i64* position, const double* rates, float* cosines, float* sines, int half) {
    i64 next = *position + 1;
    for (int i = threadIdx.x; i < half; i += blockDim.x) {
        double angle = next * rates[i];
        cosines[i] = (float)cos(angle);
        sines[i] = (float)sin(angle);
    }
    __syncthreads();
    if (threadIdx.x == 0) *position = next;
}
