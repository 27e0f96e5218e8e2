// The cross-entropy behind the LM head: what is done with a chunk of logits between its matrix products.
//
//   loss_t = ln sum_v exp(l_tv) - l_t,target,   dl_tv = (exp(l_tv) / sum_v exp(l_tv) - [v = target]) / n_counted
//
//   logits   [rows, row_stride], f32 or bf16; only the first vocab_size of a row count; rows begin at 16 bytes
//   targets  [rows], i64; `ignored` counts nothing: loss 0, gradient 0; others outside the vocabulary give NaN
//   losses   [rows], f32
//
// A block takes a row and holds all of it in registers (65536 bf16 values are 32 registers in each of 1024 threads), so that each
// logit is read once and its gradient written once, in the same place. Each thread sums with its own maximum; one exchange
// of (maximum, sum) over the block is the only barrier. Rows that do not fit are read twice, the second time mostly from the cache.
// Without gradient each logit is read once.
//
// Variants: X_KIND 0 f32, 1 bf16; N_THREADS of a block; HELD 16-byte words a thread holds, 0: reads again; GRAD 0 or 1.
#include "flowhn.cuh"

typedef DtypeOf<X_KIND>::type T;
constexpr int VEC = 16 / sizeof(T);
constexpr int N_WARPS = N_THREADS / 32;
// Stands for minus infinity where a difference must stay a number.
constexpr float LOWEST = -1e38f;

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

// A maximum, and the sum of exp(l - maximum) of the logits that it was taken of.
struct Total {
    float largest, sum;
};

// exp(x - largest); bf16 logits are further from the exact ones than the approximation is from the function.
__device__ __forceinline__ float exp_from(float x, float largest) {
    if constexpr (X_KIND == 1) return ex2((x - largest) * LOG2_E);
    return expf(x - largest);
}

// The elements of a word. `one` is 1 (a size of the grid): a number that the compiler does not know, a different one for each pass
// over a row, keeps it from remembering the elements from pass to pass, for which there are no registers.
__device__ __forceinline__ void widen(float (&out)[VEC], const uint4& raw, unsigned one = 1) {
    unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        if constexpr (X_KIND == 1) {
            out[2 * i] = __uint_as_float(words[i] << (16 * one));
            out[2 * i + 1] = __uint_as_float(words[i] & (0xffff0000u * one));
        } else {
            out[i] = __uint_as_float(words[i]);
        }
    }
}

__device__ __forceinline__ float largest_of(const float (&x)[VEC]) {
    float largest = x[0];
    #pragma unroll
    for (int i = 1; i < VEC; i++) largest = fmaxf(largest, x[i]);
    return largest;
}

// The totals of all threads of the block, on every thread.
__device__ __forceinline__ Total block_total(Total total) {
    __shared__ Total shared[N_WARPS];
    float largest = warp_max(total.largest);
    float sum = warp_sum(total.sum * expf(total.largest - largest));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = Total{largest, sum};
    __syncthreads();
    int lane = threadIdx.x % 32;
    Total part = lane < N_WARPS ? shared[lane] : Total{LOWEST, 0.f};
    largest = warp_max(part.largest);
    return Total{largest, warp_sum(part.sum * expf(part.largest - largest))};
}

// What becomes of the logits of one row: exp(l - largest) factor, and `at_target` for the target's.
struct Gradient {
    float largest, factor, at_target;
    int target_word, target_element;

    // Writes word `word` of the row to `out`.
    __device__ __forceinline__ void write(uint4* out, int word, const uint4& raw) const {
        float x[VEC];
        widen(x, raw, gridDim.z);
        #pragma unroll
        for (int i = 0; i < VEC; i++) {
            // With bf16 the factor is part of the exponent: one instruction less, an error far below the rounding of the result.
            if constexpr (X_KIND == 1) x[i] = ex2(fmaf(x[i], LOG2_E, factor));
            else x[i] = expf(x[i] - largest) * factor;
        }
        if (word == target_word) {
            #pragma unroll
            for (int i = 0; i < VEC; i++) x[i] = i == target_element ? at_target : x[i];
        }
        store_vec<VEC>(reinterpret_cast<T*>(out), x);
    }
};

constexpr unsigned MINUS_INF = X_KIND == 1 ? 0xff80ff80u : 0xff800000u;

// The word with minus infinity in place of what follows its first `n` elements.
__device__ __forceinline__ uint4 only(uint4 raw, int n) {
    unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        if (X_KIND == 0) words[i] = i < n ? words[i] : MINUS_INF;
        else if (2 * i + 1 >= n) words[i] = 2 * i >= n ? MINUS_INF : (words[i] & 0xffffu) | (MINUS_INF & 0xffff0000u);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
}

