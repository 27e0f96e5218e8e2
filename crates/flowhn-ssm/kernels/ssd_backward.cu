// SSD (Mamba-2) backward, the part inside each chunk of 64 tokens, for all gradients but that of the initial state.
//
//   Inputs as in ssd_forward.cu; dy [batch, seq_len, n_heads, d_head]; states and d_states bf16
//   [batch, chunks, n_heads, d_head, d_state]: h before each chunk and dh after it (from ssd_state.cu).
//   dx as x, with strides of its own, d_dt contiguous; db and dc f32 [parts, batch, seq_len, n_groups, d_state] to be summed over the parts, or bf16 if there is
//   one part; sums f32 [3, batch * chunks, n_heads]: this chunk's share of the gradients of a, d and dt_bias.
//
// With g_ij = c_i . b_j, l_ij = 2^(s_i - s_j), w_j = 2^(s_end - s_j) dt_j and p_ij = dy_i . x_j for j <= i:
//
//   dg_ij = sum over heads of p_ij l_ij dt_j
//   dc = dg b + sum over heads of 2^(s_i) dy h                 db = dg^T c + sum over heads of w_j x dh
//   dx_j = sum_i g_ij l_ij dt_j dy_i + w_j dh b_j + d dy_j
//   r_i = sum_j p_ij g_ij l_ij dt_j + 2^(s_i) dy_i . h c_i     q_j = sum_i p_ij g_ij l_ij + 2^(s_end - s_j) x_j . dh b_j
//   d(step_t) = sum_{i >= t} (r_i - dt_i q_i) + sum_j w_j x_j . dh b_j + 2^(s_end) <dh, h>
//   d(dt_t) = a d(step_t) + q_t
//
// A block takes one chunk and several heads of one group, one after the other, with 16 warps of two kinds: 8 own rows i of dc
// and dg, 8 own rows j of db and dx; each kind has 4 row blocks times 2 halves of the columns. What makes it fast: the
// sums over heads stay in registers, so that the products with b and c are made once a block and db, dc leave it once; x, dy, h, dh
// are read once, those of the next head under the products of this one; one barrier a head (two where the head is cut off from its state), and one warp closes the
// books of a head while the others are at the next.
#include "ssd_backward.cuh"

typedef DtypeOf<DT_KIND>::type DT;
constexpr int P = P_TILE, N = N_TILE, THREADS = 512;
constexpr int STAGES = N <= 128 ? 2 : 1;
constexpr bool ALIGN16 = ALIGNED;
constexpr int STAGE_BYTES = 2 * Tile<P>::bytes(CHUNK) + 2 * Tile<N>::bytes(P);
constexpr int HALF_N = N / 2 / 8, HALF_P = P / 2 / 8;  // results of 8 columns in a half of d_state, of d_head

// One head's inputs.
struct Stage {
    Tile<P> x, dy;
    Tile<N> h, dh;
    __device__ __forceinline__ explicit Stage(char* at) {
        x.base = at, dy.base = at + Tile<P>::bytes(CHUNK);
        h.base = at + 2 * Tile<P>::bytes(CHUNK), dh.base = h.base + Tile<N>::bytes(P);
    }
};

// What the warps find out about one head, for the warp that closes its books.
struct Findings {
    float r[2][CHUNK];  // by halves of d_state
    float q[4][CHUNK];  // by blocks of rows i
    float u[2][CHUNK];  // by halves of d_head: 2^(s_end - s_j) x_j . dh b_j
    float states[8], skips[8];
};

// A warp that owns 16 rows i: dc for one half of d_state, dg for the blocks of tokens j of one parity.
struct RowWarp {
    int row, half, lane, g, t;
    float scores[2][2][4];  // g_ij of blocks j = half, half + 2
    float d_scores[2][2][4];
    float dc[HALF_N][4];

