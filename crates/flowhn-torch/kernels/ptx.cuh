// The machine instructions that CUDA C++ has no name for. All inline assembly of the project is in this file.
#pragma once

// The device's clock.
__device__ __forceinline__ long long device_nanoseconds() {
    long long now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// blockIdx.x, read anew: what is worked out from it late needs no register before.
__device__ __forceinline__ int block_index() {
    int idx;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(idx));
    return idx;
}

// 2^x, about 2 ulp; results below 2^-126 are 0.
__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// log2(x), about 1 ulp for x away from 1.
__device__ __forceinline__ float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, 1 ulp.
__device__ __forceinline__ float rcp(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The square root, about 1 ulp; 0 for x below 2^-126.
__device__ __forceinline__ float sqrt_approx(float x) {
    float y;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh(x) to about 11 bits: enough where the result is rounded to bf16.
__device__ __forceinline__ float tanh_approx(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats rounded to nearest even as bf16, `lo` in the low half.
__device__ __forceinline__ unsigned pack_bf16(float lo, float hi) {
    unsigned bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
    return bits;
}

__device__ __forceinline__ unsigned short bf16_bits(float x) { return (unsigned short)(pack_bf16(x, 0.f) & 0xffff); }

#if __CUDA_ARCH__ >= 890
// Two floats rounded to nearest even as fp8, `lo` in the low byte; what is larger than the largest number becomes that, NaN stays.
__device__ __forceinline__ unsigned short pack_e4m3(float lo, float hi) {
    unsigned short bits;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(hi), "f"(lo));
    return bits;
}
__device__ __forceinline__ unsigned short pack_e5m2(float lo, float hi) {
    unsigned short bits;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(bits) : "f"(hi), "f"(lo));
    return bits;
}
#endif

// The products of two pairs of bf16 values, each rounded once.
__device__ __forceinline__ unsigned mul_bf16_pair(unsigned a, unsigned b) {
    unsigned bits;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(bits) : "r"(a), "r"(b), "r"(0x80008000u));
    return bits;
}

// The address of shared memory that the instructions below take.
__device__ __forceinline__ unsigned smem_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// Loads four 8x8 matrices of 16-bit values: lane 8 m + i names row i of matrix m; each lane receives two neighbours of row lane / 4.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// The same, each matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned (&r)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(unsigned (&r)[2], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(unsigned (&r)[2], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}

// d = a b + c for a 16x16 (row-major fragments), b 16x8 (column-major fragments) in bf16, c and d 16x8 in f32.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// d = a b + c for a 16x8 (row-major fragments), b 8x8 (column-major fragments) of f32 bits, of which the product sees the upper 19.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], const float (&c)[4]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

// Starts copying 16 bytes to shared memory past the registers; zeros where `valid` is false (`src` is then not read).
__device__ __forceinline__ void cp_async16(unsigned dst, const void* src, bool valid = true) {
    int n_bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)), "r"(n_bytes) : "memory");
}

__device__ __forceinline__ void cp_async8(unsigned dst, const void* src, bool valid = true) {
    int n_bytes = valid ? 8 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)), "r"(n_bytes) : "memory");
}

__device__ __forceinline__ void cp_async4(unsigned dst, const void* src, bool valid = true) {
    int n_bytes = valid ? 4 : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)), "r"(n_bytes) : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `N` of this thread's latest groups are still under way; a barrier must follow before others read.
template <int N> __device__ __forceinline__ void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// A pointer that was read from memory, of which the compiler then knows that it leads to device memory, as it does of arguments.
template <class T> __device__ __forceinline__ T* to_device_memory(T* p) {
    __builtin_assume(__isGlobal(p));
    return p;
}

// Starts bringing the 32 bytes around an address of device memory into the L2 cache.
__device__ __forceinline__ void prefetch_l2(const void* src) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(src)));
}

// A barrier of `n_threads` threads of the block, one of ids 1..15.
__device__ __forceinline__ void named_barrier(int id, int n_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n_threads) : "memory");
}

// ---- Kernels that start early ------------------------------------------------------------------------------------------------
// `Kernel::launch_early` of the host. Before Hopper kernels start in their turn, and these are nothing.

