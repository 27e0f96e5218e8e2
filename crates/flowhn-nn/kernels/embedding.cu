// The token embedding, forward and backward.
//
//   x_t = table_id(t) rounded to the dtype of x,   dtable_v = sum of dx_t over the tokens with id(t) = v, in their order
//
//   table, dtable  [vocab_size, d], f32        ids  [n], i64; those outside the vocabulary give rows of NaN and no gradient
//   x, dx          [n, d], f32 or bf16, rows of dx with any stride
//
// Forward: a thread copies V neighbours of one row.
//
// Backward: the ids come sorted (stably, as i32, with the positions that they had; those outside the vocabulary as -1 or
// vocab_size). The tokens of one id are then neighbours, and the block that owns a row of the table finds them by bisection, so each
// row is written once, zeros included, without atomics and without a pass that clears the table. Two things keep frequent tokens from
// holding up the rest: `embedding_parts` first adds up each CHUNK neighbours that have one id, in blocks of their own, and the owner
// reads that part in place of CHUNK rows; and a block owns rows far apart, for frequent tokens often have neighbouring ids.
//
// Variants: X_KIND 0 f32, 1 bf16; VEC neighbours a thread (V); CHUNK tokens of a part.
#include "flowhn.cuh"

typedef DtypeOf<X_KIND>::type T;
constexpr int V = VEC;
// Table rows of a block.
constexpr int ROWS = 32;

extern "C" __global__ void __launch_bounds__(256) embedding_forward(
    const float* __restrict__ table, const i64* __restrict__ ids, T* __restrict__ x, i64 n, int d, i64 vocab_size) {
    int n_words = d / V;
    i64 word = (i64)blockIdx.x * 256 + threadIdx.x;
    i64 token = word / n_words;
    if (token >= n) return;
    int column = (int)(word - token * n_words) * V;
    i64 id = ids[token];
    float row[V];
    if (id >= 0 && id < vocab_size) {
        load_vec<V>(row, table + id * d + column);
    } else {
        #pragma unroll
        for (int v = 0; v < V; v++) row[v] = __uint_as_float(0x7fc00000u);
    }
    store_vec<V>(x + token * d + column, row);
}

// Adds V columns of the rows that `order` names from `from` up to `to`.
__device__ __forceinline__ void add_rows(float (&sum)[V], const T* dx, i64 dx_row, const i64* order, int from, int to) {
    #pragma unroll 8
    for (int i = from; i < to; i++) {
        float row[V];
        load_vec<V>(row, dx + order[i] * dx_row);
        #pragma unroll
        for (int v = 0; v < V; v++) sum[v] += row[v];
    }
}

// parts: [n / CHUNK, d]. The block's chunk is skipped where it holds several ids; its owner reads the rows then.
extern "C" __global__ void __launch_bounds__(256) embedding_parts(
    const int* __restrict__ sorted, const i64* __restrict__ order, const T* __restrict__ dx, i64 dx_row,
    float* __restrict__ parts, int d) {
    int first = blockIdx.x * CHUNK;
    if (sorted[first] != sorted[first + CHUNK - 1]) return;
    for (int column = threadIdx.x * V; column < d; column += 256 * V) {
        float sum[V] = {};
        add_rows(sum, dx + column, dx_row, order, first, first + CHUNK);
        store_vec<V>(parts + (i64)blockIdx.x * d + column, sum);
    }
}

// The first of the sorted ids that is not below `id`.
__device__ __forceinline__ int first_of(const int* sorted, int n, int id) {
    int low = 0, high = n;
    while (low < high) {
        int middle = (low + high) / 2;
        if (sorted[middle] < id) low = middle + 1;
        else high = middle;
    }
    return low;
}

// The row of `padding` gets zeros; -1 for none.
extern "C" __global__ void __launch_bounds__(256) embedding_backward(
    const int* __restrict__ sorted, const i64* __restrict__ order, const T* __restrict__ dx, i64 dx_row,
    const float* __restrict__ parts, float* __restrict__ dtable, int n, int d, int vocab_size, int padding) {
    __shared__ int begin[ROWS], end[ROWS];
    // Row i of the block is row blockIdx.x + i gridDim.x of the table.
    int n_words = d / V, n_rows = (vocab_size - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    if (threadIdx.x < 2 * n_rows) {
        int i = threadIdx.x / 2, id = (int)blockIdx.x + i * (int)gridDim.x;
        if (threadIdx.x % 2 == 0) begin[i] = first_of(sorted, n, id);
        else end[i] = first_of(sorted, n, id + 1);
    }
    __syncthreads();
    for (int word = threadIdx.x; word < n_rows * n_words; word += 256) {
        int i = word / n_words, column = (word - i * n_words) * V;
        int row = (int)blockIdx.x + i * (int)gridDim.x, from = begin[i], to = row == padding ? from : end[i];
        int first_chunk = (from + CHUNK - 1) / CHUNK, last_chunk = to / CHUNK;
        float sum[V] = {};
        if (first_chunk < last_chunk) {
            add_rows(sum, dx + column, dx_row, order, from, first_chunk * CHUNK);
            #pragma unroll 8
            for (int chunk = first_chunk; chunk < last_chunk; chunk++) {
                float part[V];
                load_vec<V>(part, parts + (i64)chunk * d + column);
                #pragma unroll
                for (int v = 0; v < V; v++) sum[v] += part[v];
            }
            from = last_chunk * CHUNK;
        }
        add_rows(sum, dx + column, dx_row, order, from, to);
        store_vec<V>(dtable + (i64)row * d + column, sum);
    }
}