    __device__ __forceinline__ void begin(Tile<N> b, Tile<N> c, const Steps& steps) {
        #pragma unroll
        for (int slot = 0; slot < 2; slot++)
            #pragma unroll
            for (int n = 0; n < 2; n++)
                #pragma unroll
                for (int k = 0; k < 4; k++) scores[slot][n][k] = 0.f, d_scores[slot][n][k] = 0.f;
        #pragma unroll
        for (int n = 0; n < HALF_N; n++)
            #pragma unroll
            for (int k = 0; k < 4; k++) dc[n][k] = 0.f;
        #pragma unroll
        for (int k = 0; k < N / 16; k++) {
            unsigned rows[4], cols[2][2];
            load_a(rows, c, row * 16, k * 16);
            #pragma unroll
            for (int slot = 0; slot < 2; slot++) {
                if (slot * 2 + half > row) continue;
                load_b(cols, b, k * 16, (slot * 2 + half) * 16);
                add_product(scores[slot][0], rows, cols[0]);
                add_product(scores[slot][1], rows, cols[1]);
            }
        }
        // Those that no token sees may be infinite, where gradients of 0 meet them.
        #pragma unroll
        for (int slot = 0; slot < 2; slot++)
            #pragma unroll
            for (int n = 0; n < 2; n++)
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    int i = row * 16 + g + k / 2 * 8, j = (slot * 2 + half) * 16 + n * 8 + 2 * t + k % 2;
                    if (j > i || j < steps.begin[i]) scores[slot][n][k] = 0.f;
                }
    }

    __device__ __forceinline__ void head(const Stage& in, Tile<N>, Tile<N> c, const Steps& steps, Findings& out, float, bf16*, i64, int,
                                         int) {
        unsigned dy[P / 16][4];
        #pragma unroll
        for (int k = 0; k < P / 16; k++) load_a(dy[k], in.dy, row * 16, k * 16);
        int i0 = row * 16 + g;
        float s_row[2] = {steps.s[i0], steps.s[i0 + 8]};
        int begin[2] = {steps.begin[i0], steps.begin[i0 + 8]};
        float r[2] = {0.f, 0.f};
        #pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            int block = slot * 2 + half;
            if (block > row) continue;
            float p[2][4] = {};
            #pragma unroll
            for (int k = 0; k < P / 16; k++) {
                unsigned x[2][2];
                load_b(x, in.x, k * 16, block * 16);
                add_product(p[0], dy[k], x[0]);
                add_product(p[1], dy[k], x[1]);
            }
            #pragma unroll
            for (int n = 0; n < 2; n++) {
                int j0 = block * 16 + n * 8 + 2 * t;
                float2 s_col = *reinterpret_cast<const float2*>(&steps.s[j0]);
                float2 dt_col = *reinterpret_cast<const float2*>(&steps.dt[j0]);
                float q[2] = {0.f, 0.f};
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    float dt = k % 2 ? dt_col.y : dt_col.x;
                    float decay = ex2(s_row[k / 2] - (k % 2 ? s_col.y : s_col.x));
                    int j = j0 + k % 2;
                    float by_score = j <= i0 + k / 2 * 8 && j >= begin[k / 2] ? p[n][k] * decay : 0.f;
                    d_scores[slot][n][k] += by_score * dt;
                    float by_decay = by_score * scores[slot][n][k];
                    r[k / 2] += by_decay * dt;
                    q[k % 2] += by_decay;
                }
                #pragma unroll
                for (int k = 0; k < 2; k++) {
                    q[k] = sum_rows(q[k]);
                    if (g == 0) out.q[row][j0 + k] = q[k];
                }
            }
        }
        float keep[2] = {steps.from_start[i0], steps.from_start[i0 + 8]};
        #pragma unroll
        for (int n = 0; n < HALF_N; n += 2) {
            int col = half * (N / 2) + n * 8;
            float z[2][4] = {};
            #pragma unroll
            for (int k = 0; k < P / 16; k++) {
                unsigned h[2][2];
                load_b_trans(h, in.h, k * 16, col);
                add_product(z[0], dy[k], h[0]);
                add_product(z[1], dy[k], h[1]);
            }
            #pragma unroll
            for (int m = 0; m < 2; m++)
                #pragma unroll
                for (int k = 0; k < 2; k++) {
                    unsigned cs = c.pair(i0 + k * 8, col + m * 8 + 2 * t);
                    float z0 = left_by(keep[k], z[m][2 * k]), z1 = left_by(keep[k], z[m][2 * k + 1]);
                    dc[n + m][2 * k] += z0, dc[n + m][2 * k + 1] += z1;
                    r[k] += z0 * low_bf16(cs) + z1 * high_bf16(cs);
                }
        }
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            r[k] = sum_quad(r[k]);
            if (t == 0) out.r[half][i0 + k * 8] = r[k];
        }
        // <dh, h>, 8 values at a time.
        float states = 0.f;
        int idx = threadIdx.x & 255;
        #pragma unroll
        for (int v = idx; v < P * N / 8; v += 256) {
            int at = (v / (N / 8) * Tile<N>::PITCH + v % (N / 8) * 8) * 2;
            float h[8], dh[8];
            load_vec(h, reinterpret_cast<const bf16*>(in.h.base + at));
            load_vec(dh, reinterpret_cast<const bf16*>(in.dh.base + at));
            #pragma unroll
            for (int k = 0; k < 8; k++) states += h[k] * dh[k];
        }
        states = warp_sum(states);
        if (lane == 0) out.states[idx / 32] = states;
    }

    // Hands dg to the warps of the other kind.
    __device__ __forceinline__ void share(Tile<CHUNK> d_scores_tile) {
        #pragma unroll
        for (int slot = 0; slot < 2; slot++) {
            int block = slot * 2 + half;
            if (block > row) continue;
            #pragma unroll
            for (int n = 0; n < 2; n++)
                #pragma unroll
                for (int k = 0; k < 2; k++)
                    d_scores_tile.set_pair(row * 16 + g + k * 8, block * 16 + n * 8 + 2 * t,
                                           pack_bf16(d_scores[slot][n][2 * k], d_scores[slot][n][2 * k + 1]));
        }
    }

    __device__ __forceinline__ void finish(Tile<CHUNK> d_scores_tile, Tile<N> b, Tile<N>) {
        for (int block = 0; block <= row; block++) {
            unsigned rows[4];
            load_a(rows, d_scores_tile, row * 16, block * 16);
            #pragma unroll
            for (int n = 0; n < HALF_N; n += 2) {
                unsigned cols[2][2];
                load_b_trans(cols, b, block * 16, half * (N / 2) + n * 8);
                add_product(dc[n], rows, cols[0]);
                add_product(dc[n + 1], rows, cols[1]);
            }
        }
    }
};

