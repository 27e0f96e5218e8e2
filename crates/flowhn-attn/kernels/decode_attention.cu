// Attention of one query a sequence to the keys of its cache, whose number the device counts.
//
//   o[h] = sum_m p_m v[m, h / ratio] / sum_m p_m,   p_m = exp(scale q[h] . k[m, h / ratio])      over the keys m that it sees
//
// q: [batch, heads, d_head], last axis dense, f32 or bf16; keys, values: [batch, capacity, kv_heads, d_head], of which the first
// count[0] are there; o: [batch, heads, d_head], contiguous. With a window the query sees keys less than `window` positions before its
// own, the last of `positions`, and those below n_sinks; without (0) all. Sums are f32, a weight is never rounded.
//
// The keys that are seen are cut into n_parts equal parts: a block takes one part for GROUP query heads that share a key head, so
// that keys and values are read once. A key lies on LANES lanes, 8 features each, VECTORS times; a warp thus reads 32 / LANES keys at
// a time, AHEAD of these before the first is used. Each such row of lanes keeps a softmax of its own; those of a block are joined in a
// fixed order at the end, those of the parts by `decode_attention_join`. Parts depend on the number of keys alone, so equal
// inputs give equal bits.
//
// X_KIND: dtype. LANES, VECTORS: LANES * VECTORS * 8 >= d_head. GROUP: query heads of a block. AHEAD. ROWS_ALIGNED: 1 if rows are
// whole vectors of 16 bytes.
#include "rows.cuh"

typedef DtypeOf<X_KIND>::type X;
constexpr int WARPS = 8, KEYS = 32 / LANES, PASS = WARPS * KEYS, WIDTH = LANES * VECTORS * VEC;
// Parts of a sequence, at most.
constexpr int MAX_PARTS = 64;
// Below every score: a maximum of no scores whose differences are numbers.
constexpr float LOWEST = -1e30f;

// The first of [low, high) whose position is not below `bound`, where positions increase.
__device__ __forceinline__ int first_from(const i64* positions, int low, int high, i64 bound) {
    // Where no position is missing, the first one is it.
    if (low < high && positions[low] >= bound) return low;
    while (low < high) {
        int middle = low + (high - low) / 2;
        if (positions[middle] < bound) low = middle + 1;
        else high = middle;
    }
    return low;
}

// The keys that the query sees: the first `n_front`, and those from n_front + gap on; n in all, in parts of `chunk`.
struct Shown {
    int n_front, gap, n, chunk;
    __device__ __forceinline__ Shown(const i64* positions, const int* count, i64 window, i64 n_sinks, int n_parts) {
        int len = count[0], start = 0;
        n_front = 0;
        if (window > 0) {
            // Positions increase by at least one a key.
            i64 bound = positions[len - 1] - window + 1;
            start = first_from(positions, len > window ? len - (int)window : 0, len, bound);
            n_front = first_from(positions, 0, n_sinks < start ? (int)n_sinks : start, n_sinks);
        }
        gap = start - n_front;
        n = len - gap;
        int passes = (n + PASS - 1) / PASS;
        chunk = (passes + n_parts - 1) / n_parts * PASS;
    }
    __device__ __forceinline__ int key(int i) const { return i < n_front ? i : i + gap; }
};

struct Softmax {
    float most, sum;
    // The factor of what was summed before, where scores up to `score` join.
    __device__ __forceinline__ float raise(float score) {
        float before = most;
        most = fmaxf(most, score);
        float factor = exp2f(before - most);
        sum *= factor;
        return factor;
    }
};

