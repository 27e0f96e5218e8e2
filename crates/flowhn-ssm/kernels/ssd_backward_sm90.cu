// ssd_backward.cu with Hopper's asynchronous products, for heads of up to 64 channels and states of up to 128, rows aligned.
//
// Formulas, shapes and arguments as there. A block takes one chunk and several heads of one group with two warpgroups: the first owns
// the rows i (dc, and dg, the gradient of the scores), the second the rows j (db and dx); warp w of each has rows 16 w .. 16 w + 15.
// Their sums over the heads stay in registers: 64 of dc and 32 of dg, 64 of db. Operands come straight from shared memory, but for
// those that take the weights of their tokens on the way: dy and x as left operands, and m^T, which is made in registers.
//
// What the exponents of the decays get through the state is dy . (c h^T) here, one more small product, so that dc adds up inside the
// products.
#include "ssd_backward.cuh"
#include "ssd_panels.cuh"

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

typedef DtypeOf<DT_KIND>::type DT;
constexpr int P = 64, N = 128, THREADS = 256, STAGES = 2;
constexpr int STAGE_BYTES = 6 * PANEL;  // x, dy, h, dh

// What the warps find out about one head, for the warp that closes its books.
struct Findings {
    float r[CHUNK];     // with the part through the state
    float q[4][CHUNK];  // by blocks of rows i
    float u[CHUNK];     // 2^(s_end - s_j) x_j . dh b_j
    float states[4], skips[4];
};

// The pair at columns 8 tile + 2 t of a panel of 64 columns.
__device__ __forceinline__ unsigned pair_at(const char* panel, int row, int tile) {
    return *reinterpret_cast<const unsigned*>(panel + row * 128 + (tile ^ (row & 7)) * 16 + (threadIdx.x & 3) * 4);
}

// 16 rows and columns 16 k .. 16 k + 15 of a panel as a left operand, rows times their weights.
__device__ __forceinline__ void load_rows(unsigned (&a)[4], Panels panel, int row, int k, float low, float high) {
    int lane = threadIdx.x & 31;
    ldmatrix_x4(a, panel.address(row + (lane & 15), k * 2 + (lane >> 4)));
    a[0] = scale_pair(a[0], low, low), a[2] = scale_pair(a[2], low, low);
    a[1] = scale_pair(a[1], high, high), a[3] = scale_pair(a[3], high, high);
}

template <int TILES> __device__ __forceinline__ void clear(float (&d)[TILES][4]) {
    #pragma unroll
    for (int n = 0; n < TILES; n++) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0.f;
}