// A warp that owns 16 rows j: db for one half of d_state, dx for one half of d_head.
struct ColumnWarp {
    int row, half, lane, g, t;
    float scores[4][2][4];  // g_ij with rows j, of blocks i >= row
    float db[HALF_N][4];

    __device__ __forceinline__ void begin(Tile<N> b, Tile<N> c, const Steps&) {
        #pragma unroll
        for (int block = 0; block < 4; block++)
            #pragma unroll
            for (int n = 0; n < 2; n++)
                #pragma unroll
                for (int k = 0; k < 4; k++) scores[block][n][k] = 0.f;
        #pragma unroll
        for (int n = 0; n < HALF_N; n++)
            #pragma unroll
            for (int k = 0; k < 4; k++) db[n][k] = 0.f;
        #pragma unroll
        for (int k = 0; k < N / 16; k++) {
            unsigned rows[4], cols[2][2];
            load_a(rows, b, row * 16, k * 16);
            #pragma unroll
            for (int block = 0; block < 4; block++) {
                if (block < row) continue;
                load_b(cols, c, k * 16, block * 16);
                add_product(scores[block][0], rows, cols[0]);
                add_product(scores[block][1], rows, cols[1]);
            }
        }
    }

    __device__ __forceinline__ void head(const Stage& in, Tile<N> b, Tile<N>, const Steps& steps, Findings& out, float skip, bf16* dx, i64 dx_l,
                                         int n_rows, int n_p) {
        int j0 = row * 16 + g, p0 = half * (P / 2);
        float s_row[2] = {steps.s[j0], steps.s[j0 + 8]}, dt[2] = {steps.dt[j0], steps.dt[j0 + 8]};
        float end = steps.s[CHUNK - 1];
        int ends[2] = {steps.end[j0], steps.end[j0 + 8]};
        float to_end[2] = {ends[0] == CHUNK ? ex2(end - s_row[0]) : 0.f, ends[1] == CHUNK ? ex2(end - s_row[1]) : 0.f};
        float grad[HALF_P][4] = {};
        #pragma unroll
        for (int k = 0; k < N / 16; k++) {
            unsigned rows[4];
            load_a(rows, b, row * 16, k * 16);
            #pragma unroll
            for (int n = 0; n < HALF_P; n += 2) {
                unsigned dh[2][2];
                load_b(dh, in.dh, k * 16, p0 + n * 8);
                add_product(grad[n], rows, dh[0]);
                add_product(grad[n + 1], rows, dh[1]);
            }
        }
        float u[2] = {0.f, 0.f}, skips = 0.f;
        #pragma unroll
        for (int n = 0; n < HALF_P; n++)
            #pragma unroll
            for (int k = 0; k < 2; k++) {
                unsigned x = in.x.pair(j0 + k * 8, p0 + n * 8 + 2 * t), dy = in.dy.pair(j0 + k * 8, p0 + n * 8 + 2 * t);
                u[k] += grad[n][2 * k] * low_bf16(x) + grad[n][2 * k + 1] * high_bf16(x);
                skips += low_bf16(dy) * low_bf16(x) + high_bf16(dy) * high_bf16(x);
                grad[n][2 * k] = left_by(to_end[k] * dt[k], grad[n][2 * k]) + skip * low_bf16(dy);
                grad[n][2 * k + 1] = left_by(to_end[k] * dt[k], grad[n][2 * k + 1]) + skip * high_bf16(dy);
            }
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            u[k] = left_by(to_end[k], sum_quad(u[k]));
            if (t == 0) out.u[half][j0 + k * 8] = u[k];
        }
        skips = warp_sum(skips);
        if (lane == 0) out.skips[half * 4 + row] = skips;

