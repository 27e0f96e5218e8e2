// The dynamic shared memory of a block.
#pragma once
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(1024) char flowhn_shared[];
    return flowhn_shared;
}
