// The tiles of our products on Hopper.
//
// TILE_COLUMNS: 256 or 128.
#pragma once
#include "flowhn.cuh"

constexpr int TILE_ROWS = 128, TILE_COLS = TILE_COLUMNS, TILE_K = 64;

__device__ __forceinline__ int ceil_div(int n, int step) { return (n + step - 1) / step; }
