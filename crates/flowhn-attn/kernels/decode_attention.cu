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
// a time. Keys and values are copied STAGES - 1 turns of TURN keys a lane ahead into a ring in shared memory, where each thread reads
// only what it copied itself: enough bytes are under way without a barrier. Each row of lanes keeps a softmax of its own; those of a
// block are joined in a fixed order at the end, those of the parts by `decode_attention_join`. Parts depend on the number of keys
// alone, so equal inputs give equal bits.
//
// X_KIND: dtype. LANES, VECTORS: LANES * VECTORS * 8 >= d_head. GROUP: query heads of a block. TURN, STAGES. ROWS_ALIGNED: 1 if rows
// are whole vectors of 16 bytes; if not, they are read when they are needed.
#include "rows.cuh"
#include "smem.cuh"

typedef DtypeOf<X_KIND>::type X;
constexpr int WARPS = 8, THREADS = WARPS * 32, KEYS = 32 / LANES, PASS = WARPS * KEYS, WIDTH = LANES * VECTORS * VEC;
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

// Reads a row, this lane's features of it.
__device__ __forceinline__ void load_key(Pack<X> (&row)[VECTORS], const X* from, int lane, int d_head) {
    #pragma unroll
    for (int v = 0; v < VECTORS; v++) {
        int column = (v * LANES + lane) * VEC;
        if constexpr (!ROWS_ALIGNED) load_some(row[v], from + column, d_head - column);
        else if (column < d_head) row[v].load(from + column);
        else row[v] = Pack<X>{};
    }
}

// Rows on their way to this thread, the key (0) and the value (1) of TURN keys a stage.
struct Ring {
    static constexpr int WORDS = sizeof(Pack<X>) / 16;
    uint4* mine;

    __device__ __forceinline__ Ring() : mine(reinterpret_cast<uint4*>(shared_memory()) + threadIdx.x) {}

    __device__ __forceinline__ uint4* at(int stage, int u, int which, int v) const {
        return mine + ((((stage * TURN + u) * 2 + which) * VECTORS + v) * WORDS) * THREADS;
    }

    __device__ __forceinline__ void copy(int stage, int u, int which, const X* from, int lane, int d_head) {
        if constexpr (ROWS_ALIGNED) {
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                int column = (v * LANES + lane) * VEC;
                #pragma unroll
                for (int w = 0; w < WORDS; w++)
                    cp_async16(smem_address(at(stage, u, which, v) + w * THREADS),
                               reinterpret_cast<const uint4*>(from + (column < d_head ? column : 0)) + w, column < d_head);
            }
        }
    }

    __device__ __forceinline__ void read(float (&x)[VEC], int stage, int u, int which, int v, const X* from, int lane, int d_head) const {
        Pack<X> pack;
        if constexpr (ROWS_ALIGNED) {
            uint4* words = reinterpret_cast<uint4*>(&pack);
            #pragma unroll
            for (int w = 0; w < WORDS; w++) words[w] = at(stage, u, which, v)[w * THREADS];
        } else {
            int column = (v * LANES + lane) * VEC;
            load_some(pack, from + column, d_head - column);
        }
        pack.get(x);
    }
};

// Dynamic shared memory: the ring, and after it, in the same place, what the block's warps join.
struct Joined {
    float sums[GROUP][WARPS][WIDTH];
    Softmax softmax[GROUP][WARPS];
};

