#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/passes.h"
#include "rules/channel.h"

namespace lowrank::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;
// 64 bytes of a half-precision gradient, what HBM moves at least.
constexpr int kColsPerBlock = 32;
constexpr int kPack = 8;

struct Batch {
  const void* matrix[kBatch];
  float* residual_sq[kBatch];
  const float* projected_sq[kBatch];
};

__device__ __forceinline__ void write(const Batch& batch, int matrix, int64_t channel, float sum,
                                      float share) {
  const float* projected_sq = batch.projected_sq[matrix];
  batch.residual_sq[matrix][channel] =
      projected_sq ? residual_energy(sum, projected_sq[channel], share) : sum;
}

template <typename T, int kWidth>
__device__ __forceinline__ void add_squares(const T* from, float (&sums)[kWidth]) {
  float x[kWidth];
  load(from, x);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[i] += x[i] * x[i];
}

// A warp a row, as in adam_moments.cu.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    residual_sums_rows_kernel(const __grid_constant__ Batch batch, float share, int64_t rows,
                              int64_t cols, int64_t stride) {
  const int matrix = blockIdx.y;
  const T* data = static_cast<const T*>(batch.matrix[matrix]);
  const int64_t step = int64_t{gridDim.x} * kRowsPerBlock;
  for (int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y; row < rows; row += step) {
    float sums[kWidth] = {};
#pragma unroll 4
    for (int64_t col = threadIdx.x * kWidth; col < cols; col += kWarp * kWidth)
      add_squares(data + row * stride + col, sums);
    float total = sums[0];
#pragma unroll
    for (int i = 1; i < kWidth; ++i) total += sums[i];
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      total += __shfl_down_sync(0xffffffff, total, offset);
    if (threadIdx.x == 0) write(batch, matrix, row, total, share);
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    residual_sums_columns_kernel(const __grid_constant__ Batch batch, float share, int64_t rows,
                                 int64_t cols, int64_t stride) {
  constexpr int kGroups = kThreads * kWidth / kColsPerBlock;
  __shared__ float partial[kGroups][kColsPerBlock];
  const int matrix = blockIdx.y;
  const int group = threadIdx.y;
  const int lane = threadIdx.x * kWidth;
  const T* data = static_cast<const T*>(batch.matrix[matrix]);
  const int64_t step = int64_t{gridDim.x} * kColsPerBlock;
  for (int64_t first = int64_t{blockIdx.x} * kColsPerBlock; first < cols; first += step) {
    const int64_t col = first + lane;
    float sums[kWidth] = {};
    if (col < cols) {
#pragma unroll 4
      for (int64_t row = group; row < rows; row += kGroups)
        add_squares(data + row * stride + col, sums);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) partial[group][lane + i] = sums[i];
    for (int half = kGroups / 2; half > 0; half /= 2) {
      __syncthreads();
      if (group < half) {
#pragma unroll
        for (int i = lane; i < lane + kWidth; ++i) partial[group][i] += partial[group + half][i];
      }
    }
    if (group == 0 && col < cols) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) write(batch, matrix, col + i, partial[0][lane + i], share);
    }
    __syncthreads();
  }
}

template <typename T, int kWidth>
void launch(const Batch& batch, unsigned count, const ResidualSums& pass, cudaStream_t stream) {
  const auto& [_, rows, cols, channels_are_rows] = pass.group;
  if (channels_are_rows) {
    const dim3 grid(blocks(rows, kRowsPerBlock), count);
    residual_sums_rows_kernel<T, kWidth><<<grid, dim3(kWarp, kRowsPerBlock), 0, stream>>>(
        batch, pass.share, rows, cols, pass.matrix.stride);
  } else {
    const dim3 grid(blocks(cols, kColsPerBlock), count);
    const dim3 threads(kColsPerBlock / kWidth, kThreads * kWidth / kColsPerBlock);
    residual_sums_columns_kernel<T, kWidth>
        <<<grid, threads, 0, stream>>>(batch, pass.share, rows, cols, pass.matrix.stride);
  }
}

}  // namespace

const char* residual_sums(const ResidualSums& pass, int device, std::uintptr_t stream) {
  if (pass.group.channels() == 0) return nullptr;
  const auto is_packed = [&](std::size_t i) {
    return pass.group.cols % kPack == 0 && has_packs(pass.matrix, i, kPack);
  };
  return on_device(device, [&] {
    in_batches(pass.group.count, is_packed, [&](const auto& matrices, bool packed) {
      Batch batch{};
      copy_addresses(batch.matrix, pass.matrix.data, matrices);
      copy_addresses(batch.residual_sq, pass.residual_sq, matrices);
      copy_addresses(batch.projected_sq, pass.projected_sq, matrices);
      visit(pass.matrix.dtype, [&](auto element) {
        const auto start = packed ? launch<decltype(element), kPack> : launch<decltype(element), 1>;
        start(batch, size_of_batch(matrices), pass, reinterpret_cast<cudaStream_t>(stream));
      });
    });
  });
}

}  // namespace lowrank::cuda
