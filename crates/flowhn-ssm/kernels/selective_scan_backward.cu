// The backward of the selective scan. With s_t = silu(z_t) and dy' = dy s, g_t the gradient by the state after token t:
//
//     g_t = c_t dy'_t + exp(dt_{t+1} a) g_{t+1}            k_t = exp(dt_t a) g_t h_{t-1}, what flows through the decay
//     dc_t = sum_e dy'_t h_t     db_t = sum_e g_t dt_t x_t     dx_t = dt_t sum_n g_t b_t + d dy'_t
//     ddt_t = (sum_n a k_t + x_t sum_n g_t b_t) softplus'(..)    da = sum_t dt_t k_t     dz_t = dy_t (c_t h_t + d x_t) silu'(z_t)
//
// Shapes and strides as in selective_scan_forward.cu, which has recorded the state before every CHUNK-th token. Grid: blocks of
// channels, segments of the sequence, batch. A block walks the chunks of its segment from the last to the first:
//
// 1. threads read pairs of channels, all rows of the chunk at once, and make step sizes and dy' in shared memory;
// 2. every lane scans the chunk once and leaves its 4 states at every 8th token in shared memory;
// 3. from the last 8 tokens to the first, it scans them again, now keeping states and decays in registers, and walks back;
// 4. threads read the pairs again and finish dx, ddt and dz.
//
// What makes it fast: two exponentials a state and token are cheap beside the arithmetic, so that recomputing beats memory
// traffic. A multiprocessor has registers for three warps a scheduler, too few to hide loads: a chunk is asked for in the L2 cache
// while the one after it is walked, all its loads are under way before the first is used, and what a lane needs of a channel and
// token is one word of 16 bytes in shared memory, whose place its sums take. Sums over a channel's states take 3 shuffles for 4
// tokens. Sums over channels, for db and dc, would take a shuffle a value; instead a tensor core multiplies the values with a
// pattern of ones: lanes are laid out so that the operand is what each lane holds already, and 4 instructions and 2 shuffles sum
// up 16 values a lane. These products see 11 bits of each value, more than bf16 keeps; where anything is f32, a second product
// adds the bits cut off (EXACT).
//
// No atomics: partial sums of blocks go to memory, and selective_scan_sum, which starts early, adds them up in a fixed order. Where
// blocks of three teams fill the device they are used: a team does what a block of its own would, but the last adds the sums of the
// others to its own, in their order, so that a third of the partial sums goes to memory.
#include "selective_scan_tile.cuh"

#ifndef MIN_BLOCKS
#define MIN_BLOCKS 3
#endif

constexpr bool EXACT = X_KIND == 0 || B_KIND == 0 || C_KIND == 0;
// Teams and second products take registers: then what can be read from shared memory again is not kept. Without them keeping is
// faster.
constexpr bool REREAD = TEAMS > 1 || EXACT;
// Tokens whose states and decays a lane keeps in registers.
constexpr int STRIP = 8;
constexpr int STRIPS = CHUNK / STRIP;
// Rows of a chunk that a thread works on element by element, and how many of them it finishes at once.
constexpr int STEPS = CHUNK / ROWS;
constexpr int FINISHED = 4;
static_assert(STEPS % FINISHED == 0, "");
static_assert(CHUNK / 32 <= WARPS, "");

// What a warp leaves of a strip for db and dc, and the warps that add up two neighbouring sums a lane.
constexpr int N_SUMS = 2 * STRIP * SLICE, SUM_WARPS = N_SUMS / 64;
static_assert(SUM_WARPS <= WARPS, "");

// Row `t` of a tile, whose rows are less than 4 GiB apart: one instruction.
template <class T> __device__ __forceinline__ T* row_of(T* tile, unsigned t, unsigned row_bytes) {
    return (T*)((const char*)tile + (unsigned long long)t * row_bytes);
}

// Where the rows of a block's sequence begin.
struct Sequence {
    const X *dy, *x;
    const Dt* dt;
    const Z* z;
    const B* b;
    const C* c;
    X* dx;
    Dt* ddt;
    Z* dz;
    float* state_parts;
    // Read again at the end, so that nothing made of it stays in registers.
    int d_inner;
    // A bit for each token of the chunk.
    unsigned resets[CHUNK / 32];
};
static_assert(sizeof(Sequence) <= 128, "");

