// The causal depthwise convolution with its activation, forward and backward.
//
//   s_t = bias + sum_i weight_i x_{t - (K - 1) + i},   y_t = act(s_t)
//
//   x, y, dy, dx     [batch, seq_len, channels], f32 or bf16; batch and token strides are free, channels lie side by side
//   weight, bias     [channels, K], [channels], f32; bias may be null (zeros)
//   initial, final   [batch, K - 1, channels], f32: the inputs before the first and after the last token, oldest first
//   reset            [batch, seq_len], bytes: 1 hides everything before that token from it and all later ones; may be null
//
// A warp takes 32 V neighbouring channels and a run of tokens; a thread V channels, loaded as one word. It walks along the run
// with the last K - 1 inputs in registers, so that each input is read once (but for the K - 1 tokens before a run, which the
// neighbouring warp has just read and the cache still holds).
//
// The forward is short: a run is U tokens, all loaded before the first is used, and many blocks follow each other as in a copy
// (only with many taps is a run several times U). The backward's runs are long; its tokens are copied U ahead into a ring in shared
// memory, where each thread reads only what it copied itself: enough bytes are under way without a barrier and without registers
// that wait for them.
//
// The backward recomputes s_t, and keeps beside the inputs the K - 1 gradients of inputs that later tokens still add to. One pass
// thus reads x and dy once and writes dx once. The gradients of weight and bias stay in registers along the run, are added up over
// the warps of a block, and written as one part a block, which `causal_conv1d_parts` adds in order.
//
// A sequence of one token may have one tensor as initial and final: a thread reads the inputs before its channels' token before it
// writes any, and nobody else has these channels.
//
// weight and bias begin at multiples of 16 bytes.
//
// Variants: X_KIND 0 f32, 1 bf16; D_CONV taps (K); VEC channels a thread (V); AHEAD tokens (U); SILU 0 or 1; RESETS 0 without
// them; N_WARPS of a block; N_BLOCKS and FORWARD_BLOCKS that a multiprocessor must hold of the backward and of the forward.
#include "flowhn.cuh"
#include "smem.cuh"

typedef DtypeOf<X_KIND>::type T;
constexpr int K = D_CONV, V = VEC, U = AHEAD, WARPS = N_WARPS;

// V elements as they lie in memory, so that a load ahead takes few registers.
template <class T, int N> struct Word { typedef T type; };
template <> struct Word<bf16, 2> { typedef unsigned type; };
template <> struct Word<bf16, 4> { typedef uint2 type; };
template <> struct Word<bf16, 8> { typedef uint4 type; };
template <> struct Word<float, 2> { typedef float2 type; };
template <> struct Word<float, 4> { typedef float4 type; };
typedef Word<T, V>::type Raw;

// U tokens of N tensors on their way to this thread. Words of less than 4 bytes cannot be copied; they are loaded when needed.
template <int N> struct Ring {
    static constexpr bool COPIES = sizeof(Raw) >= 4;
    Raw* mine;

    __device__ __forceinline__ Ring() : mine(reinterpret_cast<Raw*>(shared_memory()) + threadIdx.x) {}

    // Starts copying a token of tensor `tensor` into a slot.
    __device__ __forceinline__ void copy(int slot, int tensor, const T* from) {
        if constexpr (COPIES) {
            unsigned to = smem_address(mine + (slot * N + tensor) * 32 * WARPS);
            if constexpr (sizeof(Raw) == 16) cp_async16(to, from);
            else if constexpr (sizeof(Raw) == 8) cp_async8(to, from);
            else cp_async4(to, from);
        }
    }

    // Ends the copies of a token, also where there are none: they are counted.
    __device__ __forceinline__ void commit() {
        if constexpr (COPIES) cp_async_commit();
    }

    // Waits for the oldest of U tokens.
    __device__ __forceinline__ void wait() {
        if constexpr (COPIES) cp_async_wait<U - 1>();
    }

    __device__ __forceinline__ Raw read(int slot, int tensor, const T* from) const {
        if constexpr (COPIES) return mine[(slot * N + tensor) * 32 * WARPS];
        return *reinterpret_cast<const Raw*>(from);
    }
};

__device__ __forceinline__ Raw load_raw(const T* p) { return *reinterpret_cast<const Raw*>(p); }

