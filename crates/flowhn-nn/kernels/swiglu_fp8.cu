// SwiGLU between two products in fp8: what swiglu.cu computes in bf16, rounded to fp8 as fp8_cast.cu rounds it, without the bf16 values in
// memory. The bits are those of the two kernels one after the other.
//
//   y = silu(gate) up        dgate = dy up silu'(gate),   dup = dy silu(gate)
//
//   gate_up  [n_rows, 2 f], bf16, rows `stride` apart       dy  [n_rows, f], bf16, rows `dy_stride` apart
//   y [n_padded, f] and y_t in E4M3                         d [n_padded, 2 f] and d_t in E5M2; f a multiple of 16
//
// A block takes a tile of 128 x 128 (fp8_tile.cuh), in the backward pass the same tile of gate and up.
//
// Variants: FORMAT 0 swiglu_forward_fp8, 1 swiglu_backward_fp8.
#include "fp8_tile.cuh"

#if __CUDA_ARCH__ >= 890
__device__ __forceinline__ void unpack(float (&v)[8], const uint4& bits) {
    unsigned w[4] = {bits.x, bits.y, bits.z, bits.w};
    #pragma unroll
    for (int j = 0; j < 4; j++) v[2 * j] = low_bf16(w[j]), v[2 * j + 1] = high_bf16(w[j]);
}

__device__ __forceinline__ uint4 pack(const float (&v)[8]) {
    return make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

__device__ __forceinline__ uint4 load(const bf16* p, bool valid) {
    return valid ? *reinterpret_cast<const uint4*>(p) : make_uint4(0, 0, 0, 0);
}

#if FORMAT == 0
extern "C" __global__ void __launch_bounds__(THREADS) swiglu_forward_fp8(
    const bf16* __restrict__ gate_up, i64 stride, unsigned char* __restrict__ y, unsigned char* __restrict__ y_t,
    float* __restrict__ slot, int n_rows, int n_padded, int f) {
    __shared__ uint4 tile[TILE * TILE / 16];
    int first_row = blockIdx.y * TILE, first_col = blockIdx.x * TILE, col = first_col + tile_col();
    Fp8Matrix to{y, y_t, n_padded, f, f};
    float scale = slot[1], most = 0.f;
    uint4 gate[PASSES][4], up[PASSES][4];
    #pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            int row = first_row + 4 * tile_group(pass) + i;
            bool valid = col < f && row < n_rows;
            const bf16* from = gate_up + row * stride + col;
            gate[pass][i] = load(from, valid), up[pass][i] = load(from + f, valid);
        }
    }
    #pragma unroll
    for (int pass = 0; pass < PASSES; pass++) {
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float g[8], u[8];
            unpack(g, gate[pass][i]), unpack(u, up[pass][i]);
            #pragma unroll
            for (int j = 0; j < 8; j++) u[j] = swiglu<bf16>(g[j], u[j]);
            up[pass][i] = pack(u);
        }
        put_rows(reinterpret_cast<unsigned*>(tile), to, first_row, first_col, pass, up[pass], scale, most);
    }
    note_largest(slot, most);
    put_columns(tile, to, first_row, first_col);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, 2) swiglu_backward_fp8(
    const bf16* __restrict__ gate_up, i64 stride, const bf16* __restrict__ dy, i64 dy_stride, unsigned char* __restrict__ d,
    unsigned char* __restrict__ d_t, float* __restrict__ slot, int n_rows, int n_padded, int f) {
    __shared__ uint4 gate_tile[TILE * TILE / 16], up_tile[TILE * TILE / 16];
    int first_row = blockIdx.y * TILE, first_col = blockIdx.x * TILE, col = first_col + tile_col();
    Fp8Matrix dgate{d, d_t, n_padded, f, 2 * f}, dup{d ? d + f : d, d_t ? d_t + (i64)f * n_padded : d_t, n_padded, f, 2 * f};
    float scale = slot[1], most = 0.f;
    #pragma unroll 1
    for (int pass = 0; pass < PASSES; pass++) {
        uint4 gate[4], up[4], grad[4];
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            // Unsigned, it takes fewer registers.
            unsigned row = first_row + 4 * tile_group(pass) + i;
            bool valid = col < f && row < n_rows;
            const bf16* from = gate_up + row * (unsigned long long)stride + col;
            gate[i] = load(from, valid), up[i] = load(from + f, valid), grad[i] = load(dy + row * dy_stride + col, valid);
        }
        #pragma unroll
        for (int i = 0; i < 4; i++) {
            float g[8], u[8], dg[8], du[8];
            unpack(g, gate[i]), unpack(u, up[i]), unpack(du, grad[i]);
            #pragma unroll
            for (int j = 0; j < 8; j++) {
                float2 grad_of = swiglu_grad<bf16>(g[j], u[j], du[j]);
                dg[j] = grad_of.x, du[j] = grad_of.y;
            }
            gate[i] = pack(dg), up[i] = pack(du);
        }
        put_rows(reinterpret_cast<unsigned*>(gate_tile), dgate, first_row, first_col, pass, gate, scale, most);
        put_rows(reinterpret_cast<unsigned*>(up_tile), dup, first_row, first_col, pass, up, scale, most);
    }
    note_largest(slot, most);
    put_columns(gate_tile, dgate, first_row, first_col);
    put_columns(up_tile, dup, first_row, first_col);
}
#endif
#endif