// Writes a warp's 16 rows of db or dc.
__device__ __forceinline__ void store_group(const float (&grad)[16][4], void* out, i64 at, i64 stride, int row, int n_rows, int d_state,
                                            bool as_bf16) {
    int t = threadIdx.x & 3;
    #pragma unroll
    for (int k = 0; k < 2; k++) {
        int r = row + k * 8;
        if (as_bf16) {
            unsigned pairs[16];
            #pragma unroll
            for (int n = 0; n < 16; n++) pairs[n] = pack_bf16(grad[n][2 * k], grad[n][2 * k + 1]);
            store_row<16, true>(reinterpret_cast<bf16*>(out) + at + r * stride, 0, d_state, r < n_rows, pairs);
        } else if (r < n_rows) {
            float* line = reinterpret_cast<float*>(out) + at + r * stride;
            #pragma unroll
            for (int n = 0; n < 16; n++)
                if (n * 8 + 2 * t < d_state)
                    *reinterpret_cast<float2*>(line + n * 8 + 2 * t) = make_float2(grad[n][2 * k], grad[n][2 * k + 1]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) ssd_backward_sm90(
    const bf16* x, i64 x_b, i64 x_l, i64 x_h, const Steps* steps, const float* a,
    const bf16* b, i64 b_b, i64 b_l, i64 b_g, const bf16* c, i64 c_b, i64 c_l, i64 c_g,
    const float* d,
    const bf16* dy, i64 dy_b, i64 dy_l, i64 dy_h, const bf16* states, const bf16* d_states,
    bf16* dx, i64 dx_b, i64 dx_l, i64 dx_h, DT* d_dt, void* db, void* dc, float* sums,
    int batches, int seq_len, int n_heads, int n_groups, int d_head, int d_state, int p_blocks, int part_heads, int activate) {
    char* memory = shared_memory();
    unsigned base = smem_address(memory);
    Panels b_tile{base}, c_tile{base + 2 * PANEL};
    constexpr int STAGES_AT = 4 * PANEL;
    Findings* findings = reinterpret_cast<Findings*>(memory + STAGES_AT + STAGES * STAGE_BYTES);
    Steps* head_steps = reinterpret_cast<Steps*>(findings + 2);

    int lane = threadIdx.x & 31, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4, row = warp * 16 + g;
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
            unsigned stage = base + STAGES_AT + turn % STAGES * STAGE_BYTES;
            int head = first_head + turn / p_blocks, p0 = turn % p_blocks * P, n_p = min(P, d_head - p0);
            i64 state_at = ((i64)head * d_head + p0) * d_state;
            load_panels<P, THREADS>(Panels{stage}, x + head * x_h + p0, x_l, n_rows, n_p);
            load_panels<P, THREADS>(Panels{stage + PANEL}, dy + head * dy_h + p0, dy_l, n_rows, n_p);
            load_panels<N, THREADS>(Panels{stage + 2 * PANEL}, states + state_at, d_state, n_p, d_state);
            load_panels<N, THREADS>(Panels{stage + 4 * PANEL}, d_states + state_at, d_state, n_p, d_state);
        }
        cp_async_commit();
    };
    load_panels<N, THREADS>(b_tile, b + batch * b_b + group * b_g + first * b_l, b_l, n_rows, d_state);
    load_panels<N, THREADS>(c_tile, c + batch * c_b + group * c_g + first * c_l, c_l, n_rows, d_state);
    for (int i = threadIdx.x; i < own_heads * 64; i += THREADS)
        cp_async16(smem_address(head_steps) + i * 16,
                   reinterpret_cast<const char*>(steps + batch_chunk * n_heads + first_head + i / 64) + i % 64 * 16);
    cp_async_commit();
    load(0);
    cp_async_wait<1>();
    wgmma_publish();
    __syncthreads();

    i64 stride = (i64)n_groups * d_state;
    // Waits for the operands of a turn, and starts to fetch those of the next.
    auto arrive = [&](int turn) {
        cp_async_wait<0>();
        wgmma_publish();
        __syncthreads();
        load(turn + 1);
        if (!cuts_states(head_steps[turn / p_blocks])) return;
        make_finite<THREADS>(memory + STAGES_AT + turn % STAGES * STAGE_BYTES + 2 * PANEL, 4 * PANEL);
        wgmma_publish();
        __syncthreads();
    };
    // Where the block's rows of db and dc go. Worked out at the end, for no register is left that could hold it until then.
    auto at = [&] {
        int block = block_index();
        return (((i64)(block % n_parts) * batches + batch) * seq_len + first) * stride + (i64)(block / n_parts % n_groups) * d_state;
    };
    // The gradient of the scores as an operand, at the end: rows i.
    Panels d_scores_tile{base + STAGES_AT};
    char* d_scores_bytes = memory + STAGES_AT;

    if (threadIdx.x < 128) {
        float dc_rows[16][4], d_scores[8][4], scores[8][4];
        clear(dc_rows);
        clear(d_scores);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < N / 16; k++) wgmma_64x64(scores, c_tile.along(k), b_tile.along(k), k > 0);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(scores);
        // Those that no token sees may be infinite, where gradients of 0 meet them.
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int k = 0; k < 4; k++) {
                int i = row + k / 2 * 8, j = n * 8 + 2 * t + k % 2;
                if (j > i || j < head_steps[0].begin[i]) scores[n][k] = 0.f;
            }
        for (int turn = 0; turn < turns; turn++) {
            arrive(turn);
            unsigned stage = base + STAGES_AT + turn % STAGES * STAGE_BYTES;
            const char* bytes = memory + STAGES_AT + turn % STAGES * STAGE_BYTES;
            Panels x_tile{stage}, dy_tile{stage + PANEL}, h_tile{stage + 2 * PANEL};
            const Steps& own = head_steps[turn / p_blocks];
            Findings& out = findings[turn % 2];
            float s_row[2] = {own.s[row], own.s[row + 8]}, keep[2] = {own.from_start[row], own.from_start[row + 8]};
            int begin[2] = {own.begin[row], own.begin[row + 8]};

            float p[8][4];
            wgmma_fence();
            #pragma unroll
            for (int k = 0; k < P / 16; k++) wgmma_64x64(p, dy_tile.along(k), x_tile.along(k), k > 0);
            wgmma_commit();
            unsigned dy_rows[4][4];
            #pragma unroll
            for (int k = 0; k < 4; k++) load_rows(dy_rows[k], dy_tile, warp * 16, k, keep[0], keep[1]);
            wgmma_wait<0>();
            wgmma_hold(p);
            wgmma_hold(dc_rows);
            wgmma_fence();
            #pragma unroll
            for (int k = 0; k < P / 16; k++) wgmma_64x128(dc_rows, dy_rows[k], h_tile.across(k), true);
            wgmma_commit();

            float r[2] = {0.f, 0.f};
            #pragma unroll
            for (int n = 0; n < 8; n++) {
                if (n * 8 > warp * 16 + 15) continue;
                int j0 = n * 8 + 2 * t;
                float2 s_col = *reinterpret_cast<const float2*>(&own.s[j0]);
                float2 dt_col = *reinterpret_cast<const float2*>(&own.dt[j0]);
                float q[2] = {0.f, 0.f};
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    float dt = k % 2 ? dt_col.y : dt_col.x;
                    float decay = ex2(s_row[k / 2] - (k % 2 ? s_col.y : s_col.x));
                    int j = j0 + k % 2;
                    float by_score = j <= row + k / 2 * 8 && j >= begin[k / 2] ? p[n][k] * decay : 0.f;
                    d_scores[n][k] += by_score * dt;
                    float by_decay = by_score * scores[n][k];
                    r[k / 2] += by_decay * dt;
                    q[k % 2] += by_decay;
                }
                #pragma unroll
                for (int k = 0; k < 2; k++) {
                    q[k] = sum_rows(q[k]);
                    if (g == 0) out.q[warp][j0 + k] = q[k];
                }
            }
            wgmma_wait<0>();
            wgmma_hold(dc_rows);
            // What y gets from the state, in the registers of p.
            wgmma_hold(p);
            wgmma_fence();
            #pragma unroll
            for (int k = 0; k < N / 16; k++) wgmma_64x64(p, c_tile.along(k), h_tile.along(k), k > 0);
            wgmma_commit();
            // <dh, h> meanwhile; both tiles are swizzled alike.
            float product = 0.f;
            #pragma unroll 4
            for (int v = threadIdx.x; v < P * N / 8; v += 128) {
                float h[8], dh[8];
                load_vec(h, reinterpret_cast<const bf16*>(bytes + 2 * PANEL) + v * 8);
                load_vec(dh, reinterpret_cast<const bf16*>(bytes + 4 * PANEL) + v * 8);
                #pragma unroll
                for (int k = 0; k < 8; k++) product += h[k] * dh[k];
            }
            product = warp_sum(product);
            if (lane == 0) out.states[warp] = product;
            wgmma_wait<0>();
            wgmma_hold(p);
            #pragma unroll
            for (int k = 0; k < 2; k++) {
                float sum = 0.f;
                #pragma unroll
                for (int n = 0; n < 8; n++) {
                    unsigned v = pair_at(bytes + PANEL, row + k * 8, n);
                    sum += p[n][2 * k] * low_bf16(v) + p[n][2 * k + 1] * high_bf16(v);
                }
                r[k] = sum_quad(r[k] + left_by(keep[k], sum));
                if (t == 0) out.r[row + k * 8] = r[k];
            }
        }
        __syncthreads();
        #pragma unroll
        for (int n = 0; n < 8; n++)
            #pragma unroll
            for (int k = 0; k < 2; k++)
                *reinterpret_cast<unsigned*>(d_scores_bytes + (row + k * 8) * 128 + (n ^ g) * 16 + t * 4) =
                    pack_bf16(d_scores[n][2 * k], d_scores[n][2 * k + 1]);
        wgmma_publish();
        __syncthreads();
        unsigned left[4][4];
        #pragma unroll
        for (int k = 0; k < 4; k++)
            ldmatrix_x4(left[k], d_scores_tile.address(warp * 16 + (lane & 15), k * 2 + (lane >> 4)));
        wgmma_hold(dc_rows);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 4; k++) wgmma_64x128(dc_rows, left[k], b_tile.across(k), true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(dc_rows);
        store_group(dc_rows, dc, at(), stride, row, n_rows, d_state, n_parts == 1);
        return;
    }

    float db_rows[16][4], scores[8][4];
    clear(db_rows);
    wgmma_fence();
    #pragma unroll
    for (int k = 0; k < N / 16; k++) wgmma_64x64(scores, b_tile.along(k), c_tile.along(k), k > 0);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(scores);

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
            in.u[k] = in.q[k] = found.u[t], in.r[k] = found.r[t];
            #pragma unroll
            for (int block = 0; block < 4; block++)
                if (block >= t / 16) in.q[k] += found.q[block][t];
        }
        #pragma unroll
        for (int k = 0; k < 4; k++) in.states += found.states[k], in.skips += found.skips[k];
        books.add(head_steps[own], in, a[head], n_rows, activate);
        if (turn % p_blocks < p_blocks - 1) return;
        i64 all_chunks = (i64)batches * n_chunks;
        books.write(d_dt + ((i64)batch * seq_len + first) * n_heads + head, n_heads, n_rows, sums + batch_chunk * n_heads + head,
                    all_chunks * n_heads);
    };

    constexpr int CLOSER = 3;  // the warp with the fewest blocks of m
    for (int turn = 0; turn < turns; turn++) {
        arrive(turn);
        unsigned stage = base + STAGES_AT + turn % STAGES * STAGE_BYTES;
        const char* bytes = memory + STAGES_AT + turn % STAGES * STAGE_BYTES;
        Panels x_tile{stage}, dy_tile{stage + PANEL}, dh_tile{stage + 4 * PANEL};
        const Steps& own = head_steps[turn / p_blocks];
        Findings& out = findings[turn % 2];
        int head = first_head + turn / p_blocks, p0 = turn % p_blocks * P;
        float skip = d ? d[head] : 0.f;

        float grad[8][4];
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < N / 16; k++) wgmma_64x64(grad, b_tile.along(k), dh_tile.along(k), k > 0);
        wgmma_commit();
        float s_row[2] = {own.s[row], own.s[row + 8]}, dt[2] = {own.dt[row], own.dt[row + 8]}, end = own.s[CHUNK - 1];
        int ends[2] = {own.end[row], own.end[row + 8]};
        float to_end[2] = {ends[0] == CHUNK ? ex2(end - s_row[0]) : 0.f, ends[1] == CHUNK ? ex2(end - s_row[1]) : 0.f};
        float weight[2] = {to_end[0] * dt[0], to_end[1] * dt[1]};
        unsigned left[4][4];
        #pragma unroll
        for (int k = 0; k < 4; k++) load_rows(left[k], x_tile, warp * 16, k, weight[0], weight[1]);
        wgmma_hold(db_rows);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < P / 16; k++) wgmma_64x128(db_rows, left[k], dh_tile.across(k), true);
        wgmma_commit();
        if (warp == CLOSER && turn > 0) close(turn - 1);
        wgmma_wait<1>();
        wgmma_hold(grad);

        float skips = 0.f;
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            float u = 0.f;
            #pragma unroll
            for (int n = 0; n < 8; n++) {
                unsigned xs = pair_at(bytes, row + k * 8, n), dys = pair_at(bytes + PANEL, row + k * 8, n);
                u += grad[n][2 * k] * low_bf16(xs) + grad[n][2 * k + 1] * high_bf16(xs);
                skips += low_bf16(dys) * low_bf16(xs) + high_bf16(dys) * high_bf16(xs);
                grad[n][2 * k] = left_by(weight[k], grad[n][2 * k]) + skip * low_bf16(dys);
                grad[n][2 * k + 1] = left_by(weight[k], grad[n][2 * k + 1]) + skip * high_bf16(dys);
            }
            u = left_by(to_end[k], sum_quad(u));
            if (t == 0) out.u[row + k * 8] = u;
        }
        skips = warp_sum(skips);
        if (lane == 0) out.skips[warp] = skips;

        unsigned mix[4][4];
        #pragma unroll
        for (int n = 0; n < 8; n++) {
            float m[4] = {0.f, 0.f, 0.f, 0.f};
            if (n * 8 + 7 >= warp * 16) {
                int i0 = n * 8 + 2 * t;
                float2 s_col = *reinterpret_cast<const float2*>(&own.s[i0]);
                #pragma unroll
                for (int k = 0; k < 4; k++) {
                    float decay = ex2((k % 2 ? s_col.y : s_col.x) - s_row[k / 2]);
                    int i = i0 + k % 2;
                    m[k] = i >= row + k / 2 * 8 && i < ends[k / 2] ? scores[n][k] * decay * dt[k / 2] : 0.f;
                }
            }
            mix[n / 2][n % 2 * 2] = pack_bf16(m[0], m[1]), mix[n / 2][n % 2 * 2 + 1] = pack_bf16(m[2], m[3]);
        }
        wgmma_wait<0>();
        wgmma_hold(db_rows);
        wgmma_hold(grad);
        wgmma_fence();
        #pragma unroll
        for (int k = 0; k < 4; k++) wgmma_64x64(grad, mix[k], dy_tile.across(k), true);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(grad);
        #pragma unroll
        for (int k = 0; k < 2; k++) {
            unsigned pairs[8];
            #pragma unroll
            for (int n = 0; n < 8; n++) pairs[n] = pack_bf16(grad[n][2 * k], grad[n][2 * k + 1]);
            store_row<8, true>(dx + (row + k * 8) * dx_l + head * dx_h + p0, 0, min(P, d_head - p0), row + k * 8 < n_rows, pairs);
        }
    }
    __syncthreads();
    if (warp == CLOSER) close(turns - 1);
    __syncthreads();
    // dg^T through registers.
    unsigned left[4][4];
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        int matrix = lane >> 3;
        ldmatrix_x4_trans(left[k], d_scores_tile.address(k * 16 + (lane & 7) + (matrix >> 1) * 8, warp * 2 + (matrix & 1)));
    }
    wgmma_hold(db_rows);
    wgmma_fence();
    #pragma unroll
    for (int k = 0; k < 4; k++) wgmma_64x128(db_rows, left[k], c_tile.across(k), true);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(db_rows);
    store_group(db_rows, db, at(), stride, row, n_rows, d_state, n_parts == 1);
}

#endif
