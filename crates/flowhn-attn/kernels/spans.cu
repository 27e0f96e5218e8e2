// What causal queries see of the keys, and who sees a key, where documents stay apart or a window slides over them: neighbours without gaps.
//
// segments: [batch, n], i64, contiguous, never less than before it in its row, or none; window: the positions that a query sees, its own
// included, or 0 for all of them. first_keys, last_queries: [batch, n_padded], i32, behind n as of the last. A token whose id is less than
// that before it has -1 as its first key, which makes what it finds NaN. A thread has one token and looks for the ends of its document by
// halves.
#include "flowhn.cuh"

// The first place in [low, high) where `is_there`, which stays true from then on; `high` if there is none.
template <class There> __device__ __forceinline__ int first_place(int low, int high, There is_there) {
    while (low < high) {
        int middle = low + (high - low) / 2;
        if (is_there(middle)) high = middle;
        else low = middle + 1;
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(256) spans(const i64* segments, int* first_keys, int* last_queries, int n, int n_padded, int window) {
    const int place = blockIdx.y * blockDim.x + threadIdx.x, token = min(place, n - 1);
    if (place >= n_padded) return;
    const i64 row = (i64)blockIdx.x * n;
    int first = 0, last = n - 1;
    if (segments) {
        const i64 segment = segments[row + token];
        first = first_place(0, token, [&](int i) { return segments[row + i] >= segment; });
        last = first_place(token + 1, n, [&](int i) { return segments[row + i] > segment; }) - 1;
    }
    if (window > 0) first = max(first, token - window + 1), last = token <= last - window ? token + window - 1 : last;
    const bool falls = segments && token > 0 && segments[row + token] < segments[row + token - 1];
    first_keys[(i64)blockIdx.x * n_padded + place] = falls ? -1 : first;
    last_queries[(i64)blockIdx.x * n_padded + place] = last;
}
