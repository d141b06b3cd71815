// What every launcher does: the device, a few matrices at a time, grids of any shape.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace lowrank::cuda {

constexpr int kWarp = 32;

// Matrices a launch: their addresses travel as its arguments, of which there may be 4 KB.
constexpr std::size_t kBatch = 48;

// Calls launch(matrices, packed) for all, at most kBatch at a time. Whether a matrix is accessed in
// packs is asked of it alone, so its bits do not depend on the group.
template <typename IsPacked, typename Launch>
void in_batches(std::size_t count, const IsPacked& is_packed, const Launch& launch) {
  for (const bool packed : {true, false}) {
    std::vector<std::size_t> batch;
    for (std::size_t matrix = 0; matrix < count; ++matrix) {
      if (is_packed(matrix) == packed) batch.push_back(matrix);
      if (batch.size() == kBatch || (matrix + 1 == count && !batch.empty())) {
        launch(batch, packed);
        batch.clear();
      }
    }
  }
}

template <typename Pointer, typename Source>
void copy_addresses(Pointer (&to)[kBatch], const std::vector<Source*>& from,
                    const std::vector<std::size_t>& matrices) {
  if (from.empty()) return;
  for (std::size_t i = 0; i < matrices.size(); ++i)
    to[i] = reinterpret_cast<Pointer>(from[matrices[i]]);
}

// Blocks for `size` things, `per_block` each. Kernels stride over the grid, so a limit costs
// nothing but a loop.
inline unsigned blocks(int64_t size, int64_t per_block, int64_t limit = 1 << 20) {
  return static_cast<unsigned>(std::min(limit, (size + per_block - 1) / per_block));
}

inline unsigned size_of_batch(const std::vector<std::size_t>& matrices) {
  return static_cast<unsigned>(matrices.size());
}

// Runs `enqueue` under the device, which is set only where it differs: that creates a context.
template <typename Enqueue>
const char* on_device(int device, const Enqueue& enqueue) {
  int previous = 0;
  cudaError_t error = cudaGetDevice(&previous);
  const bool other = error == cudaSuccess && previous != device;
  if (other) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    enqueue();
    error = cudaGetLastError();
    if (other) {
      const cudaError_t restored = cudaSetDevice(previous);
      if (error == cudaSuccess) error = restored;
    }
  }
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace lowrank::cuda
