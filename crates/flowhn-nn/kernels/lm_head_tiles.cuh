// The tiles of the LM head's first product on Hopper.
#pragma once
#include "flowhn.cuh"

constexpr int TILE_ROWS = 128, TILE_COLS = 256, TILE_K = 64;

__device__ __forceinline__ int up(int n, int step) { return (n + step - 1) / step; }
