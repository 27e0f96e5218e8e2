// RMSNorm of the tokens of one or two routes, with the move of tokens and the residual addition beside it.
//
// Token j of route k stands at position p = positions_k[j] of its sequence. For each of the routes' tokens
//
//   s = x[b, p] + change       change: none, or that of the sequence, change[b, p], or of the branch, change_k[b, j]
//   r = 1 / sqrt(mean(s^2) + eps)
//   y = round(s r) weight_k    written to y[b, p] of a sequence or to y_k[b, j] of a branch
//
// where s is written to sum[b, p] if there is a change, and to sum_k[b, j] if the branches want their tokens as they are,
// which is gather + norm (no change, y of the branch), residual + split + norm (change of the sequence, y of the branches)
// and merge + residual + norm (change of the branches, y of the sequence). Backward, with g = dy weight_k and ds[b, p] and, where
// there is one, ds_k[b, j] the gradients that reach s on other ways:
//
//   dx[b, p] = ds + ds_k + r g - s r^3 mean(g s),   dweight = sum over tokens of dy s r
//
// and dx is written once more in the order of the branches where those want it.
//
// x, s, ds, ds_k, change, dy: [batch, tokens, d], last axis dense, f32 or bf16; weight: [d], f32; sum, sum_k, y, dx, dchange: contiguous;
// rstd: [batch, seq_len], f32; positions: [n], i64.
//
// Teams of threads hold rows in registers as in rms_norm.cu. The first n_blocks0 blocks take the tokens of route 0, the
// others those of route 1, so that a block has one weight and one part of its gradient. Backward the weight waits in shared memory, each
// thread's columns for itself; behind the last row the same memory adds up the teams' columns.
//
// With FP8_ROWS the forward pass leaves each branch's y rounded to fp8, y8_k [n_padded_k, d] and y8_t_k [d, n_padded_k], with the bits
// that a cast of y_k would have (fp8_rows.cuh); a block has so many neighbouring rows, and rows are aligned.
//
// X_KIND: dtype of all but weights and rstd; BRANCH_GRADS: whether there is ds_k; ROWS_ALIGNED: whether rows are read 16 bytes at a time;
// VECS: vectors a thread; MAX_THREADS, MIN_BLOCKS: bounds of the block and of the blocks of a multiprocessor; FP8_ROWS: the rows of a block
// of the forward pass alone, or 0.
#include "norm.cuh"
#include "smem.cuh"
#if FP8_ROWS
#include "fp8_rows.cuh"
#endif

typedef DtypeOf<X_KIND>::type X;

// The route that a block works for, and the rows of it that a team takes: team_idx, team_idx + n_teams, ... of `n_rows`.
struct Share {
    int route, n, n_rows, team_idx, n_teams;
    const i64* positions;
    __device__ __forceinline__ Share(const Team& team, const i64* positions0, const i64* positions1, int n0, int n1, int batch,
                                     int n_blocks0) {
        route = blockIdx.x >= n_blocks0;
        n = route ? n1 : n0;
        n_rows = batch * n;
        positions = route ? positions1 : positions0;
        int first = route ? n_blocks0 : 0, n_blocks = route ? gridDim.x - n_blocks0 : n_blocks0;
        team_idx = (blockIdx.x - first) * team.n + team.idx;
        n_teams = n_blocks * team.n;
    }
};

// One token: its sequence, its place in the branch and in the sequence.
struct Token {
    int b, j, p;
    __device__ __forceinline__ Token(const Share& share, int row) {
        b = (unsigned)row / (unsigned)share.n, j = row - b * share.n, p = (int)share.positions[j];
    }
};

#if FP8_ROWS == 0 || __CUDA_ARCH__ >= 890
extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
routed_norm_forward(const X* x, i64 x_batch, i64 x_token, const i64* positions0, const i64* positions1, int n0, int n1, int batch,
                    int seq_len, const X* change0, const X* change1, i64 change0_batch, i64 change0_token, i64 change1_batch,
                    i64 change1_token, int change_of_branch, const float* weight0, const float* weight1, X* sum, X* sum0, X* sum1, X* y0,
                    X* y1, int y_of_branch, float* rstd, int n_blocks0, int d, int team_size, float eps
#if FP8_ROWS
                    , unsigned char* y8_0, unsigned char* y8_t0, float* slot0, int n_padded0, unsigned char* y8_1, unsigned char* y8_t1,
                    float* slot1, int n_padded1
#endif
) {
    __shared__ float slots[64];
    Team team(team_size);
    TeamSum team_sum(slots);
    Width<ROWS_ALIGNED> width{d};
    Share share(team, positions0, positions1, n0, n1, batch, n_blocks0);
    const X* change = share.route ? change1 : change0;
    RowStrides change_strides = share.route ? RowStrides{change1_batch, change1_token} : RowStrides{change0_batch, change0_token};
#if FP8_ROWS
    int first_row = (blockIdx.x - (share.route ? n_blocks0 : 0)) * FP8_ROWS;
    Fp8Rows y(share.route ? y8_1 : y8_0, share.route ? y8_t1 : y8_t0, share.route ? slot1 : slot0, first_row, share.n_rows,
              share.route ? n_padded1 : n_padded0, d, 0, d);
    i64 row = first_row + team.idx, end = y.end(), step = team.n;
#else
    X* y = share.route ? y1 : y0;
    i64 row = share.team_idx, end = share.n_rows, step = share.n_teams;
#endif
    X* branch_sum = share.route ? sum1 : sum0;
    float w[VECS][VEC];
    load_weight(w, share.route ? weight1 : weight0, team, width);
    for (; row < end; row += step) {
        Token token(share, (int)row);
        i64 place = (i64)token.b * seq_len + token.p;
        Pack<X> s[VECS];
        load_row(s, x + RowStrides{x_batch, x_token}.start(token.b, token.p), team, width);
        if (change) {
            Pack<X> moved[VECS];
            load_row(moved, change + change_strides.start(token.b, change_of_branch ? token.j : token.p), team, width);
            add_row(s, moved, sum + place * d, team, width);
        }
        if (branch_sum) store_row(s, branch_sum + row * d, team, width);
        float r = 1.f / sqrtf(team_sum(sum_of_squares(s), team) / d + eps);
        if (rstd && team.t == 0) rstd[place] = r;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            Pack<X> out = normed_vector(s[v], r, w[v]);
#if FP8_ROWS
            y.put(out, (int)row, team.column(v));
#else
            store_vector(out, y + (y_of_branch ? row : place) * d, v, team, width);
#endif
        }
    }
