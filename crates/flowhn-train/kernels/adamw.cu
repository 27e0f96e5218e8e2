// AdamW over all parameters at once, and clipping by the global norm (the formula: Loshchilov and Hutter, "Decoupled weight decay
// regularization", algorithm 2, with lr in the place of alpha and of the schedule's multiplier).
//
//   norm = sqrt(sum g^2)      c = min(1, clip_norm / (norm + 1e-6)), 1 where clip_norm is 0      t += 1
//   m = beta1 m + (1 - beta1) c g      v = beta2 v + (1 - beta2) (c g)^2
//   p -= lr weight_decay p             p -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
//
// Parameters p are f32 and their gradients g f32 or bf16, each a dense run of `n` elements, and so are the means m, v, which STATE keeps
// between updates as f32 (0), bf16 (1) or 8-bit codes (2; as f32 in slots without factors); beside a parameter there may be a bf16 copy,
// which the update writes as well. A gradient that is null counts as zeros. A table of slots, one a parameter, tells where everything is; a
// table of items cuts the slots into chunks of CHUNK elements, so a launch covers all parameters however many they are. One block works on
// one item, and blocks are handed out as others finish. Where means are codes, the update has persistent blocks whose warps take pieces of
// items.
//
// What makes it fast is that memory is read and written once: the gradient is scaled where it is read, the copy is rounded from the
// register that holds the weight. A thread loads VECS vectors of 4 elements of all four arrays before it computes; where codes share
// a factor, these vectors of a warp are the elements that share it, and the next ones are loaded before the codes of these are found. The
// norm is the only pass before; the update takes the items in the opposite order, so that it begins with gradients that are still in the
// L2 cache.
//
// The tables, the learning rate, the counter t and everything that follows from them are on the device: the launches can be captured
// in a CUDA graph. Sums are f64 and in a fixed order, and neither the alignment of an array nor the device changes that order.
#include "adamw_state.cuh"

constexpr int VEC = 4;

// Where a parameter is.
struct Slot {
    float* p;
    void *m, *v;
    bf16* copy;  // null where there is none
    i64 n;
    i64 flags;
    float *m_absmax, *v_absmax;  // of each block of codes; null where the slot's means are no codes
};

// The flags of a slot.
constexpr i64 DECAYS = 1, BF16_GRAD = 2;

// What all elements share in a step.
struct Factors {
    float clip, beta1, rest1, beta2, rest2, step_size, root_scale, eps, decay;
    unsigned key;  // of the update's random bits
    int n_asked;   // how often a warp of the update has asked for another piece
};

// The settings, as the host writes them.
struct Settings {
    double beta1, beta2, eps, weight_decay, clip_norm;
};

// ---- the table of gradients -------------------------------------------------------------------------------------------------

// Writes 56 addresses, of which the first n are some, to table[first ..]. Gradients move from step to step; in a captured step the
// arguments are those of the step's own gradients.
#define FOR_EACH_8(DO, a) DO(a##0) DO(a##1) DO(a##2) DO(a##3) DO(a##4) DO(a##5) DO(a##6) DO(a##7)
#define FOR_EACH_56(DO) \
    FOR_EACH_8(DO, 0) FOR_EACH_8(DO, 1) FOR_EACH_8(DO, 2) FOR_EACH_8(DO, 3) FOR_EACH_8(DO, 4) FOR_EACH_8(DO, 5) FOR_EACH_8(DO, 6)
#define DECLARE(k) , const void* g##k
#define WRITE(k) if (t++ < n) *out++ = g##k;
extern "C" __global__ void adamw_addresses(const void** table, int first, int n FOR_EACH_56(DECLARE)) {
    const void** out = table + first;
    int t = 0;
    FOR_EACH_56(WRITE)
}

// ---- vectors ----------------------------------------------------------------------------------------------------------------

// What a team of threads works on: the elements of a slot from `start` on, at most `most` of them.
struct Chunk {
    const Slot& slot;
    i64 start;
    int n;
    const void* slot_grad;  // the slot's gradient; null where there is none
    __device__ __forceinline__ Chunk(const void* const* grads, const Slot* slots, int idx, i64 start, int most) : slot(slots[idx]), start(start) {
        i64 left = slot.n - start;
        n = left < most ? (int)left : most;
        slot_grad = grads[idx];
    }
    // The first element of the gradient, which is of type G.
    template <class G> __device__ __forceinline__ const G* grad() const { return at((const G*)slot_grad); }
    // The chunk's first element in an array of the slot, null where there is none.
    template <class T> __device__ __forceinline__ T* at(T* array) const { return array ? array + start : nullptr; }
};

