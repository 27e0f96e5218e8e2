// What a small memset node of a graph does: `n` elements of 1, 2 or 4 bytes at `to` become the low bytes of `value`. One block.
#include "flowhn.cuh"

template <class T> __device__ __forceinline__ void fill(T* to, unsigned value, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = (T)value;
}

extern "C" __global__ void set_memory(void* to, unsigned value, int element_bytes, int n) {
    if (element_bytes == 4) fill((unsigned*)to, value, n);
    else if (element_bytes == 2) fill((unsigned short*)to, value, n);
    else fill((unsigned char*)to, value, n);
}