__device__ __forceinline__ void widen(float (&out)[V], const Raw& raw) { load_vec<V>(out, reinterpret_cast<const T*>(&raw)); }

// sigmoid(x): exact for f32; where the result is rounded to bf16, the approximations of the special function unit suffice.
__device__ __forceinline__ float gate(float x) {
    if constexpr (X_KIND == 1) return rcp(1.f + ex2(-LOG2_E * x));
    return sigmoid(x);
}

__device__ __forceinline__ float activate(float sum) { return SILU ? sum * gate(sum) : sum; }

__device__ __forceinline__ float activate_grad(float sum) {
    if constexpr (SILU == 0) return 1.f;
    float s = gate(sum);
    return s * (1.f + sum * (1.f - s));
}

// Which channels and tokens this thread has.
struct Place {
    int batch, channel, first, end, part, lane, warp;
    bool active;

    __device__ __forceinline__ Place(int seq_len, int channels, int run) {
        lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        int n_columns = (channels + 32 * V - 1) / (32 * V), n_blocks = (seq_len + WARPS * run - 1) / (WARPS * run);
        part = blockIdx.x / n_columns;
        batch = part / n_blocks;
        channel = (blockIdx.x % n_columns * 32 + lane) * V;
        first = (part % n_blocks * WARPS + warp) * run;
        end = min(first + run, seq_len);
        active = channel < channels && first < seq_len;
    }
};

// The taps of V channels, the last K - 1 inputs, and how many of them the present token sees.
struct Window {
    float taps[K][V], bias[V], inputs[K][V];
    int n_visible;

    __device__ __forceinline__ void load_taps(const float* weight, const float* bias_e, int channel) {
        float side_by_side[V * K];
        load_vec<V * K>(side_by_side, weight + (i64)channel * K);
        #pragma unroll
        for (int v = 0; v < V; v++) {
            bias[v] = 0.f;
            #pragma unroll
            for (int k = 0; k < K; k++) taps[k][v] = side_by_side[v * K + k];
        }
        if (bias_e) load_vec<V>(bias, bias_e + channel);
    }

    // Takes the input of the next token.
    __device__ __forceinline__ void push(const float (&x)[V], bool reset) {
        if constexpr (RESETS) n_visible = reset ? 0 : min(n_visible + 1, K - 1);
        #pragma unroll
        for (int v = 0; v < V; v++) {
            #pragma unroll
            for (int k = 0; k < K - 1; k++) inputs[k][v] = RESETS && reset ? 0.f : inputs[k + 1][v];
            inputs[K - 1][v] = x[v];
        }
    }

    // Reads the inputs before token `first`: earlier tokens, in front of them the initial state.
    __device__ __forceinline__ void load_before(const T* x, i64 x_token, const float* initial, const unsigned char* reset,
                                                int first, int channels) {
        n_visible = K - 1;
        #pragma unroll
        for (int k = 0; k < K; k++) {
            #pragma unroll
            for (int v = 0; v < V; v++) inputs[k][v] = 0.f;
        }
        #pragma unroll
        for (int k = 0; k < K - 1; k++) {
            int token = first - (K - 1) + k;
            float input[V] = {};
            if (token >= 0) {
                widen(input, load_raw(x + token * x_token));
            } else if (initial) {
                #pragma unroll
                for (int v = 0; v < V; v++) input[v] = initial[(i64)(token + K - 1) * channels + v];
            }
            push(input, RESETS && token >= 0 && reset[token]);
        }
    }

    __device__ __forceinline__ float sum(int v) const {
        float sum = bias[v];
        #pragma unroll
        for (int k = 0; k < K; k++) sum = fmaf(taps[k][v], inputs[k][v], sum);
        return sum;
    }
};

// With few taps a run of the forward is one group of U tokens; with many, what a run reads again before it would cost too much.
constexpr bool ONE_GROUP = K <= 4;