        #pragma unroll
        for (int block = 0; block < 4; block++) {
            if (block < row) continue;
            unsigned mix[4];
            #pragma unroll
            for (int n = 0; n < 2; n++) {
                int i0 = block * 16 + n * 8 + 2 * t;
                float2 s_col = *reinterpret_cast<const float2*>(&steps.s[i0]);
                float m[4];
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    float decay = ex2((k % 2 ? s_col.y : s_col.x) - s_row[k / 2]);
                    int i = i0 + k % 2;
                    m[k] = i >= j0 + k / 2 * 8 && i < ends[k / 2] ? scores[block][n][k] * decay * dt[k / 2] : 0.f;
                }
                mix[2 * n] = pack_bf16(m[0], m[1]), mix[2 * n + 1] = pack_bf16(m[2], m[3]);
            }
            #pragma unroll
            for (int n = 0; n < HALF_P; n += 2) {
                unsigned dy[2][2];
                load_b_trans(dy, in.dy, block * 16, p0 + n * 8);
                add_product(grad[n], mix, dy[0]);
                add_product(grad[n + 1], mix, dy[1]);
            }
        }
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            unsigned pairs[HALF_P];
            #pragma unroll
            for (int n = 0; n < HALF_P; n++) pairs[n] = pack_bf16(grad[n][2 * k], grad[n][2 * k + 1]);
            store_row<HALF_P, ALIGN16>(dx + (j0 + k * 8) * dx_l, p0, n_p, j0 + k * 8 < n_rows, pairs);
        }

        float weight[2] = {to_end[0] * dt[0], to_end[1] * dt[1]};
        #pragma unroll
        for (int k = 0; k < P / 16; k++) {
            unsigned x[4];
            load_a(x, in.x, row * 16, k * 16);
            #pragma unroll
            for (int m = 0; m < 4; m++) x[m] = scale_pair(x[m], weight[m % 2], weight[m % 2]);
            #pragma unroll
            for (int n = 0; n < HALF_N; n += 2) {
                unsigned dh[2][2];
                load_b_trans(dh, in.dh, k * 16, half * (N / 2) + n * 8);
                add_product(db[n], x, dh[0]);
                add_product(db[n + 1], x, dh[1]);
            }
        }
    }

    __device__ __forceinline__ void share(Tile<CHUNK>) {}

    __device__ __forceinline__ void finish(Tile<CHUNK> d_scores_tile, Tile<N>, Tile<N> c) {
        for (int block = row; block < 4; block++) {
            unsigned rows[4];
            load_a_trans(rows, d_scores_tile, row * 16, block * 16);
            #pragma unroll
            for (int n = 0; n < HALF_N; n += 2) {
                unsigned cols[2][2];
                load_b_trans(cols, c, block * 16, half * (N / 2) + n * 8);
                add_product(db[n], rows, cols[0]);
                add_product(db[n + 1], rows, cols[1]);
            }
        }
    }
};