extern "C" __global__ void __launch_bounds__(THREADS)
decode_attention(const X* q, i64 q_batch, i64 q_head, const X* keys, const X* values, const i64* positions, const int* count, X* o,
                 float* part_sums, float* part_softmax, int capacity, int heads, int kv_heads, int d_head, int n_parts, i64 window,
                 i64 n_sinks, float scale) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
    int ratio = heads / kv_heads, n_tiles = (ratio + GROUP - 1) / GROUP;
    int kv_head = blockIdx.y / n_tiles, first = blockIdx.y % n_tiles * GROUP, n_own = min(GROUP, ratio - first), b = blockIdx.z;
    float query[GROUP][VECTORS][VEC], mean[GROUP][VECTORS][VEC];
    Softmax softmax[GROUP];
    #pragma unroll
    for (int g = 0; g < GROUP; g++) {
        softmax[g] = {LOWEST, 0.f};
        Pack<X> packed[VECTORS];
        load_key(packed, q + b * q_batch + (kv_head * ratio + first + min(g, n_own - 1)) * q_head, lane, d_head);
        #pragma unroll
        for (int v = 0; v < VECTORS; v++) {
            packed[v].get(query[g][v]);
            #pragma unroll
            for (int i = 0; i < VEC; i++) query[g][v][i] *= scale * LOG2_E, mean[g][v][i] = 0.f;
        }
    }
    Shown shown(positions, count, window, n_sinks, n_parts);
    i64 begin = (i64)blockIdx.x * shown.chunk;
    if (begin >= shown.n) return;
    int end = min((i64)shown.n, begin + shown.chunk), n_turns = (end - (int)begin + TURN * PASS - 1) / (TURN * PASS);

    i64 token = (i64)kv_heads * d_head, base = (i64)b * capacity * token + kv_head * d_head;
    // Past the end the last key stands in, with no weight.
    auto index = [&](int turn, int u) { return (int)begin + (turn * TURN + u) * PASS + row; };
    auto place = [&](int turn, int u) { return base + shown.key(min(index(turn, u), end - 1)) * token; };
    Ring ring;
    auto copy = [&](int turn) {
        if (turn < n_turns) {
            #pragma unroll
            for (int u = 0; u < TURN; u++) {
                ring.copy(turn % STAGES, u, 0, keys + place(turn, u), lane, d_head);
                ring.copy(turn % STAGES, u, 1, values + place(turn, u), lane, d_head);
            }
        }
        // Also where there is nothing more: turns are counted.
        cp_async_commit();
    };
    #pragma unroll
    for (int turn = 0; turn < STAGES - 1; turn++) copy(turn);
    for (int turn = 0; turn < n_turns; turn++) {
        cp_async_wait<STAGES - 2>();
        copy(turn + STAGES - 1);
        int stage = turn % STAGES;
        float score[TURN][GROUP];
        bool there[TURN];
        #pragma unroll
        for (int u = 0; u < TURN; u++) {
            there[u] = index(turn, u) < end;
            #pragma unroll
            for (int g = 0; g < GROUP; g++) score[u][g] = 0.f;
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                float x[VEC];
                ring.read(x, stage, u, 0, v, keys + place(turn, u), lane, d_head);
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
            for (int u = 0; u < TURN; u++) most = there[u] ? fmaxf(most, score[u][g]) : most;
            float factor = softmax[g].raise(most);
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                #pragma unroll
                for (int i = 0; i < VEC; i++) mean[g][v][i] *= factor;
            }
            #pragma unroll
            for (int u = 0; u < TURN; u++) {
                score[u][g] = there[u] ? exp2f(score[u][g] - softmax[g].most) : 0.f;
                softmax[g].sum += score[u][g];
            }
        }
        #pragma unroll
        for (int u = 0; u < TURN; u++) {
            #pragma unroll
            for (int v = 0; v < VECTORS; v++) {
                float x[VEC];
                ring.read(x, stage, u, 1, v, values + place(turn, u), lane, d_head);
                #pragma unroll
                for (int g = 0; g < GROUP; g++) {
                    #pragma unroll
                    for (int i = 0; i < VEC; i++) mean[g][v][i] += score[u][g] * x[i];
                }
            }
        }
    }

    Joined& joined = *reinterpret_cast<Joined*>(shared_memory());
    __syncthreads();
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
            for (int v = 0; v < VECTORS; v++) store_vec(&joined.sums[g][warp][(v * LANES + lane) * VEC], mean[g][v]);
            if (lane == 0) joined.softmax[g][warp] = softmax[g];
        }
    }
    __syncthreads();
    // ... and its warps.
    for (int item = threadIdx.x; item < n_own * d_head; item += THREADS) {
        int g = item / d_head, column = item - g * d_head;
        Softmax all = joined.softmax[g][0];
        for (int w = 1; w < WARPS; w++) all.most = fmaxf(all.most, joined.softmax[g][w].most);
        float sum = 0.f;
        all.sum = 0.f;
        #pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float weight = exp2f(joined.softmax[g][w].most - all.most);
            all.sum += joined.softmax[g][w].sum * weight;
            sum += joined.sums[g][w][column] * weight;
        }
        i64 head = (i64)b * heads + kv_head * ratio + first + g, part = head * n_parts + blockIdx.x;
        if (n_parts == 1) o[head * d_head + column] = from_f32<X>(sum / all.sum);
        else part_sums[part * d_head + column] = sum;
        if (n_parts > 1 && column == 0) part_softmax[2 * part] = all.most, part_softmax[2 * part + 1] = all.sum;
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