// Shared memory of a team.
constexpr int TEAM_BYTES = 16 * CHUNK * CHANNELS * (SLICES == 1 ? 1 : 2) + 4 * (2 * CHUNK * SLICE + 2 * WARPS * N_SUMS)
                         + 16 * THREADS * (STRIPS + 1) + 128 + (SLICES == 1 ? 0 : 32 * SLICES * THREADS);

// All teams but the last leave their sums for db and dc in shared memory, and the last adds them to its own. What is left is handed
// over every HANDOVER strips, from a warp to the warp of the same number, so that a team can be most of a chunk ahead of the last.
#ifndef HANDOVER
#define HANDOVER (TEAMS == 1 ? STRIPS : 4)
#endif
constexpr int HANDOVERS = STRIPS / HANDOVER;
static_assert(TEAMS == 1 || SLICES == 1, "");
static_assert(STRIPS % HANDOVER == 0, "");

// Behind the teams' own memory: what a team leaves, `[CHUNK][db, dc][SLICE]`, and the barriers of handovers: is it there, is it read?
__device__ __forceinline__ float* left_sums(int team) {
    return reinterpret_cast<float*>(shared_memory() + TEAMS * TEAM_BYTES) + team * CHUNK * 2 * SLICE;
}
__device__ __forceinline__ unsigned handover_barrier(int is_read, int handover, int warp) {
    return smem_address(left_sums(TEAMS - 1)) + 8 * ((is_read * HANDOVERS + handover) * SUM_WARPS + warp);
}

// Blocks of several teams use Hopper's mbarriers.
#if TEAMS == 1 || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Before a barrier of the block.
__device__ __forceinline__ void open_handovers() {
#if TEAMS > 1
    if (threadIdx.x > 0) return;
    #pragma unroll 1
    for (int i = 0; i < HANDOVERS * SUM_WARPS; i++) {
        mbarrier_init(handover_barrier(0, 0, i), 32 * (TEAMS - 1));
        mbarrier_init(handover_barrier(1, 0, i), 32);
    }
    mbarrier_init_fence();
#endif
}

// Before the strips of a handover in the chunk from `token` on: the last team waits for what others leave, and they until the last has read
// what they left in the chunk before, if they did: that of fewer tokens, which comes first, may lack the strips.
__device__ __forceinline__ void wait_for_turn(bool is_last_team, int handover, int token, int end) {
#if TEAMS > 1
    int warp = thread_of_team() / 32;
    unsigned is_lacking = handover * HANDOVER * STRIP > (unsigned)(end - 1) % CHUNK;
    unsigned turn = (unsigned)(end - 1 - token) / CHUNK - is_lacking;
    if (warp < SUM_WARPS) mbarrier_wait(handover_barrier(!is_last_team, handover, warp), (turn + !is_last_team) % 2);
#endif
}

// After them, every lane for itself.
__device__ __forceinline__ void end_turn(bool is_last_team, int handover) {
#if TEAMS > 1
    int warp = thread_of_team() / 32;
    if (warp < SUM_WARPS) mbarrier_arrive(handover_barrier(is_last_team, handover, warp));
#endif
}

// What a thread reads of a chunk: a pair of channels of every ROWS-th token.
template <int ROWS_READ> struct Activations {
    static constexpr int N = ROWS_READ;
    Pair<X> x[N], dy[N];
    Pair<Dt> dt[N];
    Pair<Z> z[N];
};

// Sums over the 8 channels of a warp. A lane brings values of 4 tokens and 4 states, and keeps the sums of token lane % 4 and of
// the two states from lane / 4 * 2 on. `ones[r]` is 1 where lane / 4 == r.
__device__ __forceinline__ float2 sum_over_channels(const float (&v)[4][4], const unsigned (&ones)[8]) {
    float sums[4] = {0.f, 0.f, 0.f, 0.f};
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        // What lanes hold is a 16x8 matrix: a row for each group of 4 lanes and each of states 0 and 2, a column for each of the
        // 4 lanes and each of states 0 and 1. The pattern adds up 4 columns each into columns 2 k and 2 k + 1 of the sums.
        unsigned values[4] = {__float_as_uint(v[k][0]), __float_as_uint(v[k][2]), __float_as_uint(v[k][1]), __float_as_uint(v[k][3])};
        unsigned pattern[2] = {ones[2 * k], ones[2 * k + 1]};
        if (EXACT) {
            unsigned upper[4], lower[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                upper[i] = values[i] & 0xffffe000u;
                lower[i] = __float_as_uint(__uint_as_float(values[i]) - __uint_as_float(upper[i]));
            }
            mma_tf32(sums, lower, pattern, sums);
            mma_tf32(sums, upper, pattern, sums);
        } else {
            mma_tf32(sums, values, pattern, sums);
        }
    }
    bool odd = threadIdx.x & 4;
    float lo = (odd ? sums[2] : sums[0]) + __shfl_xor_sync(FULL_WARP, odd ? sums[0] : sums[2], 4);
    float hi = (odd ? sums[3] : sums[1]) + __shfl_xor_sync(FULL_WARP, odd ? sums[1] : sums[3], 4);
    return make_float2(lo, hi);
}