// Writes a warp's 16 rows of db or dc.
__device__ __forceinline__ void store_group(const float (&grad)[HALF_N][4], void* out, i64 at, i64 stride, int row, int n_rows, int col,
                                            int d_state, bool as_bf16) {
    int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        int r = row + g + k * 8;
        if (as_bf16) {
            unsigned pairs[HALF_N];
            #pragma unroll
            for (int n = 0; n < HALF_N; n++) pairs[n] = pack_bf16(grad[n][2 * k], grad[n][2 * k + 1]);
            store_row<HALF_N, ALIGN16>(reinterpret_cast<bf16*>(out) + at + r * stride, col, d_state, r < n_rows, pairs);
        } else if (r < n_rows) {
            float* line = reinterpret_cast<float*>(out) + at + r * stride;
            #pragma unroll
            for (int n = 0; n < HALF_N; n++) {
                int i = col + n * 8 + 2 * t;
                if (ALIGN16 && i < d_state) *reinterpret_cast<float2*>(line + i) = make_float2(grad[n][2 * k], grad[n][2 * k + 1]);
                if (!ALIGN16 && i < d_state) line[i] = grad[n][2 * k];
                if (!ALIGN16 && i + 1 < d_state) line[i + 1] = grad[n][2 * k + 1];
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) ssd_backward(
    const bf16* x, i64 x_b, i64 x_l, i64 x_h, const Steps* steps, const float* a,
    const bf16* b, i64 b_b, i64 b_l, i64 b_g, const bf16* c, i64 c_b, i64 c_l, i64 c_g,
    const float* d,
    const bf16* dy, i64 dy_b, i64 dy_l, i64 dy_h, const bf16* states, const bf16* d_states,
    bf16* dx, i64 dx_b, i64 dx_l, i64 dx_h, DT* d_dt, void* db, void* dc, float* sums,
    int batches, int seq_len, int n_heads, int n_groups, int d_head, int d_state, int p_blocks, int part_heads, int activate) {
    char* memory = shared_memory();
    Tile<N> b_tile{memory}, c_tile{memory + Tile<N>::bytes(CHUNK)};
    char* stages = memory + 2 * Tile<N>::bytes(CHUNK);
    Findings* findings = reinterpret_cast<Findings*>(stages + STAGES * STAGE_BYTES);
    Steps* head_steps = reinterpret_cast<Steps*>(findings + 2);

    int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    int n_chunks = (seq_len + CHUNK - 1) / CHUNK, group_heads = n_heads / n_groups;
    int n_parts = (group_heads + part_heads - 1) / part_heads;
    int part = blockIdx.x % n_parts, group = blockIdx.x / n_parts % n_groups;
    i64 batch_chunk = blockIdx.x / n_parts / n_groups;
    int chunk = batch_chunk % n_chunks, batch = batch_chunk / n_chunks;
    int first_head = group * group_heads + part * part_heads;
    int own_heads = min(part_heads, group_heads - part * part_heads), turns = own_heads * p_blocks;
    int first = chunk * CHUNK, n_rows = min(CHUNK, seq_len - first);
    i64 width = (i64)n_heads * d_head;

    x += batch * x_b + first * x_l, dy += batch * dy_b + first * dy_l;
    dx += batch * dx_b + first * dx_l;
    states += batch_chunk * width * d_state, d_states += batch_chunk * width * d_state;

    auto load = [&](int turn) {
        if (turn < turns) {
            Stage stage(stages + turn % STAGES * STAGE_BYTES);
            int head = first_head + turn / p_blocks, p0 = turn % p_blocks * P, n_p = min(P, d_head - p0);
            i64 state_at = ((i64)head * d_head + p0) * d_state;
            load_tile<CHUNK, P, THREADS, ALIGN16>(stage.x, x + head * x_h + p0, x_l, n_rows, n_p);
            load_tile<CHUNK, P, THREADS, ALIGN16>(stage.dy, dy + head * dy_h + p0, dy_l, n_rows, n_p);
            load_tile<P, N, THREADS, ALIGN16>(stage.h, states + state_at, d_state, n_p, d_state);
            load_tile<P, N, THREADS, ALIGN16>(stage.dh, d_states + state_at, d_state, n_p, d_state);
        }
        cp_async_commit();
    };
    load_tile<CHUNK, N, THREADS, ALIGN16>(b_tile, b + batch * b_b + group * b_g + first * b_l, b_l, n_rows, d_state);
    load_tile<CHUNK, N, THREADS, ALIGN16>(c_tile, c + batch * c_b + group * c_g + first * c_l, c_l, n_rows, d_state);
    for (int i = threadIdx.x; i < own_heads * 64; i += THREADS)
        cp_async16(smem_address(head_steps) + i * 16, reinterpret_cast<const char*>(steps + batch_chunk * n_heads + first_head + i / 64) + i % 64 * 16);
    cp_async_commit();
    load(0);
    cp_async_wait<1>();
    __syncthreads();

    // Closes the books of a turn; a head in several turns is written at its last.
    Books books;
    books.open();
    auto close = [&](int turn) {
        int own = turn / p_blocks, head = first_head + own;
        const Findings& found = findings[turn % 2];
        if (turn % p_blocks == 0) books.open();
        Books::Found in{};
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            int t = 2 * lane + k;
            in.u[k] = found.u[0][t] + found.u[1][t], in.q[k] = in.u[k], in.r[k] = found.r[0][t] + found.r[1][t];
            #pragma unroll
            for (int block = 0; block < 4; block++)
                if (block >= t / 16) in.q[k] += found.q[block][t];
        }
        #pragma unroll
        for (int k = 0; k < 8; k++) in.states += found.states[k], in.skips += found.skips[k];
        books.add(head_steps[own], in, a[head], n_rows, activate);
        if (turn % p_blocks < p_blocks - 1) return;
        i64 all_chunks = (i64)batches * n_chunks;
        books.write(d_dt + ((i64)batch * seq_len + first) * n_heads + head, n_heads, n_rows, sums + batch_chunk * n_heads + head,
                    all_chunks * n_heads);
    };

    // Each kind of warp has its own walk over the heads, so that neither holds registers for the other; their barriers are the same.
    i64 stride = (i64)n_groups * d_state;
    i64 at = (((i64)part * batches + batch) * seq_len + first) * stride + (i64)group * d_state;
    Tile<CHUNK> d_scores_tile{stages};
    auto walk = [&](auto& own, bool closes) {
        own.begin(b_tile, c_tile, head_steps[0]);
        for (int turn = 0; turn < turns; turn++) {
            cp_async_wait<0>();
            __syncthreads();
            if (STAGES == 2) load(turn + 1);
            if (cuts_states(head_steps[turn / p_blocks])) {
                make_finite<THREADS>(stages + turn % STAGES * STAGE_BYTES + 2 * Tile<P>::bytes(CHUNK), 2 * Tile<N>::bytes(P));
                __syncthreads();
            }
            if (closes && turn > 0) close(turn - 1);
            int head = first_head + turn / p_blocks, p0 = turn % p_blocks * P;
            own.head(Stage(stages + turn % STAGES * STAGE_BYTES), b_tile, c_tile, head_steps[turn / p_blocks], findings[turn % 2],
                     d ? d[head] : 0.f, dx + head * dx_h + p0, dx_l, n_rows, min(P, d_head - p0));
            if (STAGES == 1) {
                __syncthreads();
                load(turn + 1);
            }
        }
        __syncthreads();
        own.share(d_scores_tile);
        if (closes) close(turns - 1);
        __syncthreads();
        own.finish(d_scores_tile, b_tile, c_tile);
    };
    // Both kinds of warps lie on all four schedulers, early rows beside late ones.
    int idx = warp % 8, row = idx < 4 ? idx : 7 - idx, half = idx / 4;
    if (warp < 8) {
        RowWarp own;
        own.row = row, own.half = half, own.lane = lane, own.g = lane / 4, own.t = lane % 4;
        walk(own, warp == 7);  // a warp without blocks of scores
        store_group(own.dc, dc, at, stride, row * 16, n_rows, half * (N / 2), d_state, n_parts == 1);
    } else {
        ColumnWarp own;
        own.row = row, own.half = half, own.lane = lane, own.g = lane / 4, own.t = lane % 4;
        walk(own, false);
        store_group(own.db, db, at, stride, row * 16, n_rows, half * (N / 2), d_state, n_parts == 1);
    }
}
