// The grid of the elementwise passes: a warp takes a stretch of a row, eight warps a block.
#pragma once

#include "cuda/launch.cuh"

namespace lowrank::cuda {

constexpr int kTileRows = 8;
constexpr int kTileCols = 512;
constexpr int kTileThreads = kWarp * kTileRows;

inline dim3 tile_grid(const Group& group, unsigned matrices) {
  return {blocks(group.rows, kTileRows), matrices, blocks(group.cols, kTileCols, 65535)};
}

// Calls work(row, col) for the packs of this thread.
template <int kWidth, typename Work>
__device__ __forceinline__ void for_each_pack(int64_t rows, int64_t cols, const Work& work) {
  const int64_t row_step = int64_t{gridDim.x} * kTileRows;
  const int64_t col_step = int64_t{gridDim.z} * kTileCols;
  for (int64_t row = int64_t{blockIdx.x} * kTileRows + threadIdx.y; row < rows; row += row_step) {
    for (int64_t tile = int64_t{blockIdx.z} * kTileCols; tile < cols; tile += col_step) {
      const int64_t end = tile + kTileCols < cols ? tile + kTileCols : cols;
      for (int64_t col = tile + threadIdx.x * kWidth; col < end; col += kWarp * kWidth)
        work(row, col);
    }
  }
}

// phi' of a pack: one value along a row, or one a column; 0 without a factor.
template <int kWidth>
__device__ __forceinline__ void load_phi(const float* factor, bool channels_are_rows, int64_t row,
                                         int64_t col, float (&phi)[kWidth]) {
  if (factor && !channels_are_rows) {
    load(factor + col, phi);
    return;
  }
  const float value = factor ? factor[row] : 0.0f;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) phi[i] = value;
}

}  // namespace lowrank::cuda