extern "C" __global__ void __launch_bounds__(32 * WARPS, FORWARD_BLOCKS) causal_conv1d_forward(
    const T* __restrict__ x, i64 x_batch, i64 x_token, const float* __restrict__ weight, const float* __restrict__ bias,
    const float* initial, const unsigned char* __restrict__ reset, T* __restrict__ y, i64 y_batch, i64 y_token,
    float* final_state, int seq_len, int channels, int run) {
    Place place(seq_len, channels, run);
    if (!place.active) return;
    i64 state = (i64)place.batch * (K - 1) * channels + place.channel;
    x += place.batch * x_batch + place.channel;
    y += place.batch * y_batch + place.channel;
    if (initial) initial += state;
    if (RESETS) reset += (i64)place.batch * seq_len;

    Raw group[U];
    auto load_group = [&](int token) {
        #pragma unroll
        for (int u = 0; u < U; u++)
            if (token + u < place.end) group[u] = load_raw(x + (token + u) * x_token);
    };
    load_group(place.first);
    Window window;
    window.load_taps(weight, bias, place.channel);
    window.load_before(x, x_token, initial, reset, place.first, channels);

    auto step = [&](const Raw& raw, int token) {
        float input[V], out[V];
        widen(input, raw);
        window.push(input, RESETS && reset[token]);
        #pragma unroll
        for (int v = 0; v < V; v++) out[v] = activate(window.sum(v));
        store_vec<V>(y + token * y_token, out);
    };
    #pragma unroll 1
    for (int token = place.first;;) {
        if (token + U <= place.end) {
            #pragma unroll
            for (int u = 0; u < U; u++) step(group[u], token + u);
        } else {
            #pragma unroll
            for (int u = 0; u < U; u++)
                if (token + u < place.end) step(group[u], token + u);
        }
        token += U;
        if (ONE_GROUP || token >= place.end) break;
        load_group(token);
    }

    if (place.end == seq_len) {
        #pragma unroll
        for (int k = 0; k < K - 1; k++) {
            #pragma unroll
            for (int v = 0; v < V; v++) final_state[state + (i64)k * channels + v] = window.inputs[k + 1][v];
        }
    }
}

