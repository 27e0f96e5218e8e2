// The sums that close SSD's backward, each in one fixed order.
//
//   db, dc bf16 [size] = sum over parts of f32 [parts, size];  d_a, d_d, d_bias f32 [n_heads] = sum over rows of f32 [3, rows, n_heads]
//
// The first 3 n_heads blocks take one head of one gradient each; the others four elements a thread of db, then of dc. It is bound by
// reading the parts.
#include "flowhn.cuh"

typedef DtypeOf<OUT_KIND>::type Out;
constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) ssd_reduce(
    const float* sums, float* d_a, float* d_d, float* d_bias, i64 n_rows, int n_heads,
    const float* db_parts, const float* dc_parts, Out* db, Out* dc, i64 size, int n_parts) {
    if (blockIdx.x < 3u * n_heads) {
        __shared__ float warps[THREADS / 32];
        int kind = blockIdx.x / n_heads, head = blockIdx.x % n_heads;
        float* out = kind == 0 ? d_a : kind == 1 ? d_d : d_bias;
        if (out == nullptr) return;
        float sum = 0.f;
        for (i64 i = threadIdx.x; i < n_rows; i += THREADS) sum += sums[(kind * n_rows + i) * n_heads + head];
        sum = warp_sum(sum);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x > 0) return;
        float total = 0.f;
        for (int i = 0; i < THREADS / 32; i++) total += warps[i];
        out[head] = total;
        return;
    }
    i64 i = ((i64)(blockIdx.x - 3 * n_heads) * THREADS + threadIdx.x) * 4;
    const float* parts = i < (size + 3) / 4 * 4 ? db_parts : dc_parts;
    Out* out = i < (size + 3) / 4 * 4 ? db : dc;
    if (i >= (size + 3) / 4 * 4) i -= (size + 3) / 4 * 4;
    if (i >= size) return;
    if (size % 4 == 0) {
        float sum[4] = {};
        for (int part = 0; part < n_parts; part++) {
            float v[4];
            load_vec(v, parts + part * size + i);
            #pragma unroll
            for (int k = 0; k < 4; k++) sum[k] += v[k];
        }
        store_vec(out + i, sum);
    } else {
        for (int k = 0; k < 4 && i + k < size; k++) {
            float sum = 0.f;
            for (int part = 0; part < n_parts; part++) sum += parts[part * size + i + k];
            out[i + k] = from_f32<Out>(sum);
        }
    }
}