__device__ __forceinline__ bool is_aligned(const void* p, int n_bytes) { return ((i64)p & (n_bytes - 1)) == 0; }

// Reads the first `n` of 4 elements, zeros behind them; at once where all are there and aligned.
template <bool FAST, class T> __device__ __forceinline__ void load(float (&x)[VEC], const T* p, int n) {
    if constexpr (FAST) {
        load_vec(x, p);
    } else {
        #pragma unroll
        for (int i = 0; i < VEC; i++) x[i] = i < n ? to_f32(p[i]) : 0.f;
    }
}

// ---- norm -------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ double warp_sum(double x) {
    #pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

// The sum of x over the block, in a fixed order, on the threads of the first warp.
__device__ __forceinline__ double block_sum(double x) {
    __shared__ double sums[32];
    x = warp_sum(x);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (lane == 0) sums[warp] = x;
    __syncthreads();
    return warp == 0 ? warp_sum(lane < (int)blockDim.x / 32 ? sums[lane] : 0.) : 0.;
}

// The sum of squares of a chunk: thread t takes the vectors t, t + THREADS, ... and adds each place of a vector by itself.
template <bool FAST, class G> __device__ __forceinline__ double sum_of_squares(const G* g, int n) {
    double sums[VEC] = {0., 0., 0., 0.};
    g = to_device_memory(g);
    #pragma unroll 8
    for (int i = threadIdx.x * VEC; i < n; i += THREADS * VEC) {
        float x[VEC];
        load<FAST>(x, g + i, n - i);
        #pragma unroll
        for (int k = 0; k < VEC; k++) sums[k] += (double)x[k] * x[k];
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class G> __device__ __forceinline__ double sum_of_squares(const Chunk& chunk) {
    const G* g = chunk.grad<G>();
    if (!g) return 0.;
    return is_aligned(g, VEC * sizeof(G)) && chunk.n % VEC == 0 ? sum_of_squares<true>(g, chunk.n) : sum_of_squares<false>(g, chunk.n);
}

// partials[i] = the sum of squares of the gradients of item i.
extern "C" __global__ void __launch_bounds__(THREADS)
adamw_squares(const void* const* grads, const Slot* slots, const int2* items, double* partials) {
    int2 item = items[blockIdx.x];
    Chunk chunk(grads, slots, item.x, (i64)item.y * CHUNK, CHUNK);
    double sum = block_sum(chunk.slot.flags & BF16_GRAD ? sum_of_squares<bf16>(chunk) : sum_of_squares<float>(chunk));
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// One block: adds up the partials, counts the step, and works out what all elements share. Powers take long, so two warps have one each.
extern "C" __global__ void __launch_bounds__(1024)
adamw_factors(const double* partials, int n, const Settings* settings, const float* lr, float* step, float* norm, Factors* factors) {
    __shared__ double rest[2];
    Settings s = *settings;
    float t = *step + 1.f;
    double sum = 0.;
    #pragma unroll 8
    for (int i = threadIdx.x; i < n; i += 1024) sum += partials[i];
    if (threadIdx.x % 32 == 0 && threadIdx.x / 32 < 2) {
        int i = threadIdx.x / 32;
        rest[i] = 1. - pow(i == 0 ? s.beta1 : s.beta2, (double)t);
    }
    sum = block_sum(sum);
    if (threadIdx.x) return;
    float total = (float)sqrt(sum);
    *step = t, *norm = total;
    double clip = s.clip_norm > 0. ? s.clip_norm / (total + 1e-6) : 1., rate = *lr;
    Factors f;
    // Written so that NaN stays.
    f.clip = clip > 1. ? 1.f : (float)clip;
    f.beta1 = (float)s.beta1, f.rest1 = (float)(1. - s.beta1);
    f.beta2 = (float)s.beta2, f.rest2 = (float)(1. - s.beta2);
    f.step_size = (float)(rate / rest[0]), f.root_scale = (float)(1. / sqrt(rest[1]));
    f.eps = (float)s.eps, f.decay = (float)(rate * s.weight_decay);
    f.key = mix((unsigned)t), f.n_asked = 0;
    *factors = f;
}

// ---- update -----------------------------------------------------------------------------------------------------------------

// Threads that work together, a block or a warp of it; the elements that they update before they look for others; and those that they take
// at a time where all are there and aligned.
constexpr int TEAM = STATE == 2 ? 32 : UPDATE_THREADS, PIECE = STATE == 2 ? 2048 : CHUNK, TILE = TEAM * VEC * VECS;
static_assert(CHUNK % PIECE == 0 && PIECE % BLOCK == 0 && UPDATE_THREADS % TEAM == 0, "pieces of whole blocks, whole teams");

// One element. The step is a small part of p, so a few ulp of it are none of p; without the exact root and quotient, which branch
// for extreme values, there is no branch between loads and stores. The means round as they do on the CPU.
__device__ __forceinline__ void update(float& p, float& m, float& v, float g, const Factors& f, float decay) {
    g *= f.clip;
    m = __fmaf_rn(f.beta1, m, __fmul_rn(f.rest1, g));
    v = __fmaf_rn(f.beta2, v, __fmul_rn(__fmul_rn(f.rest2, g), g));
    p = p - decay * p;
    p = p - f.step_size * m * rcp(sqrt_approx(v) * f.root_scale + f.eps);
}

// A chunk of whole tiles, aligned to vectors, that has a gradient; S and G are f32 or bf16.
template <bool COPY, class S, class G>
__device__ __forceinline__ void update_tiles(float* p, S* m, S* v, const G* g, bf16* copy, int n, const Factors& f, float decay, Noise noise) {
    p = to_device_memory(p), m = to_device_memory(m), v = to_device_memory(v), g = to_device_memory(g);
    if constexpr (COPY) copy = to_device_memory(copy);
    for (int first = threadIdx.x % TEAM * VEC; first < n; first += TILE) {
        float ps[VECS][VEC], ms[VECS][VEC], vs[VECS][VEC], gs[VECS][VEC];
        #pragma unroll
        for (int u = 0; u < VECS; u++) {
            int i = first + u * TEAM * VEC;
            load_vec(ps[u], p + i), load_vec(gs[u], g + i), load_vec(ms[u], m + i), load_vec(vs[u], v + i);
        }
        #pragma unroll
        for (int u = 0; u < VECS; u++) {
            int i = first + u * TEAM * VEC;
            #pragma unroll
            for (int k = 0; k < VEC; k++) update(ps[u][k], ms[u][k], vs[u][k], gs[u][k], f, decay);
            store_vec(p + i, ps[u]), store_means(m + i, v + i, ms[u], vs[u], noise, i);
            if constexpr (COPY) store_vec(copy + i, ps[u]);
        }
    }
}

// Any other.
template <class S, class G>
__device__ __forceinline__ void update_elements(float* p, S* m, S* v, const G* g, bf16* copy, int n, const Factors& f, float decay, Noise noise) {
    for (int i = threadIdx.x % TEAM; i < n; i += TEAM) {
        float ms[1] = {to_f32(m[i])}, vs[1] = {to_f32(v[i])};
        update(p[i], ms[0], vs[0], g ? to_f32(g[i]) : 0.f, f, decay);
        store_means(m + i, v + i, ms, vs, noise, i);
        if (copy) copy[i] = from_f32<bf16>(p[i]);
    }
}

// A chunk whose means are f32 or bf16.
template <class S, class G>
__device__ __forceinline__ void update_chunk(const Chunk& chunk, const Slot& slot, const Factors& f, float decay, Noise noise) {
    float* p = chunk.at(slot.p);
    S *m = chunk.at((S*)slot.m), *v = chunk.at((S*)slot.v);
    const G* g = chunk.grad<G>();
    bf16* copy = chunk.at(slot.copy);
    int n = chunk.n;
    constexpr int ALIGNED = VEC * sizeof(S);
    bool whole = g && n % TILE == 0 && is_aligned(p, 16) && is_aligned(m, ALIGNED) && is_aligned(v, ALIGNED) && is_aligned(g, VEC * sizeof(G)) && is_aligned(copy, 8);
    if (!whole) update_elements(p, m, v, g, copy, n, f, decay, noise);
    else if (copy) update_tiles<true>(p, m, v, g, copy, n, f, decay, noise);
    else update_tiles<false>(p, m, v, g, copy, n, f, decay, noise);
}

#if STATE == 2
// Writes the first `n` of 4 elements; at once where all are there and aligned.
template <bool FAST, class T> __device__ __forceinline__ void store(T* p, const float (&x)[VEC], int n) {
    if constexpr (FAST) {
        store_vec(p, x);
    } else {
        #pragma unroll
        for (int i = 0; i < VEC; i++) if (i < n) p[i] = from_f32<T>(x[i]);
    }
}

// The first `n` of 4 codes, zeros behind them. Codes are aligned.
template <bool FAST> __device__ __forceinline__ unsigned load_codes(const unsigned char* codes, int n) {
    if (FAST || n >= VEC) return *(const unsigned*)codes;
    unsigned word = 0;
    #pragma unroll 1
    for (int i = 0; i < n; i++) word |= (unsigned)codes[i] << 8 * i;
    return word;
}

template <bool FAST> __device__ __forceinline__ void store_codes(unsigned char* codes, unsigned word, int n) {
    if (FAST || n >= VEC) {
        *(unsigned*)codes = word;
    } else {
        #pragma unroll 1
        for (int i = 0; i < n; i++) codes[i] = (unsigned char)(word >> 8 * i);
    }
}

// A chunk whose means are codes; a warp takes a block of them at a time, and reads the next one while it looks for the codes of this one.
// FAST: all blocks are whole, there is a gradient, and everything is aligned.
template <bool FAST, class G>
__device__ __forceinline__ void update_blocks(const Chunk& chunk, const Slot& slot, const Factors& f, float decay, const Maps& maps) {
    float* p = to_device_memory(chunk.at(slot.p));
    const G* g = chunk.grad<G>();
    unsigned char *m = to_device_memory(chunk.at((unsigned char*)slot.m)), *v = to_device_memory(chunk.at((unsigned char*)slot.v));
    float* m_absmax = to_device_memory(slot.m_absmax + chunk.start / BLOCK);
    float* v_absmax = to_device_memory(slot.v_absmax + chunk.start / BLOCK);
    bf16* copy = chunk.at(slot.copy);
    int lane = threadIdx.x % 32, n = chunk.n, block = 0;
    constexpr int PARTS = BLOCK / 32 / VEC;
    float ps[PARTS][VEC], gs[PARTS][VEC], m_scale, v_scale;
    unsigned m_codes[PARTS], v_codes[PARTS];
    auto read = [&] {
        if (block * BLOCK >= n) return;
        #pragma unroll
        for (int u = 0; u < PARTS; u++) {
            int i = block * BLOCK + (u * 32 + lane) * VEC;
            load<FAST>(ps[u], p + i, n - i);
            load<FAST>(gs[u], g + i, FAST || g ? n - i : 0);
            m_codes[u] = load_codes<FAST>(m + i, n - i), v_codes[u] = load_codes<FAST>(v + i, n - i);
        }
        m_scale = m_absmax[block], v_scale = v_absmax[block];
    };
    read();
    while (block * BLOCK < n) {
        float ms[PARTS][VEC], vs[PARTS][VEC];
        int first = block * BLOCK + lane * VEC;
        #pragma unroll
        for (int u = 0; u < PARTS; u++) {
            int i = first + u * 32 * VEC;
            #pragma unroll
            for (int k = 0; k < VEC; k++) {
                bool there = FAST || i + k < n;
                ms[u][k] = there ? __fmul_rn(maps.signed_values[m_codes[u] >> 8 * k & 255], m_scale) : 0.f;
                vs[u][k] = there ? __fmul_rn(maps.unsigned_values[v_codes[u] >> 8 * k & 255], v_scale) : 0.f;
                update(ps[u][k], ms[u][k], vs[u][k], gs[u][k], f, decay);
                // What is not there has no gradient either; a factor that is NaN would make it one.
                if (!there) ms[u][k] = vs[u][k] = 0.f;
            }
            store<FAST>(p + i, ps[u], n - i);
            if (copy) store<FAST>(copy + i, ps[u], n - i);
        }
        block++;
        read();
        float m_new = warp_absmax(ms), v_new = warp_absmax(vs), m_inverse = inverse_of(m_new), v_inverse = inverse_of(v_new);
        #pragma unroll
        for (int u = 0; u < PARTS; u++) {
            unsigned m_word = 0, v_word = 0;
            #pragma unroll
            for (int k = 0; k < VEC; k++) {
                m_word |= signed_code(ms[u][k], m_inverse, maps) << 8 * k;
                v_word |= unsigned_code(vs[u][k], v_inverse, maps) << 8 * k;
            }
            int i = first + u * 32 * VEC;
            store_codes<FAST>(m + i, m_word, n - i), store_codes<FAST>(v + i, v_word, n - i);
        }
        if (lane == 0) m_absmax[block - 1] = m_new, v_absmax[block - 1] = v_new;
    }
}

// A chunk whose means are codes.
template <class G>
__device__ __forceinline__ void update_codes(const Chunk& chunk, const Slot& slot, const Factors& f, float decay, const Maps& maps) {
    const G* g = chunk.grad<G>();
    bool whole = g && chunk.n % BLOCK == 0 && is_aligned(chunk.at(slot.p), 16) && is_aligned(g, VEC * sizeof(G)) && is_aligned(chunk.at(slot.copy), 8);
    if (whole) update_blocks<true, G>(chunk, slot, f, decay, maps);
    else update_blocks<false, G>(chunk, slot, f, decay, maps);
}
#endif

// One piece, counted from the last item on. Slots without factors have means in f32 also where those of others are codes.
__device__ __forceinline__ void update_piece(int piece, const void* const* grads, const Slot* slots, const int2* items, const Factors* factors,
                                             int n_items, const Maps* maps) {
    constexpr int PIECES = CHUNK / PIECE;
    int2 item = items[n_items - 1 - piece / PIECES];
    Chunk chunk(grads, slots, item.x, (i64)item.y * CHUNK + piece % PIECES * PIECE, PIECE);
    // The last item of a slot may have pieces without elements.
    if (chunk.n <= 0) return;
    Slot slot = chunk.slot;
    Factors f = *factors;
    float decay = slot.flags & DECAYS ? f.decay : 0.f;
    bool bf16_grad = slot.flags & BF16_GRAD;
#if STATE == 2
    if (slot.m_absmax) {
        if (bf16_grad) update_codes<bf16>(chunk, slot, f, decay, *maps);
        else update_codes<float>(chunk, slot, f, decay, *maps);
        return;
    }
#endif
    Noise noise{mix(f.key + (unsigned)item.x), (unsigned)chunk.start};
    typedef DtypeOf<STATE == 1>::type State;
    if (bf16_grad) update_chunk<State, bf16>(chunk, slot, f, decay, noise);
    else update_chunk<State, float>(chunk, slot, f, decay, noise);
}

// `maps`: those of the codes, null where means are not codes; then there are as many blocks as items. With codes any number of blocks will
// do, and warps take pieces until none is left. Which warp takes which changes no bit.
extern "C" __global__ void __launch_bounds__(UPDATE_THREADS)
adamw_update(const void* const* grads, const Slot* slots, const int2* items, Factors* factors, int n_items, const char* maps) {
#if STATE == 2
    __shared__ Maps shared;
    for (int i = threadIdx.x * 16; i < (int)sizeof(Maps); i += UPDATE_THREADS * 16) cp_async16(smem_address(&shared) + i, maps + i);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    constexpr int TEAMS = UPDATE_THREADS / TEAM;
    int piece = blockIdx.x * TEAMS + threadIdx.x / TEAM;
    while (piece < n_items * (CHUNK / PIECE)) {
        // Asked for early: the answer is there when the piece is done.
        int next = 0;
        if (threadIdx.x % TEAM == 0) next = gridDim.x * TEAMS + atomicAdd(&factors->n_asked, 1);
        update_piece(piece, grads, slots, items, factors, n_items, &shared);
        piece = __shfl_sync(FULL_WARP, next, 0);
    }
#else
    update_piece(blockIdx.x, grads, slots, items, factors, n_items, nullptr);
#endif
}
