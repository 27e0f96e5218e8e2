// Tokens between a sequence and its branches, both branches in one launch.
//
// Token j of route k stands at position p = positions_k[j] of its sequence:
//
//   copy_tokens, to the branches:  branch_k[b, j] = sequence[b, p]
//   copy_tokens, to the sequence:  sequence[b, p] = branch_k[b, j]
//   merge_residual:                out[b, p] = x[b, p] + branch_k[b, j]
//   merge_sums:                    out[b, p] = branch_k[b, j] + change_k[b, j]
//
// and, where both routes are the whole sequence,
//
//   concat_sums:                   out[b, p] = [branch_0[b, p] + change_0[b, p], branch_1[b, p] + change_1[b, p]]
//
// All tensors: [batch, tokens, d], last axis dense, the others of any strides; out dense, of concat_sums [batch, tokens, 2 d]. Copies know no dtype: they move words of WORD
// bytes, in which strides and `n_words`, the length of a row, are counted; strides of the sums count elements.
//
// A warp takes one token, so that its position is read once and the rest are neighbouring words, or one half of a token of concat_sums.
// blockIdx.x counts 8 warps.
//
// WORD: 1, 2, 4, 8 or 16; X_KIND: dtype of the sums.
#include "rows.cuh"

typedef DtypeOf<X_KIND>::type X;

template <int N> struct Words;
template <> struct Words<1> { typedef unsigned char type; };
template <> struct Words<2> { typedef unsigned short type; };
template <> struct Words<4> { typedef unsigned type; };
template <> struct Words<8> { typedef uint2 type; };
template <> struct Words<16> { typedef uint4 type; };
typedef Words<WORD>::type Word;

// The token of this warp: route, sequence, place in the branch and in the sequence.
struct Token {
    int route, b, j, p;
    bool valid;
    __device__ __forceinline__ Token(const i64* positions0, const i64* positions1, int n0, int n1, int batch) {
        i64 warp = (i64)blockIdx.x * 8 + threadIdx.x / 32;
        int n = n0 + n1;
        valid = warp < (i64)batch * n;
        if (!valid) return;
        b = (int)((unsigned)warp / (unsigned)n);
        int t = (int)warp - b * n;
        route = t >= n0;
        j = route ? t - n0 : t;
        p = (int)(route ? positions1 : positions0)[j];
    }
};

extern "C" __global__ void __launch_bounds__(256)
copy_tokens(Word* sequence, Word* branch0, Word* branch1, i64 sequence_batch, i64 sequence_token, i64 branch0_batch,
            i64 branch0_token, i64 branch1_batch, i64 branch1_token, const i64* positions0, const i64* positions1, int n0, int n1,
            int batch, int n_words, int to_sequence) {
    Token token(positions0, positions1, n0, n1, batch);
    if (!token.valid) return;
    RowStrides strides = token.route ? RowStrides{branch1_batch, branch1_token} : RowStrides{branch0_batch, branch0_token};
    Word* in_branch = (token.route ? branch1 : branch0) + strides.start(token.b, token.j);
    Word* in_sequence = sequence + RowStrides{sequence_batch, sequence_token}.start(token.b, token.p);
    const Word* from = to_sequence ? in_branch : in_sequence;
    Word* to = to_sequence ? in_sequence : in_branch;
    #pragma unroll 4
    for (int i = threadIdx.x % 32; i < n_words; i += 32) to[i] = from[i];
}

// out = x + change, a row of d elements by a warp.
__device__ __forceinline__ void add_rows(const X* x, const X* change, X* out, int d, int aligned) {
    #pragma unroll 4
    for (int column = threadIdx.x % 32 * VEC; column < d; column += 32 * VEC) {
        Pack<X> a, b;
        if (aligned) a.load(x + column), b.load(change + column);
        else load_some(a, x + column, d - column), load_some(b, change + column, d - column);
        float s[VEC], t[VEC];
        a.get(s), b.get(t);
        #pragma unroll
        for (int i = 0; i < VEC; i++) s[i] += t[i];
        a.set(s);
        if (aligned) a.store(out + column);
        else store_some(a, out + column, d - column);
    }
}

extern "C" __global__ void __launch_bounds__(256)
merge_residual(const X* x, const X* branch0, const X* branch1, X* out, i64 x_batch, i64 x_token, i64 branch0_batch,
               i64 branch0_token, i64 branch1_batch, i64 branch1_token, const i64* positions0, const i64* positions1, int n0, int n1,
               int batch, int seq_len, int d, int aligned) {
    Token token(positions0, positions1, n0, n1, batch);
    if (!token.valid) return;
    RowStrides strides = token.route ? RowStrides{branch1_batch, branch1_token} : RowStrides{branch0_batch, branch0_token};
    const X* change = (token.route ? branch1 : branch0) + strides.start(token.b, token.j);
    x += RowStrides{x_batch, x_token}.start(token.b, token.p);
    add_rows(x, change, out + ((i64)token.b * seq_len + token.p) * d, d, aligned);
}

extern "C" __global__ void __launch_bounds__(256)
merge_sums(const X* branch0, const X* branch1, const X* change0, const X* change1, X* out, i64 branch0_batch, i64 branch0_token,
           i64 branch1_batch, i64 branch1_token, i64 change0_batch, i64 change0_token, i64 change1_batch, i64 change1_token,
           const i64* positions0, const i64* positions1, int n0, int n1, int batch, int seq_len, int d, int aligned) {
    Token token(positions0, positions1, n0, n1, batch);
    if (!token.valid) return;
    RowStrides strides = token.route ? RowStrides{branch1_batch, branch1_token} : RowStrides{branch0_batch, branch0_token};
    RowStrides changes = token.route ? RowStrides{change1_batch, change1_token} : RowStrides{change0_batch, change0_token};
    const X* branch = (token.route ? branch1 : branch0) + strides.start(token.b, token.j);
    const X* change = (token.route ? change1 : change0) + changes.start(token.b, token.j);
    add_rows(branch, change, out + ((i64)token.b * seq_len + token.p) * d, d, aligned);
}

extern "C" __global__ void __launch_bounds__(256)
concat_sums(const X* branch0, const X* branch1, const X* change0, const X* change1, X* out, i64 branch0_batch, i64 branch0_token,
            i64 branch1_batch, i64 branch1_token, i64 change0_batch, i64 change0_token, i64 change1_batch, i64 change1_token, int batch,
            int seq_len, int d, int aligned) {
    i64 half = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    if (half >= 2LL * batch * seq_len) return;
    bool is_second = half % 2;
    int token = (int)(half / 2), b = (int)((unsigned)token / (unsigned)seq_len), p = token - b * seq_len;
    RowStrides strides = is_second ? RowStrides{branch1_batch, branch1_token} : RowStrides{branch0_batch, branch0_token};
    RowStrides changes = is_second ? RowStrides{change1_batch, change1_token} : RowStrides{change0_batch, change0_token};
    add_rows((is_second ? branch1 : branch0) + strides.start(b, p), (is_second ? change1 : change0) + changes.start(b, p), out + half * d, d, aligned);
}