// parts: [blocks along the tokens of all sequences, K + 1, channels], taps then bias; null if nobody wants them.
// dx and dinitial may be null too; dfinal has any strides.
extern "C" __global__ void __launch_bounds__(32 * WARPS, N_BLOCKS) causal_conv1d_backward(
    const T* __restrict__ x, i64 x_batch, i64 x_token, const T* __restrict__ dy, i64 dy_batch, i64 dy_token,
    const float* __restrict__ weight, const float* __restrict__ bias, const float* __restrict__ initial,
    const unsigned char* __restrict__ reset, const float* __restrict__ dfinal, i64 dfinal_batch, i64 dfinal_row,
    i64 dfinal_channel, T* __restrict__ dx, i64 dx_batch, i64 dx_token, float* __restrict__ dinitial,
    float* __restrict__ parts, int seq_len, int channels, int run) {
    __align__(16) __shared__ float shared[WARPS][32 * V];
    Place place(seq_len, channels, run);
    float dtaps[K][V] = {}, dbias[V] = {};

    if (place.active) {
        i64 state = (i64)place.batch * (K - 1) * channels + place.channel;
        x += place.batch * x_batch + place.channel;
        dy += place.batch * dy_batch + place.channel;
        if (dx) dx += place.batch * dx_batch + place.channel;
        if (initial) initial += state;
        if (RESETS) reset += (i64)place.batch * seq_len;

        // The K - 1 tokens after the run still see its inputs.
        const int stop = min(place.end + K - 1, seq_len);
        Ring<2> ring;
        auto copy_ahead = [&](int slot, int token) {
            if (token < stop) ring.copy(slot, 0, x + token * x_token), ring.copy(slot, 1, dy + token * dy_token);
            ring.commit();
        };
        #pragma unroll
        for (int u = 0; u < U; u++) copy_ahead(u, place.first + u);

        Window window;
        window.load_taps(weight, bias, place.channel);
        window.load_before(x, x_token, initial, reset, place.first, channels);

        // The gradients of the last K inputs, newest first.
        float pending[K][V] = {};

        // Writes the gradient of input `token`, which nothing adds to any more; those before the run are another warp's.
        auto emit = [&](const float (&gradient)[V], int token) {
            if (token >= 0) {
                if (dx && token >= place.first && token < place.end) store_vec<V>(dx + token * dx_token, gradient);
            } else if (dinitial && place.first == 0) {
                #pragma unroll
                for (int v = 0; v < V; v++) dinitial[state + (i64)(token + K - 1) * channels + v] = gradient[v];
            }
        };

        // One token; past the end of the run only the gradients of inputs before it are wanted.
        auto step = [&](int slot, int token, bool own) {
            ring.wait();
            float input[V], dsum[V];
            widen(input, ring.read(slot, 0, x + token * x_token));
            widen(dsum, ring.read(slot, 1, dy + token * dy_token));
            copy_ahead(slot, token + U);
            window.push(input, RESETS && reset[token]);
            #pragma unroll
            for (int v = 0; v < V; v++) {
                if constexpr (SILU) dsum[v] *= activate_grad(window.sum(v));
                if (own) {
                    dbias[v] += dsum[v];
                    #pragma unroll
                    for (int k = 0; k < K; k++) dtaps[k][v] = fmaf(dsum[v], window.inputs[k][v], dtaps[k][v]);
                }
                #pragma unroll
                for (int k = K - 1; k > 0; k--) pending[k][v] = pending[k - 1][v];
                pending[0][v] = 0.f;
            }
            #pragma unroll
            for (int k = 0; k < K; k++) {
                if (RESETS == 0 || k <= window.n_visible) {
                    #pragma unroll
                    for (int v = 0; v < V; v++) pending[k][v] = fmaf(window.taps[K - 1 - k][v], dsum[v], pending[k][v]);
                }
            }
            emit(pending[K - 1], token - (K - 1));
        };

        int token = place.first;
        #pragma unroll 1
        for (; token + U <= place.end; token += U) {
            #pragma unroll
            for (int u = 0; u < U; u++) step(u, token + u, true);
        }
        #pragma unroll 1
        for (int u = 0; token < stop; u++, token++) step(u % U, token, token < place.end);

        if (token == seq_len) {
            // No token follows; the final state adds to the inputs that it shows.
            #pragma unroll
            for (int k = K - 2; k >= 0; k--) {
                if (dfinal && (RESETS == 0 || k <= window.n_visible)) {
                    const float* gradient = dfinal + place.batch * dfinal_batch + (K - 2 - k) * dfinal_row;
                    #pragma unroll
                    for (int v = 0; v < V; v++) pending[k][v] += gradient[(place.channel + v) * dfinal_channel];
                }
                emit(pending[k], seq_len - 1 - k);
            }
        }
    }

    if (!parts) return;
    int column = place.channel - place.lane * V;
    #pragma unroll
    for (int k = 0; k <= K; k++) {
        store_vec<V>(&shared[place.warp][place.lane * V], k < K ? dtaps[k < K ? k : 0] : dbias);
        __syncthreads();
        for (int c = threadIdx.x; c < 32 * V && column + c < channels; c += 32 * WARPS) {
            float sum = 0.f;
            #pragma unroll
            for (int warp = 0; warp < WARPS; warp++) sum += shared[warp][c];
            parts[((i64)place.part * (K + 1) + k) * channels + column + c] = sum;
        }
        __syncthreads();
    }
}

// Adds the parts of the gradients of taps and bias in a fixed order. A block takes 32 channels of one tap (the last row of the
// grid: of the bias); its warp g the parts g, g + 8, ...
extern "C" __global__ void __launch_bounds__(256) causal_conv1d_parts(
    const float* __restrict__ parts, float* __restrict__ dweight, float* __restrict__ dbias, int n_parts, int channels) {
    __shared__ float shared[8][32];
    int lane = threadIdx.x % 32, group = threadIdx.x / 32, channel = blockIdx.x * 32 + lane, k = blockIdx.y;
    float sum = 0.f;
    if (channel < channels) {
        #pragma unroll 4
        for (int part = group; part < n_parts; part += 8) sum += parts[((i64)part * (K + 1) + k) * channels + channel];
    }
    shared[group][lane] = sum;
    __syncthreads();
    if (group == 0 && channel < channels) {
        sum = 0.f;
        #pragma unroll
        for (int g = 0; g < 8; g++) sum += shared[g][lane];
        if (k < K) {
            if (dweight) dweight[(i64)channel * K + k] = sum;
        } else if (dbias) {
            dbias[channel] = sum;
        }
    }
}