// Tells that the next kernel in the stream may start, if it was launched to start early, once every block has come here or has ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernel in front has ended and all that it wrote can be read.
__device__ __forceinline__ void wait_for_kernel_in_front() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- Hopper's asynchronous products ---------------------------------------------------------------------------------------
#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// What shared memory holds for a product: rows of 128 bytes, whose 16-byte pieces are swizzled by the row's number modulo 8.
// Of an operand with k along the rows, `eight` is the distance of its groups of 8 rows in bytes; of one with k from row to row,
// `eight` is that of groups of 8 values of k and `panel` that of its panels of 64 columns. The tile begins at a multiple of 1024.
__device__ __forceinline__ unsigned long long wgmma_operand(unsigned address, int panel, int eight) {
    return (unsigned long long)((address & 0x3ffff) >> 4) | (unsigned long long)(panel >> 4) << 16 | (unsigned long long)(eight >> 4) << 32 | 1ull << 62;
}

// Before the first product, and where registers of one were touched.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `N` of the latest groups are still under way.
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving reads and writes of a result over a wait, or what makes a factor over a fence. The assembler, which comes after it,
// knows what products that are under way read and write, and moves the rest as it likes.
template <int TILES> __device__ __forceinline__ void wgmma_hold(float (&d)[TILES][4]) {
    #pragma unroll
    for (int i = 0; i < TILES; i++) asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
}
template <int TILES> __device__ __forceinline__ void wgmma_hold(unsigned (&a)[TILES][4]) {
    #pragma unroll
    for (int i = 0; i < TILES; i++) asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
}
// Lets products and bulk stores read what this thread wrote to shared memory, after the next barrier.
__device__ __forceinline__ void wgmma_publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The registers of a result of 8, 16 or 32 pieces of 8 columns, by their numbers and as operands.
#define WGMMA_NAMES_8 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_16 WGMMA_NAMES_8 ", " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_32 WGMMA_NAMES_16 ", " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_PIECE(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define WGMMA_PIECES_4(d, i) WGMMA_PIECE(d, i), WGMMA_PIECE(d, i + 1), WGMMA_PIECE(d, i + 2), WGMMA_PIECE(d, i + 3)
#define WGMMA_PIECES_8(d) WGMMA_PIECES_4(d, 0), WGMMA_PIECES_4(d, 4)
#define WGMMA_PIECES_16(d) WGMMA_PIECES_8(d), WGMMA_PIECES_4(d, 8), WGMMA_PIECES_4(d, 12)
#define WGMMA_PIECES_32(d) \
    WGMMA_PIECES_16(d), WGMMA_PIECES_4(d, 16), WGMMA_PIECES_4(d, 20), WGMMA_PIECES_4(d, 24), WGMMA_PIECES_4(d, 28)

// d = a b^T (+ d) for a and b 64 x 16 in shared memory with k along their rows, by four warps with 16 rows each.
__device__ __forceinline__ void wgmma_64x64(float (&d)[8][4], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_NAMES_8 "}, %32, %33, p, 1, 1, 0, 0;\n}"
        : WGMMA_PIECES_8(d)
        : "l"(a), "l"(b), "r"((int)add) : "memory");
}

// d = a b (+ d) for a in registers and b 16 x 64 in shared memory with k from row to row.
__device__ __forceinline__ void wgmma_64x64(float (&d)[8][4], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" WGMMA_NAMES_8 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1;\n}"
        : WGMMA_PIECES_8(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add) : "memory");
}

// The same for b 16 x 128.
__device__ __forceinline__ void wgmma_64x128(float (&d)[16][4], const unsigned (&a)[4], unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_NAMES_16 "}, {%64, %65, %66, %67}, %68, p, 1, 1, 1;\n}"
        : WGMMA_PIECES_16(d)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add) : "memory");
}

// d = a b^T (+ d) for a 64 x 16 and b 128 x 16 in shared memory with k along their rows, by four warps with 16 rows each; with B_BY_K 1
// d = a b (+ d) for b 16 x 128 with k from row to row.
template <int B_BY_K = 0> __device__ __forceinline__ void wgmma_64x128(float (&d)[16][4], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" WGMMA_NAMES_16 "}, %64, %65, p, 1, 1, 0, %67;\n}"
        : WGMMA_PIECES_16(d)
        : "l"(a), "l"(b), "r"((int)add), "n"(B_BY_K) : "memory");
}

