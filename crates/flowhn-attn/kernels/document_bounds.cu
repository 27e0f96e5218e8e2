// The first and the last token of each token's document.
//
// segments: [batch, n], i64, contiguous, never less than before it in its row; first, last: [batch, n], i32. A thread has one token and looks for
// both by halves.
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

extern "C" __global__ void __launch_bounds__(256) document_bounds(const i64* segments, int* first, int* last, int n) {
    const int token = blockIdx.y * blockDim.x + threadIdx.x;
    if (token >= n) return;
    const i64 row = (i64)blockIdx.x * n, segment = segments[row + token];
    first[row + token] = first_place(0, token, [&](int i) { return segments[row + i] >= segment; });
    last[row + token] = first_place(token + 1, n, [&](int i) { return segments[row + i] > segment; }) - 1;
}
