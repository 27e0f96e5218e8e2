// The tiles of our products on Hopper.
#pragma once
#include "flowhn.cuh"

// Columns of a tile: those of the LM head's unless the kernel says other.
#ifndef TILE_COLUMNS
#define TILE_COLUMNS 256
#endif
constexpr int TILE_ROWS = 128, TILE_COLS = TILE_COLUMNS, TILE_K = 64;

__device__ __forceinline__ int up(int n, int step) { return (n + step - 1) / step; }
