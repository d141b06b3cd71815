#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/passes.h"

namespace lowrank::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kRowsPerBlock = kThreads / kWarp;
// 16 columns are 64 bytes, what HBM moves at least; twice as wide would leave most of a large GPU
// idle at the 1376 columns of the smallest models.
constexpr int kColsPerBlock = 16;
constexpr int kPack = 4;

// Without sums the last two stay null.
struct Batch {
  const void* product[kBatch];
  float* projected[kBatch];
  float* exp_avg[kBatch];
  float* exp_avg_sq[kBatch];
  float* direction[kBatch];
  float* direction_sq[kBatch];
  float* projected_sq[kBatch];
};

struct Squares {
  float direction;
  float projected;
};

// One pack of a matrix, `offset` in the dense arrays. Not restrict: the product may be `projected`.
template <typename T, int kWidth>
__device__ __forceinline__ void update(const AdamRule& rule, const Batch& batch, int matrix,
                                       const T* product, int64_t offset, Squares (&sums)[kWidth]) {
  float r[kWidth], m[kWidth], v[kWidth], n[kWidth];
  load(product, r);
  load(batch.exp_avg[matrix] + offset, m);
  load(batch.exp_avg_sq[matrix] + offset, v);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const AdamElement out = rule(r[i], m[i], v[i]);
    r[i] = out.projected;
    m[i] = out.exp_avg;
    v[i] = out.exp_avg_sq;
    n[i] = out.direction;
    sums[i].direction += n[i] * n[i];
    sums[i].projected += r[i] * r[i];
  }
  store(batch.projected[matrix] + offset, r);
  store(batch.exp_avg[matrix] + offset, m);
  store(batch.exp_avg_sq[matrix] + offset, v);
  store(batch.direction[matrix] + offset, n);
}

// A warp a row. The order of each sum is fixed by the shape, so two runs give the same bits.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    adam_moments_rows_kernel(const __grid_constant__ Batch batch, AdamRule rule, int64_t rows,
                             int64_t cols, int64_t stride) {
  const int matrix = blockIdx.y;
  const T* product = static_cast<const T*>(batch.product[matrix]);
  const int64_t step = int64_t{gridDim.x} * kRowsPerBlock;
  for (int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y; row < rows; row += step) {
    Squares sums[kWidth] = {};
    for (int64_t col = threadIdx.x * kWidth; col < cols; col += kWarp * kWidth)
      update(rule, batch, matrix, product + row * stride + col, row * cols + col, sums);
    Squares total = sums[0];
#pragma unroll
    for (int i = 1; i < kWidth; ++i) {
      total.direction += sums[i].direction;
      total.projected += sums[i].projected;
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      total.direction += __shfl_down_sync(0xffffffff, total.direction, offset);
      total.projected += __shfl_down_sync(0xffffffff, total.projected, offset);
    }
    if (threadIdx.x == 0 && batch.direction_sq[matrix]) {
      batch.direction_sq[matrix][row] = total.direction;
      batch.projected_sq[matrix][row] = total.projected;
    }
  }
}

// One thread a column would leave the GPU idle (a matrix has thousands of columns, not a hundred
// thousand), so all groups of rows share a column and meet in a tree.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    adam_moments_columns_kernel(const __grid_constant__ Batch batch, AdamRule rule, int64_t rows,
                                int64_t cols, int64_t stride) {
  constexpr int kGroups = kThreads * kWidth / kColsPerBlock;
  __shared__ Squares partial[kGroups][kColsPerBlock];
  const int matrix = blockIdx.y;
  const int group = threadIdx.y;
  const int lane = threadIdx.x * kWidth;
  const T* product = static_cast<const T*>(batch.product[matrix]);
  const int64_t step = int64_t{gridDim.x} * kColsPerBlock;
  for (int64_t first = int64_t{blockIdx.x} * kColsPerBlock; first < cols; first += step) {
    const int64_t col = first + lane;
    Squares sums[kWidth] = {};
    if (col < cols) {
      for (int64_t row = group; row < rows; row += kGroups)
        update(rule, batch, matrix, product + row * stride + col, row * cols + col, sums);
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) partial[group][lane + i] = sums[i];
    for (int half = kGroups / 2; half > 0; half /= 2) {
      __syncthreads();
      if (group < half) {
#pragma unroll
        for (int i = lane; i < lane + kWidth; ++i) {
          partial[group][i].direction += partial[group + half][i].direction;
          partial[group][i].projected += partial[group + half][i].projected;
        }
      }
    }
    if (group == 0 && col < cols && batch.direction_sq[matrix]) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        batch.direction_sq[matrix][col + i] = partial[0][lane + i].direction;
        batch.projected_sq[matrix][col + i] = partial[0][lane + i].projected;
      }
    }
    __syncthreads();
  }
}

template <typename T, int kWidth>
void launch(const Batch& batch, unsigned count, const AdamMoments& pass, cudaStream_t stream) {
  const auto& [_, rows, cols, channels_are_rows] = pass.group;
  if (channels_are_rows) {
    const dim3 grid(blocks(rows, kRowsPerBlock), count);
    adam_moments_rows_kernel<T, kWidth><<<grid, dim3(kWarp, kRowsPerBlock), 0, stream>>>(
        batch, pass.rule, rows, cols, pass.product.stride);
  } else {
    const dim3 grid(blocks(cols, kColsPerBlock), count);
    const dim3 threads(kColsPerBlock / kWidth, kThreads * kWidth / kColsPerBlock);
    adam_moments_columns_kernel<T, kWidth>
        <<<grid, threads, 0, stream>>>(batch, pass.rule, rows, cols, pass.product.stride);
  }
}

}  // namespace

const char* adam_moments(const AdamMoments& pass, int device, std::uintptr_t stream) {
  if (pass.group.channels() == 0) return nullptr;
  const Moments& moments = pass.moments;
  if (moments.format != Format::kFloat32) return low_bit_moments(pass, device, stream);
  const auto is_packed = [&](std::size_t i) {
    return pass.group.cols % kPack == 0 && has_packs(pass.product, i, kPack) &&
           is_aligned(pass.projected[i]) && is_aligned(moments.exp_avg[i]) &&
           is_aligned(moments.exp_avg_sq[i]) && is_aligned(pass.direction[i]);
  };
  return on_device(device, [&] {
    in_batches(pass.group.count, is_packed, [&](const auto& matrices, bool packed) {
      Batch batch{};
      copy_addresses(batch.product, pass.product.data, matrices);
      copy_addresses(batch.projected, pass.projected, matrices);
      copy_addresses(batch.exp_avg, moments.exp_avg, matrices);
      copy_addresses(batch.exp_avg_sq, moments.exp_avg_sq, matrices);
      copy_addresses(batch.direction, pass.direction, matrices);
      if (!pass.direction_sq.empty()) {
        copy_addresses(batch.direction_sq, pass.direction_sq, matrices);
        copy_addresses(batch.projected_sq, pass.projected_sq, matrices);
      }
      visit(pass.product.dtype, [&](auto element) {
        const auto start = packed ? launch<decltype(element), kPack> : launch<decltype(element), 1>;
        start(batch, size_of_batch(matrices), pass, reinterpret_cast<cudaStream_t>(stream));
      });
    });
  });
}

}  // namespace lowrank::cuda