__device__ __forceinline__ float2 add(float2 sum, const float* pair) {
    float2 v = REREAD ? *reinterpret_cast<const float2*>(pair) : make_float2(pair[0], pair[1]);
    return make_float2(sum.x + v.x, sum.y + v.y);
}

// Where the sums of a warp stand in shared memory, `[db, dc][STRIP][SLICE]`; halves of rows swap so that stores miss each other.
__device__ __forceinline__ int warp_sum_at(int which, int t, int n) {
    return (which * STRIP + t) * SLICE + (n ^ (t & 2) << 2);
}

extern "C" __global__ void __launch_bounds__(TEAMS * THREADS, MIN_BLOCKS)
selective_scan_backward(X* dx, Dt* ddt, Z* dz, i64 dz_batch, i64 dz_token, float* state_parts, float* rate_parts, float* channel_parts,
                        float* start_grad,
                        const X* dy, const X* x, const Dt* dt, const Z* z, const B* b, const C* c, i64 dy_batch, i64 dy_token,
                        i64 x_batch, i64 x_token, i64 dt_batch, i64 dt_token, i64 z_batch, i64 z_token, i64 b_batch,
                        i64 b_token, i64 c_batch, i64 c_token, const float* a, const float* d, const float* dt_bias,
                        const float* chunk_states, const float* end_grad, const unsigned char* reset, i64 reset_batch,
                        i64 reset_token, int seq_len, int d_inner, int d_state, int segment_len) {
    // [CHUNK][CHANNELS] dt, dt x and dy', one word unused.
    float4* steps = reinterpret_cast<float4*>(shared_memory() + team_of_block() * TEAM_BYTES);
    float* b_tile = reinterpret_cast<float*>(steps + CHUNK * CHANNELS);  // [b, c][CHUNK][SLICE]
    float* warp_sums = b_tile + 2 * CHUNK * SLICE;             // [2][WARPS][db, dc][STRIP][SLICE]
    float4* marks = reinterpret_cast<float4*>(warp_sums + 2 * WARPS * 2 * STRIP * SLICE);  // [STRIPS][THREADS]
    float4* parts = marks + STRIPS * THREADS;                  // [THREADS] gradients of skip and bias so far
    Sequence* sequence = reinterpret_cast<Sequence*>(parts + THREADS);  // 8 words of 16 bytes
    float4* slices = parts + THREADS + 8;                      // [2 SLICES][THREADS] g and da, if they are not in registers
    // Sums over states of g b, a k and c h, in the place of steps if no other slice needs those.
    float4* sums = SLICES == 1 ? steps : slices + 2 * SLICES * THREADS;

    int tid = thread_of_team(), lane = tid % 32, warp = tid / 32, group = lane / 8;
    int channel = warp * 8 + lane % 8, e = first_channel() + channel;
    int pair = tid % PAIRS * 2, pair_e = first_channel() + pair, row = tid / PAIRS;
    i64 batch = blockIdx.z;
    int n_segments = gridDim.y, segment = blockIdx.y;
    int first = segment * segment_len, end = min(seq_len, first + segment_len);
    int n_chunks = (seq_len + CHUNK - 1) / CHUNK;
    i64 border = batch * n_segments + segment;
    // The addresses of this block's sequence wait in shared memory, which leaves registers to the scan.
    if (tid == 0) {
        sequence->d_inner = d_inner;
        sequence->dy = dy + batch * dy_batch, sequence->x = x + batch * x_batch, sequence->dt = dt + batch * dt_batch;
        sequence->b = b + batch * b_batch, sequence->c = c + batch * c_batch;
        sequence->dx = dx + batch * seq_len * d_inner, sequence->ddt = ddt + batch * seq_len * d_inner;
        if (REREAD) sequence->state_parts = state_parts + ((i64)blockIdx.x * gridDim.z + batch) * seq_len * (2 * SLICE * SLICES);
        if (GATED) sequence->z = z + batch * z_batch, sequence->dz = dz + batch * dz_batch;
    }
    int last = first + (end - first - 1) / CHUNK * CHUNK;
    open_handovers();
    __syncthreads();
    if (!REREAD) state_parts += ((i64)blockIdx.x * gridDim.z + batch) * seq_len * (2 * SLICE * SLICES);
    if (end_grad) end_grad += border * d_inner * d_state;

    // How many channels of this thread's pair there are.
    int width_kept = max(0, min(2, d_inner - pair_e));
    auto width_of_pair = [&] { return REREAD ? max(0, min(2, sequence->d_inner - pair_e)) : width_kept; };
    parts[tid] = make_float4(0.f, 0.f, 0.f, 0.f);

    unsigned ones[8];
    #pragma unroll
    for (int r = 0; r < 8; r++) ones[r] = __float_as_uint(lane / 4 == r ? 1.f : 0.f);

    States rate = load_states(a, e, group * 4, d_inner, d_state), g, rate_grad = {{0.f, 0.f, 0.f, 0.f}};
    #pragma unroll
    for (int i = 0; i < 4; i++) rate.v[i] *= LOG2_E;
    #pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
        g = load_states(end_grad, e, slice * SLICE + group * 4, d_inner, d_state);
        if (SLICES > 1) {
            slices[slice * THREADS + tid] = to_float4(g);
            slices[(SLICES + slice) * THREADS + tid] = to_float4(rate_grad);
        }
    }

    // Reads rows `from`, `from + ROWS`, .. of a chunk.
    auto fetch = [&](auto& to, int token, int from) {
        int start = token + from, width = width_of_pair();
        const X* x_tile = to_device_memory(sequence->x) + start * x_token + pair_e;
        const X* dy_tile = to_device_memory(sequence->dy) + start * dy_token + pair_e;
        const Dt* dt_tile = to_device_memory(sequence->dt) + start * dt_token + pair_e;
        const Z* z_tile = to_device_memory(sequence->z) + start * z_token + pair_e;
        #pragma unroll
        for (int k = 0; k < to.N; k++) {
            int t = k * ROWS, there = start + t < end ? width : 0;
            to.x[k] = load_pair<PAIRED_CHANNELS>(row_of(x_tile, t, (unsigned)x_token * (unsigned)sizeof(X)), there);
            to.dt[k] = load_pair<PAIRED_CHANNELS>(row_of(dt_tile, t, (unsigned)dt_token * (unsigned)sizeof(Dt)), there);
            to.dy[k] = load_pair<PAIRED_CHANNELS>(row_of(dy_tile, t, (unsigned)dy_token * (unsigned)sizeof(X)), there);
            if (GATED) to.z[k] = load_pair<PAIRED_CHANNELS>(row_of(z_tile, t, (unsigned)z_token * (unsigned)sizeof(Z)), there);
        }
    };
    // Asks for what a chunk will read, 32 bytes a thread and tensor, so that it is in the L2 cache by then.
    auto prefetch_chunk = [&](int token) {
        constexpr unsigned SECTOR = 32 / sizeof(X), SECTORS = CHANNELS / SECTOR;
        unsigned at = first_channel() + thread_of_team() % SECTORS * SECTOR;
        if (at < d_inner) {
            #pragma unroll
            for (int k = 0; k < CHUNK; k += THREADS / SECTORS) {
                int t = token + k + thread_of_team() / SECTORS;
                prefetch_l2(to_device_memory(sequence->x) + t * x_token + at);
                prefetch_l2(to_device_memory(sequence->dt) + t * dt_token + at);
                prefetch_l2(to_device_memory(sequence->dy) + t * dy_token + at);
                if (GATED) prefetch_l2(to_device_memory(sequence->z) + t * z_token + at);
            }
        }
        if (e < d_inner && lane % 2 == 0) {
            i64 state = (batch * n_chunks + token / CHUNK) * SLICES * 4 + group;
            prefetch_l2(reinterpret_cast<const float4*>(chunk_states) + state * d_inner + (unsigned)e);
        }
    };
    StateTile<B, CHUNK> b_next;
    StateTile<C, CHUNK> c_next;
    States h_next;
    auto fetch_states = [&](int token, int slice) {
        int n_tokens = min(CHUNK, end - token);
        b_next.load(to_device_memory(sequence->b) + token * b_token, b_token, n_tokens, slice, d_state);
        c_next.load(to_device_memory(sequence->c) + token * c_token, c_token, n_tokens, slice, d_state);
        h_next = States{{0.f, 0.f, 0.f, 0.f}};
        if (e < d_inner) {
            i64 at = ((batch * n_chunks + token / CHUNK) * SLICES + slice) * 4 + group;
            h_next = to_states(reinterpret_cast<const float4*>(chunk_states)[at * d_inner + (unsigned)e]);
        }
    };

    for (int token = last; token >= first; token -= CHUNK) {
        int n_tokens = min(CHUNK, end - token), n_strips = (n_tokens + STRIP - 1) / STRIP;
        // All loads of a chunk are under way before the first is waited for.
        Activations<STEPS> read;
        fetch_states(token, 0);
        fetch(read, token, row);
        // Parameters are read anew for every chunk, which leaves registers to the scan.
        float2 bias = load_parameters(dt_bias, pair_e, width_of_pair());
        #pragma unroll
        for (int k = 0; k < STEPS; k++) {
            bool there = row + k * ROWS < n_tokens;
            float2 u = read.x[k].unpack(), v = read.dt[k].unpack(), o = read.dy[k].unpack();
            if (GATED) {
                float2 w = read.z[k].unpack();
                o = make_float2(o.x * gate(w.x), o.y * gate(w.y));
            }
            float lo = there ? step_size(v.x + bias.x) : 0.f, hi = there ? step_size(v.y + bias.y) : 0.f;
            steps[k * ROWS * CHANNELS + 2 * tid] = make_float4(lo, lo * u.x, o.x, 0.f);
            steps[k * ROWS * CHANNELS + 2 * tid + 1] = make_float4(hi, hi * u.y, o.y, 0.f);
        }
        if (RESET && warp < CHUNK / 32) {
            int t = warp * 32 + lane;
            i64 at = batch * reset_batch + (token + (t < n_tokens ? t : 0)) * reset_token;
            unsigned bits = __ballot_sync(FULL_WARP, t < n_tokens && reset[at]);
            if (lane == 0) sequence->resets[warp] = bits;
        }

        #pragma unroll 1
        for (int slice = 0; slice < SLICES; slice++) {
            if (slice > 0) {
                fetch_states(token, slice);
                sync_team();
            }
            b_next.store(b_tile);
            c_next.store(b_tile + CHUNK * SLICE);
            States h = h_next;
            if (slice == 0 && token > first) prefetch_chunk(token - CHUNK);
            if (SLICES > 1) {
                g = to_states(slices[slice * THREADS + tid]);
                rate_grad = to_states(slices[(SLICES + slice) * THREADS + tid]);
                rate = load_states(a, e, slice * SLICE + group * 4, d_inner, d_state);
                #pragma unroll
                for (int i = 0; i < 4; i++) rate.v[i] *= LOG2_E;
            }
            sync_team();

            // What this lane reads of a strip, and where it leaves its states.
            const float4 *step_at = steps + channel, *b_at = reinterpret_cast<const float4*>(b_tile) + group;
            float4* mark_at = marks + tid;
            #pragma unroll 1
            for (int strip = 0; strip < n_strips - 1; strip++) {
                *mark_at = to_float4(h);
                unsigned reset_bits = 0;
                if (RESET) reset_bits = sequence->resets[strip * STRIP / 32] >> strip * STRIP % 32;
                #pragma unroll
                for (int k = 0; k < STRIP; k++) {
                    float2 step = *reinterpret_cast<const float2*>(step_at + k * CHANNELS);
                    States b_t = to_states(b_at[k * 4]);
                    if (RESET && (reset_bits >> k & 1)) h = States{{0.f, 0.f, 0.f, 0.f}};
                    #pragma unroll
                    for (int i = 0; i < 4; i++) h.v[i] = fmaf(ex2(step.x * rate.v[i]), h.v[i], step.y * b_t.v[i]);
                }
                mark_at += THREADS, step_at += STRIP * CHANNELS, b_at += STRIP * 4;
            }
            int last_t = (n_strips - 1) * STRIP;
            float4* to = sums + (last_t + group) * CHANNELS + channel;
            // Two neighbouring sums over the warps a thread, of the first warps.
            int sum_t = tid * 2 / (2 * SLICE), sum_n = tid * 2 % (2 * SLICE);
            const float* sum_from = warp_sums + warp_sum_at(sum_n / SLICE, sum_t, sum_n % SLICE);
            float* sums_to = warp_sums + warp * N_SUMS + warp_sum_at(0, lane % 4, lane / 4 * 2);
            sum_t += last_t;
            float* part_to = (REREAD ? to_device_memory(sequence->state_parts) : state_parts) + ((i64)(token + sum_t) * SLICES + slice) * (2 * SLICE) + sum_n;

            #pragma unroll 1
            for (int handover = TEAMS == 1 ? 0 : (n_strips - 1) / HANDOVER; handover >= 0; handover--) {
                bool is_last_team = team_of_block() == TEAMS - 1;
                wait_for_turn(is_last_team, handover, token, end);
                #pragma unroll 1
                for (int strip = (TEAMS == 1 ? n_strips : min(n_strips, (handover + 1) * HANDOVER)) - 1; strip >= handover * HANDOVER; strip--) {
                    unsigned reset_bits = 0;
                    if (RESET) reset_bits = sequence->resets[strip * STRIP / 32] >> strip * STRIP % 32;
                    if (strip < n_strips - 1) h = to_states(*mark_at);
                    else *mark_at = to_float4(h);
                    int parity = strip % 2 * WARPS * N_SUMS;
                    float before[STRIP][4], decay[STRIP][4], y_total[STRIP / 4];
                    float4 step[4];
                    States b_t[4], c_t[4];
                    auto read_operands = [&](int part) {
                        #pragma unroll
                        for (int k = 0; k < 4; k++) {
                            step[k] = step_at[(part + k) * CHANNELS];
                            b_t[k] = to_states(b_at[(part + k) * 4]);
                            c_t[k] = to_states(b_at[CHUNK * 4 + (part + k) * 4]);
                        }
                    };
                    float products[4][4];
                    #pragma unroll
                    for (int part = 0; part < STRIP; part += 4) {
                        read_operands(part);
                        float y_part[4];
                        #pragma unroll
                        for (int k = 0; k < 4; k++) {
                            int q = part + k;
                            bool cleared = RESET && (reset_bits >> q & 1);
                            #pragma unroll
                            for (int i = 0; i < 4; i++) {
                                before[q][i] = cleared ? 0.f : h.v[i];
                                decay[q][i] = cleared ? 0.f : ex2(step[k].x * rate.v[i]);
                                h.v[i] = fmaf(decay[q][i], before[q][i], step[k].y * b_t[k].v[i]);
                                products[k][i] = step[k].z * h.v[i];
                                if (GATED) y_part[k] = i == 0 ? c_t[k].v[i] * h.v[i] : fmaf(c_t[k].v[i], h.v[i], y_part[k]);
                            }
                        }
                        float2 c_sums = sum_over_channels(products, ones);
                        if (GATED) y_total[part / 4] = sum_over_states(y_part);
                        store_pair_f32(sums_to + parity + (STRIP + part) * SLICE, c_sums);
                    }
                    #pragma unroll
                    for (int part = STRIP - 4; part >= 0; part -= 4) {
                        float input_part[4], rate_part[4];
                        // Those of the last four tokens are still here.
                        if (EXACT || part < STRIP - 4) read_operands(part);
                        if (part == 0) {
                            States at_start = to_states(*mark_at);
                            #pragma unroll
                            for (int i = 0; i < 4; i++) before[0][i] = RESET && (reset_bits & 1) ? 0.f : at_start.v[i];
                        }
                        #pragma unroll
                        for (int k = 3; k >= 0; k--) {
                            int q = part + k;
                            #pragma unroll
                            for (int i = 0; i < 4; i++) {
                                float by_state = fmaf(c_t[k].v[i], step[k].z, g.v[i]);
                                products[k][i] = by_state * step[k].y;
                                input_part[k] = i == 0 ? by_state * b_t[k].v[i] : fmaf(by_state, b_t[k].v[i], input_part[k]);
                                g.v[i] = by_state * decay[q][i];
                                float through_decay = g.v[i] * before[q][i];
                                rate_part[k] = i == 0 ? through_decay * rate.v[i] : fmaf(through_decay, rate.v[i], rate_part[k]);
                                rate_grad.v[i] = fmaf(through_decay, step[k].x, rate_grad.v[i]);
                            }
                        }
                        float2 b_sums = sum_over_channels(products, ones);
                        float4 total = make_float4(sum_over_states(input_part), sum_over_states(rate_part), GATED ? y_total[part / 4] : 0.f, 0.f);
                        float4* at = to + part * CHANNELS;
                        if (SLICES > 1 && slice > 0) total = make_float4(at->x + total.x, at->y + total.y, at->z + total.z, 0.f);
                        // Other lanes have read what these sums replace.
                        if (SLICES == 1) __syncwarp();
                        *at = total;
                        store_pair_f32(sums_to + parity + part * SLICE, b_sums);
                    }
                    sync_team();
                    if ((SUM_WARPS == WARPS || warp < SUM_WARPS) && (REREAD || sum_t < n_tokens)) {
                        float2 total = make_float2(0.f, 0.f);
                        #pragma unroll
                        for (int w = 0; w < WARPS; w++) total = add(total, sum_from + parity + w * N_SUMS);
                        if (is_last_team) {
                            #pragma unroll
                            for (int team = 0; team < TEAMS - 1; team++) total = add(total, left_sums(team) + strip * N_SUMS + 2 * tid);
                            if (!REREAD) part_to[0] = total.x, part_to[1] = total.y;
                            else if (sum_t < n_tokens) store_pair_f32(part_to, total);
                        } else store_pair_f32(left_sums(team_of_block()) + strip * N_SUMS + 2 * tid, total);
                    }
                    mark_at -= THREADS, step_at -= STRIP * CHANNELS, b_at -= STRIP * 4, to -= STRIP * CHANNELS;
                    sum_t -= STRIP, part_to -= STRIP * SLICES * 2 * SLICE;
                }
                end_turn(is_last_team, handover);
            }
            if (SLICES > 1) {
                slices[slice * THREADS + tid] = to_float4(g);
                slices[(SLICES + slice) * THREADS + tid] = to_float4(rate_grad);
            }
        }

        int width = width_of_pair();
        float2 skip = load_parameters(d, pair_e, width);
        float4 part = parts[tid];
        bias = load_parameters(dt_bias, pair_e, width);
        #pragma unroll 1
        for (int begin = 0, from = row; begin < CHUNK; begin += FINISHED * ROWS, from += FINISHED * ROWS) {
            Activations<FINISHED> read;
            i64 at = (i64)(token + from) * d_inner + pair_e;
            X* dx_tile = to_device_memory(sequence->dx) + at;
            Dt* ddt_tile = to_device_memory(sequence->ddt) + at;
            Z* dz_tile = to_device_memory(sequence->dz) + (token + from) * dz_token + pair_e;
            fetch(read, token, from);
            #pragma unroll
            for (int k = 0; k < FINISHED; k++) {
                int t = from + k * ROWS, there = t < n_tokens ? width : 0;
                float2 u = read.x[k].unpack(), v = read.dt[k].unpack(), out = read.dy[k].unpack();
                // Sums by the input and by the rate, and of the output.
                const float4* of_pair = sums + (begin + k * ROWS) * CHANNELS + 2 * tid;
                float4 low = of_pair[0], high = of_pair[1];
                if (GATED) {
                    float2 w = read.z[k].unpack();
                    float2 by_z = make_float2(out.x * fmaf(skip.x, u.x, low.z) * gate_slope(w.x),
                                              out.y * fmaf(skip.y, u.y, high.z) * gate_slope(w.y));
                    out = make_float2(out.x * gate(w.x), out.y * gate(w.y));
                    store_pair<PAIRED_CHANNELS>(row_of(dz_tile, k * ROWS, (unsigned)dz_token * (unsigned)sizeof(Z)), there, by_z);
                }
                v = make_float2(v.x + bias.x, v.y + bias.y);
                float2 by_x = make_float2(fmaf(low.x, step_size(v.x), skip.x * out.x), fmaf(high.x, step_size(v.y), skip.y * out.y));
                float2 by_dt = make_float2(fmaf(low.y, LN_2, low.x * u.x) * step_slope(v.x),
                                           fmaf(high.y, LN_2, high.x * u.y) * step_slope(v.y));
                store_pair<PAIRED_CHANNELS>(row_of(dx_tile, k * ROWS, d_inner * (unsigned)sizeof(X)), there, by_x);
                store_pair<PAIRED_CHANNELS>(row_of(ddt_tile, k * ROWS, d_inner * (unsigned)sizeof(Dt)), there, by_dt);
                if (t < n_tokens)
                    part = make_float4(fmaf(out.x, u.x, part.x), fmaf(out.y, u.y, part.y), part.z + by_dt.x, part.w + by_dt.y);
            }
        }
        parts[tid] = part;
        // The next chunk's steps go where this one's are still read only by the same thread; its other sums wait for a barrier.
    }

    let_next_kernel_start();
    #pragma unroll
    for (int slice = 0; slice < SLICES; slice++) {
        if (SLICES > 1) {
            g = to_states(slices[slice * THREADS + tid]);
            rate_grad = to_states(slices[(SLICES + slice) * THREADS + tid]);
        }
        int n = slice * SLICE + group * 4;
        store_states(rate_parts + border * d_inner * d_state, e, n, sequence->d_inner, d_state, rate_grad);
        if (start_grad && segment == 0) store_states(start_grad + batch * d_inner * d_state, e, n, sequence->d_inner, d_state, g);
    }
    sync_team();
    if (tid < PAIRS) {
        int width = width_of_pair();
        float4 total = parts[tid];
        for (int r = 1; r < ROWS; r++) {
            float4 other = parts[r * PAIRS + tid];
            total = make_float4(total.x + other.x, total.y + other.y, total.z + other.z, total.w + other.w);
        }
        store_pair<false>(channel_parts + border * 2 * d_inner + pair_e, width, make_float2(total.x, total.y));
        store_pair<false>(channel_parts + (border * 2 + 1) * d_inner + pair_e, width, make_float2(total.z, total.w));
    }
}

