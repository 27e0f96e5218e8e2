// The tiles in which the LM head's product on Hopper wants its factors.
//
// Each tile is one stretch of memory that looks as its rows do in shared memory: 64 values of k are 128 bytes, whose 16-byte pieces
// are swizzled by the row's number modulo 8. A tile so comes with one bulk copy and needs no description.
//
//   x  [n_rows / TILE_ROWS, d / 64] tiles of TILE_ROWS rows        W  [vocab_size / TILE_COLS, d / 64] tiles of TILE_COLS words
//
// Rows past the end are 0. Inside each 32 words of W the order is the one that gives a thread of the product 8 neighbouring words:
// of columns 8 j + 2 t and 8 j + 2 t + 1 for j = 0..3, which thread t of a quad receives, it makes words 8 t .. 8 t + 7.
#pragma once
#include "flowhn.cuh"

constexpr int TILE_ROWS = 128, TILE_COLS = 256, TILE_K = 64;
constexpr int ROW_BYTES = TILE_K * 2;

__device__ __forceinline__ int up(int n, int step) { return (n + step - 1) / step; }

// The place in bytes of piece `piece` (8 values of k) of row `row` in tiles of `height` rows.
__device__ __forceinline__ i64 piece_at(int row, int piece, int height, int n_k) {
    int row_in_tile = row % height;
    i64 tile = (i64)(row / height) * n_k + piece / 8;
    return (tile * height + row_in_tile) * ROW_BYTES + (piece % 8 ^ row_in_tile % 8) * 16;
}

// The row of its tile that a word of the vocabulary takes.
__device__ __forceinline__ int word_row(int word) { return (word & ~31) | word % 8 / 2 * 8 | word % 32 / 8 * 2 | word % 2; }

__device__ __forceinline__ i64 x_piece_at(int row, int piece, int n_k) { return piece_at(row, piece, TILE_ROWS, n_k); }
__device__ __forceinline__ i64 w_piece_at(int word, int piece, int n_k) { return piece_at(word_row(word), piece, TILE_COLS, n_k); }
