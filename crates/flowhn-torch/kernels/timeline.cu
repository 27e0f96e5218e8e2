// Marks on the device's clock: one thread writes the nanoseconds at which the stream gets there.
//
// times: [capacity], where the entry before the last holds the end of the last walk and the last one what lay between that and
// the next begin.
#include "flowhn.cuh"

extern "C" __global__ void timeline_begin(i64* times, int capacity) {
    i64 now = device_nanoseconds();
    times[0] = now;
    times[capacity - 1] = now - times[capacity - 2];
}

extern "C" __global__ void timeline_mark(i64* times, int idx) { times[idx] = device_nanoseconds(); }
