#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/passes.h"
#include "cuda/tiles.cuh"

namespace lowrank::cuda {
namespace {

constexpr int kPack = 4;

struct Batch {
  const float* direction[kBatch];
  const float* projected[kBatch];
  const float* factor[kBatch];
  void* combined[kBatch];
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kTileThreads)
    combine_kernel(const __grid_constant__ Batch batch, CombineRule rule, Group group,
                   int64_t stride) {
  const int matrix = blockIdx.y;
  const float* factor = batch.factor[matrix];
  T* combined = static_cast<T*>(batch.combined[matrix]);
  for_each_pack<kWidth>(group.rows, group.cols, [&](int64_t row, int64_t col) {
    const int64_t offset = row * group.cols + col;
    float n[kWidth], phi[kWidth], r[kWidth] = {};
    load(batch.direction[matrix] + offset, n);
    if (factor) load(batch.projected[matrix] + offset, r);
    load_phi(factor, group.channels_are_rows, row, col, phi);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) n[i] = rule(n[i], r[i], phi[i]);
    store(combined + row * stride + col, n);
  });
}

}  // namespace

const char* combine(const Combine& pass, int device, std::uintptr_t stream) {
  if (pass.group.elements() == 0) return nullptr;
  const auto is_packed = [&](std::size_t i) {
    return pass.group.cols % kPack == 0 && has_packs(pass.combined, i, kPack) &&
           is_aligned(pass.direction[i]) && is_aligned(pass.projected[i]) &&
           (pass.factor.empty() || is_aligned(pass.factor[i]));
  };
  return on_device(device, [&] {
    in_batches(pass.group.count, is_packed, [&](const auto& matrices, bool packed) {
      Batch batch{};
      copy_addresses(batch.direction, pass.direction, matrices);
      copy_addresses(batch.projected, pass.projected, matrices);
      copy_addresses(batch.factor, pass.factor, matrices);
      copy_addresses(batch.combined, pass.combined.data, matrices);
      visit(pass.combined.dtype, [&](auto element) {
        using T = decltype(element);
        const auto kernel = packed ? combine_kernel<T, kPack> : combine_kernel<T, 1>;
        kernel<<<tile_grid(pass.group, size_of_batch(matrices)), dim3(kWarp, kTileRows), 0,
                 reinterpret_cast<cudaStream_t>(stream)>>>(batch, pass.rule, pass.group,
                                                           pass.combined.stride);
      });
    });
  });
}

}  // namespace lowrank::cuda
