// The gated activation of an MLP: y = silu(gate) up, where gate is the first half of a row and up the second.
//
//   dgate = dy up silu'(gate),   dup = dy silu(gate)
//
// gate_up: [outer, inner, 2 f], last axis dense, f32 or bf16; y: [outer, inner, f], contiguous; dy: like y, any strides but
// the last; dgate_up: contiguous. All arithmetic is f32, rounded once.
//
// A thread takes the same vector of 8 columns of ROWS rows: all its loads are under way before the first is used, and
// neighbouring threads touch neighbouring memory. blockIdx.x counts ROWS rows, blockIdx.y blocks of columns.
//
// X_KIND: dtype; ROWS: rows a thread.
#include "rows.cuh"

typedef DtypeOf<X_KIND>::type X;

// One vector of each of ROWS rows.
struct Column {
    int n_rows, inner, column, n;
    bool aligned;

    __device__ __forceinline__ void load(Pack<X> (&to)[ROWS], const X* p, RowStrides strides, int first_row) const {
        #pragma unroll
        for (int k = 0; k < ROWS; k++) {
            int row = first_row + k;
            if (row >= n_rows) continue;
            int outer_idx = (unsigned)row / (unsigned)inner, inner_idx = row - outer_idx * inner;
            const X* from = p + strides.start(outer_idx, inner_idx) + column;
            if (aligned) to[k].load(from);
            else load_some(to[k], from, n);
        }
    }

    __device__ __forceinline__ void store(const Pack<X>& pack, X* p) const {
        if (aligned) pack.store(p + column);
        else store_some(pack, p + column, n);
    }
};

extern "C" __global__ void __launch_bounds__(256)
swiglu_forward(const X* gate_up, X* y, i64 outer, i64 stride, int n_rows, int inner, int f, int aligned) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * VEC, first_row = blockIdx.x * ROWS;
    if (column >= f) return;
    Column here{n_rows, inner, column, f - column, aligned != 0};
    Pack<X> gate[ROWS], up[ROWS];
    here.load(gate, gate_up, RowStrides{outer, stride}, first_row);
    here.load(up, gate_up + f, RowStrides{outer, stride}, first_row);
    #pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (first_row + k >= n_rows) break;
        float g[VEC], u[VEC];
        gate[k].get(g), up[k].get(u);
        #pragma unroll
        for (int i = 0; i < VEC; i++) u[i] = swiglu<X>(g[i], u[i]);
        Pack<X> out;
        out.set(u);
        here.store(out, y + (i64)(first_row + k) * f);
    }
}

extern "C" __global__ void __launch_bounds__(256)
swiglu_backward(const X* gate_up, const X* dy, X* dgate_up, i64 outer, i64 stride, i64 dy_outer, i64 dy_stride, int n_rows,
                int inner, int f, int aligned) {
    int column = (blockIdx.y * blockDim.x + threadIdx.x) * VEC, first_row = blockIdx.x * ROWS;
    if (column >= f) return;
    Column here{n_rows, inner, column, f - column, aligned != 0};
    Pack<X> gate[ROWS], up[ROWS], grad[ROWS];
    here.load(gate, gate_up, RowStrides{outer, stride}, first_row);
    here.load(up, gate_up + f, RowStrides{outer, stride}, first_row);
    here.load(grad, dy, RowStrides{dy_outer, dy_stride}, first_row);
    #pragma unroll
    for (int k = 0; k < ROWS; k++) {
        if (first_row + k >= n_rows) break;
        float g[VEC], u[VEC], dg[VEC], du[VEC];
        gate[k].get(g), up[k].get(u), grad[k].get(du);
        #pragma unroll
        for (int i = 0; i < VEC; i++) {
            float2 grad_of = swiglu_grad<X>(g[i], u[i], du[i]);
            dg[i] = grad_of.x, du[i] = grad_of.y;
        }
        Pack<X> out;
        X* row = dgate_up + (i64)(first_row + k) * 2 * f;
        out.set(dg);
        here.store(out, row);
        out.set(du);
        here.store(out, row + f);
    }
}