extern "C" __global__ void __launch_bounds__(N_THREADS) cross_entropy_rows(
    T* __restrict__ logits, i64 row_stride, const i64* __restrict__ targets, i64 ignored, const float* __restrict__ scale,
    float* __restrict__ losses, int vocab_size) {
    const int tid = threadIdx.x, n_words = (vocab_size + VEC - 1) / VEC;
    // A thread has the words tid, tid + N_THREADS, ... of a row, counted from its own first word; `n_mine` ends them.
    const int n_mine = n_words - tid;
    T* row = logits + blockIdx.x * row_stride;
    uint4* words = reinterpret_cast<uint4*>(row) + tid;
    // The end of the last word is no logit.
    auto only_logits = [&](const uint4& raw, int word) {
        return vocab_size % VEC != 0 && word == n_mine - 1 ? only(raw, vocab_size % VEC) : raw;
    };
    i64 target = targets[blockIdx.x];
    bool is_counted = target != ignored, is_token = target >= 0 && target < vocab_size;
    float target_logit = is_token ? to_f32(row[target]) : 0.f;

    uint4 held[HELD > 0 ? HELD : 1];
    Total total{LOWEST, 0.f};
    if constexpr (HELD > 0) {
        #pragma unroll
        for (int i = 0; i < HELD; i++) {
            held[i] = make_uint4(MINUS_INF, MINUS_INF, MINUS_INF, MINUS_INF);
            if (i * N_THREADS < n_mine) held[i] = words[i * N_THREADS];
        }
        #pragma unroll
        for (int i = 0; i < HELD; i++) {
            held[i] = only_logits(held[i], i * N_THREADS);
            float x[VEC];
            widen(x, held[i]);
            total.largest = fmaxf(total.largest, largest_of(x));
        }
        #pragma unroll
        for (int i = 0; i < HELD; i++) {
            float x[VEC], sum = 0.f;
            widen(x, held[i], gridDim.y);
            #pragma unroll
            for (int j = 0; j < VEC; j++) sum += exp_from(x[j], total.largest);
            total.sum += sum;
        }
    } else {
        #pragma unroll 4
        for (int word = 0; word < n_mine; word += N_THREADS) {
            float x[VEC], sum = 0.f;
            widen(x, only_logits(words[word], word));
            float top = fmaxf(total.largest, largest_of(x));
            #pragma unroll
            for (int j = 0; j < VEC; j++) sum += exp_from(x[j], top);
            total.sum = fmaf(total.sum, exp_from(total.largest, top), sum);
            total.largest = top;
        }
    }
    total = block_total(total);
    float log_sum = logf(total.sum);
    if (tid == 0) {
        float loss = is_token ? log_sum - (target_logit - total.largest) : not_a_number();
        losses[blockIdx.x] = is_counted ? loss : 0.f;
    }
    if constexpr (GRAD == 0) return;

    float weight = is_counted ? (is_token ? *scale : not_a_number()) : 0.f;
    float at_target = (expf(target_logit - total.largest - log_sum) - 1.f) * weight;
    // The target's word, counted as this thread counts.
    int target_word = is_counted && is_token ? (int)target / VEC - tid : -1;
    Gradient gradient{total.largest, weight / total.sum, at_target, target_word, (int)target % VEC};
    if constexpr (X_KIND == 1) gradient.factor = (is_counted ? lg2(weight) : -1e30f) - (total.largest + log_sum) * LOG2_E;
    if constexpr (HELD > 0) {
        #pragma unroll
        for (int i = 0; i < HELD; i++) {
            if (i * N_THREADS < n_mine) gradient.write(words + i * N_THREADS, i * N_THREADS, held[i]);
        }
    } else {
        #pragma unroll 4
        for (int word = 0; word < n_mine; word += N_THREADS) gradient.write(words + word, word, words[word]);
    }
}

// scale = 1 / max(number of targets that count, 1), by one block.
extern "C" __global__ void __launch_bounds__(1024) cross_entropy_scale(
    const i64* __restrict__ targets, i64 ignored, float* __restrict__ scale, int n_targets) {
    __shared__ int shared[32];
    int count = 0;
    #pragma unroll 4
    for (int i = threadIdx.x; i < n_targets; i += 1024) count += targets[i] != ignored;
    #pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) count += __shfl_xor_sync(FULL_WARP, count, offset);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = count;
    __syncthreads();
    if (threadIdx.x == 0) {
        count = 0;
        for (int i = 0; i < 32; i++) count += shared[i];
        *scale = 1.f / (float)max(count, 1);
    }
}

// loss = scale sum of losses, by one block, in a fixed order.
extern "C" __global__ void __launch_bounds__(1024) cross_entropy_mean(
    const float* __restrict__ losses, const float* __restrict__ scale, float* __restrict__ loss, int n_targets) {
    __shared__ float shared[32];
    float sum = 0.f;
    #pragma unroll 4
    for (int i = threadIdx.x; i < n_targets; i += 1024) sum += losses[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0.f;
        for (int i = 0; i < 32; i++) sum += shared[i];
        *loss = sum * *scale;
    }
}
