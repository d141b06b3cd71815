#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/passes.h"
#include "cuda/tiles.cuh"

namespace lowrank::cuda {
namespace {

constexpr int kPack = 8;

struct Batch {
  void* param[kBatch];
  const void* grad[kBatch];
  const void* product[kBatch];
  const float* factor[kBatch];
  NoiseRule noise[kBatch];
};

struct Layout {
  Group group;
  int64_t param_stride, grad_stride, product_stride;
  int64_t first_row, first_col;
  bool with_noise;
};

template <int kWidth, typename T>
__device__ __forceinline__ void store_with_noise(T*, const float (&)[kWidth], const NoiseRule&,
                                                 const Layout&, int64_t, int64_t) {}

template <int kWidth>
__device__ __forceinline__ void store_with_noise(BFloat16* to, const float (&from)[kWidth],
                                                 const NoiseRule& rule, const Layout& layout,
                                                 int64_t row, int64_t col) {
  Pack<BFloat16, kWidth> pack;
  const auto place_of_row = static_cast<uint32_t>(layout.first_row + row);
  const auto place_of_col = static_cast<uint32_t>(layout.first_col + col);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) {
    const bool by_rows = layout.group.channels_are_rows;
    pack.values[i].bits = rule.round(from[i], by_rows ? place_of_row : place_of_col + i,
                                     by_rows ? place_of_col + i : place_of_row);
  }
  store_pack(to, pack);
}

// The product has the dtype of the weight: cuBLAS has one for each.
template <typename T, typename GradT, int kWidth>
__global__ void __launch_bounds__(kTileThreads)
    update_kernel(const __grid_constant__ Batch batch, UpdateRule rule, Layout layout) {
  const int matrix = blockIdx.y;
  const float* factor = batch.factor[matrix];
  T* param = static_cast<T*>(batch.param[matrix]);
  const GradT* grad = static_cast<const GradT*>(batch.grad[matrix]);
  const T* product = static_cast<const T*>(batch.product[matrix]);
  const Group& group = layout.group;
  for_each_pack<kWidth>(group.rows, group.cols, [&](int64_t row, int64_t col) {
    float w[kWidth], t[kWidth], phi[kWidth], g[kWidth] = {};
    load(param + row * layout.param_stride + col, w);
    load(product + row * layout.product_stride + col, t);
    if (factor) load(grad + row * layout.grad_stride + col, g);
    load_phi(factor, group.channels_are_rows, row, col, phi);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) w[i] = rule(w[i], t[i], g[i], phi[i]);
    T* to = param + row * layout.param_stride + col;
    if (layout.with_noise) {
      store_with_noise(to, w, batch.noise[matrix], layout, row, col);
    } else {
      store(to, w);
    }
  });
}

}  // namespace

const char* update(const Update& pass, int device, std::uintptr_t stream) {
  if (pass.group.elements() == 0) return nullptr;
  if (pass.product.dtype != pass.param.dtype) return "product must have the dtype of param";
  const bool with_factor = !pass.factor.empty();
  const auto is_packed = [&](std::size_t i) {
    return pass.group.cols % kPack == 0 && has_packs(pass.param, i, kPack) &&
           has_packs(pass.product, i, kPack) &&
           (!with_factor || (has_packs(pass.grad, i, kPack) && is_aligned(pass.factor[i])));
  };
  const Layout layout{pass.group,     pass.param.stride, pass.grad.stride,   pass.product.stride,
                      pass.first_row, pass.first_col,    !pass.noise.empty()};
  return on_device(device, [&] {
    in_batches(pass.group.count, is_packed, [&](const auto& matrices, bool packed) {
      Batch batch{};
      copy_addresses(batch.param, pass.param.data, matrices);
      copy_addresses(batch.grad, pass.grad.data, matrices);
      copy_addresses(batch.product, pass.product.data, matrices);
      copy_addresses(batch.factor, pass.factor, matrices);
      for (std::size_t i = 0; i < matrices.size() && layout.with_noise; ++i)
        batch.noise[i] = pass.noise[matrices[i]];
      visit(pass.param.dtype, [&](auto param) {
        visit(with_factor ? pass.grad.dtype : pass.param.dtype, [&](auto grad) {
          using T = decltype(param);
          using GradT = decltype(grad);
          const auto kernel = packed ? update_kernel<T, GradT, kPack> : update_kernel<T, GradT, 1>;
          kernel<<<tile_grid(pass.group, size_of_batch(matrices)), dim3(kWarp, kTileRows), 0,
                   reinterpret_cast<cudaStream_t>(stream)>>>(batch, pass.rule, layout);
        });
      });
    });
  });
}

}  // namespace lowrank::cuda
