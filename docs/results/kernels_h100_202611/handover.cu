// Two warps hand numbers to a third through shared memory, in the order of two barriers. `racecheck` of compute-sanitizer 2025.3.1 reports a race here.
//
// One block of 96 threads; out: 32 floats, which become the sum of 2 r + 1 over the rounds r. The last four arguments say how many barriers of its own
// a writing warp passes before and after it writes, and the reading warp before and after it reads.
typedef unsigned long long u64;
__device__ __forceinline__ unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void wait(unsigned barrier, unsigned parity) {
    unsigned is_over;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(is_over) : "r"(barrier), "r"(parity) : "memory");
    } while (!is_over);
}
__device__ __forceinline__ void arrive(unsigned barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void pass_own(int n) {
    for (int i = 0; i < n; i++) asm volatile("bar.sync %0, 32;" ::"r"(1 + (int)threadIdx.x / 32) : "memory");
}

extern "C" __global__ void mini(float* out, int n_rounds, int before_write, int after_write, int before_read, int after_read) {
    __shared__ float left[2][32];
    __shared__ u64 barriers[2];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned is_there = address(&barriers[0]), is_read = address(&barriers[1]);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 2;" ::"r"(is_there) : "memory");
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(is_read) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    float sum = 0.f;
    for (int round = 0; round < n_rounds; round++) {
        if (warp < 2) {
            pass_own(before_write);
            wait(is_read, (round + 1) & 1);
            left[warp][lane] = round + warp;
            __syncwarp();
            if (lane == 0) arrive(is_there);
            pass_own(after_write);
        } else {
            pass_own(before_read);
            wait(is_there, round & 1);
            sum += left[0][lane] + left[1][lane];
            __syncwarp();
            if (lane == 0) arrive(is_read);
            pass_own(after_read);
        }
    }
    if (warp == 2) out[lane] = sum;
}
