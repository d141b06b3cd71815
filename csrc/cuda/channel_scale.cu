#include "cuda/launch.cuh"
#include "cuda/passes.h"
#include "rules/channel.h"

namespace lowrank::cuda {
namespace {

constexpr int kThreads = 512;

struct Batch {
  const float* direction_sq[kBatch];
  const float* projected_sq[kBatch];
  const float* residual_sq[kBatch];
  float* limiter_norm[kBatch];
  float* factor[kBatch];
};

// A block a matrix: the limiter needs all of its channels, and there are only thousands.
__global__ void __launch_bounds__(kThreads)
    channel_scale_kernel(const __grid_constant__ Batch batch, int64_t channels) {
  __shared__ double partial[2][kThreads];
  __shared__ float limiter_factor;
  const int matrix = blockIdx.x;
  const int thread = threadIdx.x;
  float* factor = batch.factor[matrix];
  double norm_sq = 0.0;
  double ordinary_sq = 0.0;
  for (int64_t i = thread; i < channels; i += kThreads) {
    const ChannelFactor out = channel_factor(
        batch.direction_sq[matrix][i], batch.projected_sq[matrix][i], batch.residual_sq[matrix][i]);
    factor[i] = out.phi;
    norm_sq += out.scaled_sq;
    ordinary_sq += out.ordinary_sq;
  }
  partial[0][thread] = norm_sq;
  partial[1][thread] = ordinary_sq;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) {
      partial[0][thread] += partial[0][thread + half];
      partial[1][thread] += partial[1][thread + half];
    }
  }
  if (thread == 0) {
    float* limiter_norm = batch.limiter_norm[matrix];
    const Limit limiter = limit(static_cast<float>(sqrt(partial[0][0])), *limiter_norm,
                                static_cast<float>(sqrt(partial[1][0])));
    *limiter_norm = limiter.stored_norm;
    limiter_factor = limiter.factor;
  }
  __syncthreads();
  for (int64_t i = thread; i < channels; i += kThreads) factor[i] *= limiter_factor;
}

}  // namespace

const char* channel_scale(const ChannelScale& pass, int device, std::uintptr_t stream) {
  const auto no_packs = [](std::size_t) { return false; };
  return on_device(device, [&] {
    in_batches(pass.group.count, no_packs, [&](const auto& matrices, bool) {
      Batch batch{};
      copy_addresses(batch.direction_sq, pass.direction_sq, matrices);
      copy_addresses(batch.projected_sq, pass.projected_sq, matrices);
      copy_addresses(batch.residual_sq, pass.residual_sq, matrices);
      copy_addresses(batch.limiter_norm, pass.limiter_norm, matrices);
      copy_addresses(batch.factor, pass.factor, matrices);
      channel_scale_kernel<<<size_of_batch(matrices), kThreads, 0,
                             reinterpret_cast<cudaStream_t>(stream)>>>(batch, pass.group.rows);
    });
  });
}

}  // namespace lowrank::cuda