#if FP8_ROWS
    pass_last_round(row - first_row, end - first_row, team);
    y.finish();
#endif
}
#endif

#if FP8_ROWS == 0
extern "C" __global__ void __launch_bounds__(MAX_THREADS, MIN_BLOCKS)
routed_norm_backward(const X* s, i64 s_batch, i64 s_token, const i64* positions0, const i64* positions1, int n0, int n1, int batch,
                     int seq_len, const X* dy0, const X* dy1, i64 dy0_batch, i64 dy0_token, i64 dy1_batch, i64 dy1_token,
                     int dy_of_branch, const X* ds, i64 ds_batch, i64 ds_token, const X* ds0, const X* ds1, i64 ds0_batch, i64 ds0_token,
                     i64 ds1_batch, i64 ds1_token, const float* weight0, const float* weight1, const float* rstd,
                     X* dx, X* dchange0, X* dchange1, float* partials, int n_blocks0, int d, int team_size) {
    __shared__ float slots[64];
    Team team(team_size);
    TeamSum team_sum(slots);
    Width<ROWS_ALIGNED> width{d};
    Share share(team, positions0, positions1, n0, n1, batch, n_blocks0);
    const X* dy = share.route ? dy1 : dy0;
    RowStrides dy_strides = share.route ? RowStrides{dy1_batch, dy1_token} : RowStrides{dy0_batch, dy0_token};
    const X* branch_ds = share.route ? ds1 : ds0;
    RowStrides branch_ds_strides = share.route ? RowStrides{ds1_batch, ds1_token} : RowStrides{ds0_batch, ds0_token};
    X* dchange = share.route ? dchange1 : dchange0;
    float* scratch = reinterpret_cast<float*>(shared_memory());
    OwnWeight<VECS> own_weight(scratch, share.route ? weight1 : weight0, team, width);
    float dw[VECS][VEC] = {};

    // The next token is on its way while this one is summed.
    struct Row {
        Pack<X> s[VECS], dy[VECS], ds[VECS];
#if BRANCH_GRADS
        Pack<X> branch_ds[VECS];
#endif
        float r;
        i64 place;
    } row, ahead;
    auto fetch = [&](int row_idx) {
        Token token(share, row_idx);
        ahead.place = (i64)token.b * seq_len + token.p;
        load_row(ahead.s, s + RowStrides{s_batch, s_token}.start(token.b, token.p), team, width);
        load_row(ahead.dy, dy + dy_strides.start(token.b, dy_of_branch ? token.j : token.p), team, width);
        load_row(ahead.ds, ds + RowStrides{ds_batch, ds_token}.start(token.b, token.p), team, width);
#if BRANCH_GRADS
        load_row(ahead.branch_ds, branch_ds + branch_ds_strides.start(token.b, token.j), team, width);
#endif
        ahead.r = rstd[ahead.place];
    };
    i64 current = share.team_idx;
    if (current < share.n_rows) fetch((int)current);
    for (; current < share.n_rows; current += share.n_teams) {
        row = ahead;
        if (current + share.n_teams < share.n_rows) fetch((int)(current + share.n_teams));
        float w[VECS][VEC];
        own_weight.get(w);
        float r = row.r, slope = team_sum(weighted_product(row.s, row.dy, w), team) * r * r * r / d;
        #pragma unroll
        for (int v = 0; v < VECS; v++) {
            float a[VEC];
            // Read again: kept, it would be registers that hold the next row.
            own_weight.get(w[v], v);
            norm_gradient(a, dw[v], row.s[v], row.dy[v], w[v], r, slope);
            add_vector(a, row.ds[v]);
#if BRANCH_GRADS
            add_vector(a, row.branch_ds[v]);
#endif
            Pack<X> out;
            out.set(a);
            store_vector(out, dx + row.place * d, v, team, width);
            if (dchange) store_vector(out, dchange + current * d, v, team, width);
        }
    }
    pass_last_round(current, share.n_rows, team);
    if (partials)
        write_block_columns(dw, partials + (i64)blockIdx.x * d, scratch, team, d);
}
#endif