// db and dc `[batch, seq_len, d_state]` from the blocks' parts `[n_blocks, batch, seq_len, SLICES, 2, SLICE]`. A thread owns four
// neighbouring sums. First come the first tokens of all sequences: what was written last is still in the L2 cache, and what is read
// once need not stay there.
__device__ __forceinline__ void sum_states(B* db, C* dc, const float* parts, int n_blocks, int batch, i64 seq_len, int d_state, unsigned block) {
    constexpr int WIDTH = 2 * SLICE * SLICES;
    i64 n_own = seq_len * WIDTH, i = 4 * ((i64)(block / batch) * blockDim.x + threadIdx.x);
    if (i >= n_own) return;
    i += block % batch * n_own;
    float total[4] = {};
    #pragma unroll 8
    for (int k = 0; k < n_blocks; k++) {
        float4 part = __ldcs(reinterpret_cast<const float4*>(parts + (i64)k * batch * n_own + i));
        total[0] += part.x, total[1] += part.y, total[2] += part.z, total[3] += part.w;
    }
    int n = i % WIDTH / (2 * SLICE) * SLICE + i % SLICE;
    i64 at = i / WIDTH * d_state + n;
    #pragma unroll
    for (int m = 0; m < 4; m++) {
        // Cutting values off after 11 bits has made them smaller by 2^-11 / (2 ln 2) on average.
        float value = EXACT ? total[m] : total[m] * 1.000352f;
        if (n + m >= d_state) continue;
        if (i / SLICE % 2 == 0) db[at + m] = from_f32<B>(value);
        else dc[at + m] = from_f32<C>(value);
    }
}