// d = a b^T (+ d) for a 64 x 16 and b 256 x 16 in shared memory with k along their rows, by four warps with 16 rows each; with B_BY_K 1
// d = a b (+ d) for b 16 x 256 with k from row to row.
template <int B_BY_K = 0> __device__ __forceinline__ void wgmma_64x256(float (&d)[32][4], unsigned long long a, unsigned long long b, bool add) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" WGMMA_NAMES_32 "}, %128, %129, p, 1, 1, 0, %131;\n}"
        : WGMMA_PIECES_32(d)
        : "l"(a), "l"(b), "r"((int)add), "n"(B_BY_K) : "memory");
}

// ---- Hopper's barriers in shared memory ---------------------------------------------------------------------------------------
// A barrier is 8 bytes of shared memory. A phase of it ends when all arrivals and all bytes that were announced have come; the
// parity of phases begins at 0.

__device__ __forceinline__ void mbarrier_init(unsigned barrier, int n_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(n_arrivals) : "memory");
}
// Before other threads or bulk copies use barriers that this thread initialised; a barrier of the threads follows.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives and announces bytes that bulk copies will bring.
__device__ __forceinline__ void mbarrier_expect(unsigned barrier, int n_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(n_bytes) : "memory");
}
// Waits for the end of a phase of this parity.
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, unsigned parity) {
    unsigned is_over;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(is_over) : "r"(barrier), "r"(parity) : "memory");
    } while (!is_over);
}

// ---- Hopper's copies of boxes of a matrix -----------------------------------------------------------------------------------
// A box is rows of 128 bytes, which lie in shared memory as products want them: at a multiple of 1024, the 16-byte pieces of a row
// swizzled by its number modulo 8. The map says where the matrix is and how many rows a box has. It comes as a
// `const __grid_constant__` parameter, for which the launch takes `Arg::Boxes`.
struct alignas(64) BoxMap {
    unsigned long long words[16];
};
// Starts copying the box whose first element is in that column and row to shared memory; tells the barrier of all its bytes. What lies
// outside the matrix becomes 0.
__device__ __forceinline__ void box_load(unsigned dst, const BoxMap& map, int column, int row, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(dst),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier) : "memory");
}
// Starts copying a box from shared memory; what lies outside the matrix goes nowhere. `wgmma_publish` and a barrier come first.
__device__ __forceinline__ void box_store(const BoxMap& map, int column, int row, unsigned src) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column), "r"(row), "r"(src)
                 : "memory");
}
// The same for maps of four axes: the box is of one matrix of one stack of them.
__device__ __forceinline__ void box_load(unsigned dst, const BoxMap& map, int column, int row, int matrix, int stack, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(dst),
                 "l"(&map), "r"(column), "r"(row), "r"(matrix), "r"(stack), "r"(barrier) : "memory");
}
__device__ __forceinline__ void box_store(const BoxMap& map, int column, int row, int matrix, int stack, unsigned src) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(&map), "r"(column), "r"(row),
                 "r"(matrix), "r"(stack), "r"(src) : "memory");
}
// Starts copying neighbouring bytes to shared memory and tells the barrier of them; both places and the number are multiples of 16.
__device__ __forceinline__ void bulk_load(unsigned dst, const void* src, int n_bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(__cvta_generic_to_global(src)), "r"(n_bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void box_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most `N` of this thread's latest groups of stores still read shared memory.
template <int N> __device__ __forceinline__ void box_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
// Stores four 8x8 matrices of 16-bit values: lane 8 m + i names row i of matrix m; each lane gives two neighbours of row lane / 4.
__device__ __forceinline__ void stmatrix_x4(unsigned address, const unsigned (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]),
                 "r"(r[3]) : "memory");
}

// ---- Hopper's clusters of blocks ---------------------------------------------------------------------------------------------
// Blocks of a cluster run side by side and reach each other's shared memory.

// This block's number in its cluster.
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// A barrier of all threads of the cluster.
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
// Arrives at the barrier in the same place of a block of the cluster. To the other block that publishes nothing that this thread wrote: it is for
// memory whose readers have ended. `.release.cluster` would publish, and fence the whole GPU each time.
__device__ __forceinline__ void mbarrier_arrive_at(unsigned barrier, unsigned rank) {
    asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
                 "r"(rank) : "memory");
}
// As `box_load`, to the same place in each block of the cluster whose bit is set; each one's own barrier is told.
__device__ __forceinline__ void box_load_to(unsigned dst, const BoxMap& map, int column, int row, unsigned barrier, unsigned short blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
                 ::"r"(dst), "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}

// Changes the number of registers that each thread of a group of four warps has.
template <int N> __device__ __forceinline__ void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
#endif
