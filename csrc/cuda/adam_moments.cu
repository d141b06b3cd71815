#include "cuda/adam_moments.h"

#include <climits>

namespace lowrank::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kRowsPerBlock = 8;
// 16 columns are 64 bytes, what HBM moves at least; twice as wide would leave most of a large GPU
// idle at the 1376 columns of the smallest models.
constexpr int kColsPerBlock = 16;
constexpr int kRowGroups = 32;

struct Squares {
  float direction;
  float projected;
};

__device__ __forceinline__ void update(const AdamRule& rule, float* __restrict__ projected,
                                       float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
                                       float* __restrict__ direction, int64_t i, Squares& sums) {
  const AdamElement out = rule(projected[i], exp_avg[i], exp_avg_sq[i]);
  projected[i] = out.projected;
  exp_avg[i] = out.exp_avg;
  exp_avg_sq[i] = out.exp_avg_sq;
  direction[i] = out.direction;
  sums.direction += out.direction * out.direction;
  sums.projected += out.projected * out.projected;
}

// A warp a row. The order of each sum is fixed by the shape, so two runs give the same bits.
__global__ void __launch_bounds__(kWarp* kRowsPerBlock)
    adam_moments_rows_kernel(AdamRule rule, float* __restrict__ projected,
                             float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
                             float* __restrict__ direction, float* __restrict__ direction_sq,
                             float* __restrict__ projected_sq, int64_t rows, int64_t cols) {
  const int64_t row = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.y;
  if (row >= rows) return;
  Squares sums{};
#pragma unroll 4
  for (int64_t col = threadIdx.x; col < cols; col += kWarp)
    update(rule, projected, exp_avg, exp_avg_sq, direction, row * cols + col, sums);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    sums.direction += __shfl_down_sync(0xffffffff, sums.direction, offset);
    sums.projected += __shfl_down_sync(0xffffffff, sums.projected, offset);
  }
  if (threadIdx.x == 0) {
    direction_sq[row] = sums.direction;
    projected_sq[row] = sums.projected;
  }
}

// One thread a column would leave the GPU idle (a matrix has thousands of columns, not a hundred
// thousand), so 32 threads share a column and meet in a tree. Unrolled by 4, or without the 2
// blocks in the bounds, it spills on sm_90 and sm_120.
__global__ void __launch_bounds__(kColsPerBlock* kRowGroups, 2)
    adam_moments_columns_kernel(AdamRule rule, float* __restrict__ projected,
                                float* __restrict__ exp_avg, float* __restrict__ exp_avg_sq,
                                float* __restrict__ direction, float* __restrict__ direction_sq,
                                float* __restrict__ projected_sq, int64_t rows, int64_t cols) {
  __shared__ Squares partial[kRowGroups][kColsPerBlock];
  const int group = threadIdx.y;
  const int lane = threadIdx.x;
  const int64_t col = int64_t{blockIdx.x} * kColsPerBlock + lane;
  Squares sums{};
  if (col < cols) {
#pragma unroll 2
    for (int64_t row = group; row < rows; row += kRowGroups)
      update(rule, projected, exp_avg, exp_avg_sq, direction, row * cols + col, sums);
  }
  partial[group][lane] = sums;
  for (int half = kRowGroups / 2; half > 0; half /= 2) {
    __syncthreads();
    if (group < half) {
      partial[group][lane].direction += partial[group + half][lane].direction;
      partial[group][lane].projected += partial[group + half][lane].projected;
    }
  }
  if (group == 0 && col < cols) {
    direction_sq[col] = partial[0][lane].direction;
    projected_sq[col] = partial[0][lane].projected;
  }
}

// Sets the device only where it differs: setting one creates a context on it.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&previous_);
    if (error_ == cudaSuccess && previous_ != device) {
      error_ = cudaSetDevice(device);
      changed_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int previous_ = 0;
  bool changed_ = false;
  cudaError_t error_;
};

}  // namespace

cudaError_t adam_moments(const AdamArrays& a, const AdamRule& rule, int device,
                         cudaStream_t stream) {
  const int64_t channels = a.channels_are_rows ? a.rows : a.cols;
  const int64_t per_block = a.channels_are_rows ? kRowsPerBlock : kColsPerBlock;
  const int64_t blocks = (channels + per_block - 1) / per_block;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const DeviceGuard guard(device);
  if (guard.error() != cudaSuccess) return guard.error();

  const auto kernel = a.channels_are_rows ? adam_moments_rows_kernel : adam_moments_columns_kernel;
  const dim3 threads =
      a.channels_are_rows ? dim3(kWarp, kRowsPerBlock) : dim3(kColsPerBlock, kRowGroups);
  kernel<<<static_cast<unsigned>(blocks), threads, 0, stream>>>(
      rule, a.projected, a.exp_avg, a.exp_avg_sq, a.direction, a.direction_sq, a.projected_sq,
      a.rows, a.cols);
  return cudaGetLastError();
}

}  // namespace lowrank::cuda