// da `[d_inner, d_state]`, dd and ddt_bias `[d_inner]` (null where not wanted) from `n_parts` parts: those of all segments of all sequences.
__device__ __forceinline__ void sum_channels(float* da, float* dd, float* dbias, const float* rate_parts, const float* channel_parts,
                                             int n_parts, int d_inner, int d_state, unsigned block) {
    i64 i = (i64)block * blockDim.x + threadIdx.x, n_rates = (i64)d_inner * d_state;
    const float* parts = i < n_rates ? rate_parts + i : channel_parts + (i - n_rates);
    i64 stride = i < n_rates ? n_rates : 2 * d_inner;
    if (i >= n_rates + 2 * d_inner) return;
    float total = 0.f;
    #pragma unroll 8
    for (int k = 0; k < n_parts; k++) total += parts[k * stride];
    if (i < n_rates) da[i] = total;
    else if (i < n_rates + d_inner) {
        if (dd) dd[i - n_rates] = total;
    } else if (dbias) dbias[i - n_rates - d_inner] = total;
}

// All sums over blocks. Its first `channel_blocks` blocks add up what belongs to channels, the others what belongs to tokens. They take
// their places as the last blocks of selective_scan_backward end.
extern "C" __global__ void selective_scan_sum(B* db, C* dc, const float* state_parts, int n_blocks, int batch, i64 seq_len,
                                              float* da, float* dd, float* dbias, const float* rate_parts, const float* channel_parts,
                                              int n_parts, int d_inner, int d_state, unsigned channel_blocks) {
    wait_for_kernel_in_front();
    if (blockIdx.x < channel_blocks)
        sum_channels(da, dd, dbias, rate_parts, channel_parts, n_parts, d_inner, d_state, blockIdx.x);
    else sum_states(db, dc, state_parts, n_blocks, batch, seq_len, d_state, blockIdx.x - channel_blocks);
}

#endif