__device__ __forceinline__ void load_key(Pack<X> (&row)[VECTORS], const X* from, int lane, int d_head) {
    #pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int column = (v * LANES + lane) * VEC;
        if constexpr (!ROWS_ALIGNED) load_some(row[v], from + column, d_head - column);
        else if (column < d_head) row[v].load(from + column);
        else row[v] = Pack<X>{};
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
decode_attention(const X* q, i64 q_batch, i64 q_head, const X* keys, const X* values, const i64* positions, const int* count, X* o,
                 float* part_sums, float* part_softmax, int capacity, int heads, int kv_heads, int d_head, int n_parts, i64 window,
                 i64 n_sinks, float scale) {
    __shared__ float sums[WARPS][WIDTH];
    __shared__ Softmax joined[WARPS];
    int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
    int ratio = heads / kv_heads, n_tiles = (ratio + GROUP - 1) / GROUP;
    int kv_head = blockIdx.y / n_tiles, first = blockIdx.y % n_tiles * GROUP, n_own = min(GROUP, ratio - first), b = blockIdx.z;
    Shown shown(positions, count, window, n_sinks, n_parts);
    i64 begin = (i64)blockIdx.x * shown.chunk;
    if (begin >= shown.n) return;
    int end = min((i64)shown.n, begin + shown.chunk);

    float query[GROUP][VECTORS][VEC], mean[GROUP][VECTORS][VEC];
    Softmax softmax[GROUP];
    #pragma unroll
    for (int g = 0; g < GROUP; g++) {
        softmax[g] = {LOWEST, 0.f};
        int own = min(g, n_own - 1);
        Pack<X> packed[VECTORS];
        load_key(packed, q + b * q_batch + (kv_head * ratio + first + own) * q_head, lane, d_head);
        #pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            packed[v].get(query[g][v]);
            #pragma unroll
            for (int i = 0; i < VEC; i++) query[g][v][i] *= scale * LOG2_E, mean[g][v][i] = 0.f;
        }
    }

    i64 token = (i64)kv_heads * d_head, base = (i64)b * capacity * token + kv_head * d_head;
    for (int from = begin; from < end; from += AHEAD * PASS) {
        Pack<X> k[AHEAD][VECTORS], val[AHEAD][VECTORS];
        bool there[AHEAD];
        i64 place[AHEAD];
        #pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            int i = from + u * PASS + row;
            there[u] = i < end;
            place[u] = base + shown.key(there[u] ? i : end - 1) * token;
            load_key(k[u], keys + place[u], lane, d_head);
        }
        #pragma unroll
        for (int u = 0; u < AHEAD; u++) load_key(val[u], values + place[u], lane, d_head);

        float score[AHEAD][GROUP];
        #pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            #pragma unroll
            for (int g = 0; g < GROUP; g++) score[u][g] = 0.f;
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                float x[VEC];
                k[u][v].get(x);
                #pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    #pragma unroll
                    for (int i = 0; i < VEC; i++) score[u][g] += query[g][v][i] * x[i];
                }
            }
            #pragma unroll
            for (int g = 0; g < GROUP; g++) {
                #pragma unroll
                for (int offset = LANES / 2; offset > 0; offset /= 2)
                    score[u][g] += __shfl_xor_sync(FULL_WARP, score[u][g], offset);
            }
        }
        #pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float most = LOWEST;
            #pragma unroll
            for (int u = 0; u < AHEAD; u++) most = there[u] ? fmaxf(most, score[u][g]) : most;
            float factor = softmax[g].raise(most);
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                #pragma unroll
                for (int i = 0; i < VEC; i++) mean[g][v][i] *= factor;
            }
            #pragma unroll
            for (int u = 0; u < AHEAD; u++) {
                score[u][g] = there[u] ? exp2f(score[u][g] - softmax[g].most) : 0.f;
                softmax[g].sum += score[u][g];
            }
        }
        #pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                float x[VEC];
                val[u][v].get(x);
                #pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    #pragma unroll
                    for (int i = 0; i < VEC; i++) mean[g][v][i] += score[u][g] * x[i];
                }
            }
        }
    }

    #pragma unroll
    for (int g = 0; g < GROUP; g++) {
        // The rows of lanes of a warp ...
        #pragma unroll
        for (int offset = LANES; offset < 32; offset *= 2) {
            float sum = __shfl_xor_sync(FULL_WARP, softmax[g].sum, offset), most = __shfl_xor_sync(FULL_WARP, softmax[g].most, offset);
            float factor = softmax[g].raise(most), theirs = exp2f(most - softmax[g].most);
            softmax[g].sum += sum * theirs;
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                #pragma unroll
                for (int i = 0; i < VEC; i++)
                    mean[g][v][i] = mean[g][v][i] * factor + __shfl_xor_sync(FULL_WARP, mean[g][v][i], offset) * theirs;
            }
        }
        if (threadIdx.x % 32 < LANES) {
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) store_vec(&sums[warp][(v * LANES + lane) * VEC], mean[g][v]);
            joined[warp] = softmax[g];
        }
        __syncthreads();
        // ... and its warps.
        if (g < n_own) {
            Softmax all = joined[0];
            for (int w = 1; w < WARPS; w++) {
                all.raise(joined[w].most);
                all.sum += joined[w].sum * exp2f(joined[w].most - all.most);
            }
            i64 head = (i64)b * heads + kv_head * ratio + first + g, part = head * n_parts + blockIdx.x;
            for (int column = threadIdx.x; column < d_head; column += blockDim.x) {
                float sum = 0.f;
                for (int w = 0; w < WARPS; w++) sum += sums[w][column] * exp2f(joined[w].most - all.most);
                if (n_parts == 1) o[head * d_head + column] = from_f32<X>(sum / all.sum);
                else part_sums[part * d_head + column] = sum;
            }
            if (n_parts > 1 && threadIdx.x == 0) part_softmax[2 * part] = all.most, part_softmax[2 * part + 1] = all.sum;
        }
        __syncthreads();
    }
}

// Joins the parts of one head of one sequence: a block whose threads take one column each, of every so many-th part. Its grid is
// [batch * heads].
extern "C" __global__ void __launch_bounds__(256)
decode_attention_join(const float* part_sums, const float* part_softmax, const i64* positions, const int* count, X* o, int d_head,
                      int n_parts, i64 window, i64 n_sinks) {
    __shared__ float weights[MAX_PARTS], sums[256];
    Shown shown(positions, count, window, n_sinks, n_parts);
    int n = (shown.n + shown.chunk - 1) / shown.chunk;
    i64 head = blockIdx.x;
    const float* softmax = part_softmax + head * n_parts * 2;
    float most = LOWEST, sum = 0.f;
    for (int part = threadIdx.x % 32; part < n; part += 32) most = fmaxf(most, softmax[2 * part]);
    most = warp_max(most);
    for (int part = threadIdx.x % 32; part < n; part += 32) sum += softmax[2 * part + 1] * exp2f(softmax[2 * part] - most);
    sum = warp_sum(sum);
    for (int part = threadIdx.x; part < n; part += blockDim.x) weights[part] = exp2f(softmax[2 * part] - most) / sum;
    __syncthreads();
    int n_columns = min(d_head, 256), n_rows = 256 / n_columns, own = threadIdx.x / n_columns;
    for (int start = 0; start < d_head; start += n_columns) {
        int column = start + threadIdx.x % n_columns;
        float x = 0.f;
        if (own < n_rows && column < d_head) {
            #pragma unroll 8
            for (int part = own; part < n; part += n_rows) x += weights[part] * part_sums[(head * n_parts + part) * d_head + column];
        }
        sums[threadIdx.x] = x;
        __syncthreads();
        if (own == 0 && column < d_head) {
            for (int i = 1; i < n_rows; i++) x += sums[i * n_columns + threadIdx.x];
            o[head * d_head + column] = from_f32<X>(x);
        }
        __syncthreads();
    }
}
