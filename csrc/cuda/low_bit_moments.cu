#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/passes.h"

namespace lowrank::cuda {
namespace {

// Moments are codes or else bfloat16. A thread keeps its rows of a group, new M and V and all, in
// registers until the largest are known.
constexpr int kRowWarps = 8;
constexpr int kRowsAThread = kChannelsAScale / kRowWarps;
constexpr int kColumnWarps = 16;
constexpr int kColumnsAThread = kChannelsAScale / kWarp;

// Without sums, scales or noise theirs stay null or are not read.
struct Batch {
  const void* product[kBatch];
  float* projected[kBatch];
  float* direction[kBatch];
  char* exp_avg[kBatch];
  char* exp_avg_sq[kBatch];
  float* exp_avg_scale[kBatch];
  float* exp_avg_sq_scale[kBatch];
  float* direction_sq[kBatch];
  float* projected_sq[kBatch];
  NoiseRule noise[kBatch];
  bool has_noise;
};

struct Squares {
  float direction;
  float projected;
};

// Of M, and of V or, in codes, of its root.
struct Pair {
  float average;
  float second;
};

// One element: R and N are stored, new M and V are returned.
template <typename T, bool kCoded>
__device__ __forceinline__ Pair step(const AdamRule& rule, const Batch& batch, int matrix,
                                     const T* product, int64_t offset, Pair scales, Squares& sums) {
  float average, square;
  if constexpr (kCoded) {
    const auto* codes = reinterpret_cast<const int8_t*>(batch.exp_avg[matrix]);
    const auto* roots = reinterpret_cast<const uint8_t*>(batch.exp_avg_sq[matrix]);
    average = decode_average(codes[offset], scales.average);
    const float root = decode_root(roots[offset], scales.second);
    square = root * root;
  } else {
    average = to_float(reinterpret_cast<const BFloat16*>(batch.exp_avg[matrix])[offset]);
    square = to_float(reinterpret_cast<const BFloat16*>(batch.exp_avg_sq[matrix])[offset]);
  }
  const AdamElement out = rule(to_float(*product), average, square);
  batch.projected[matrix][offset] = out.projected;
  batch.direction[matrix][offset] = out.direction;
  sums.direction += out.direction * out.direction;
  sums.projected += out.projected * out.projected;
  return {out.exp_avg, kCoded ? sqrtf(out.exp_avg_sq) : out.exp_avg_sq};
}

template <bool kCoded>
__device__ __forceinline__ void store(const Batch& batch, int matrix, int64_t offset, Pair moments,
                                      Pair scales, int64_t channel, int64_t place) {
  const uint32_t random =
      batch.noise[matrix](static_cast<uint32_t>(channel), static_cast<uint32_t>(place));
  if constexpr (kCoded) {
    const uint32_t bits = batch.has_noise ? random : kNearestCode;
    reinterpret_cast<int8_t*>(batch.exp_avg[matrix])[offset] =
        static_cast<int8_t>(encode_average(moments.average, code_divisor(scales.average)));
    reinterpret_cast<uint8_t*>(batch.exp_avg_sq[matrix])[offset] =
        static_cast<uint8_t>(encode_root(moments.second, code_divisor(scales.second), bits));
  } else {
    reinterpret_cast<uint16_t*>(batch.exp_avg[matrix])[offset] = to_bfloat16(moments.average);
    reinterpret_cast<uint16_t*>(batch.exp_avg_sq[matrix])[offset] = static_cast<uint16_t>(
        batch.has_noise ? wide_bfloat16(moments.second, random) : wide_bfloat16(moments.second));
  }
}

__device__ __forceinline__ Pair scales_at(const Batch& batch, int matrix, int64_t scale) {
  return {batch.exp_avg_scale[matrix][scale], batch.exp_avg_sq_scale[matrix][scale]};
}

__device__ __forceinline__ void raise(Pair& largest, Pair values) {
  largest.average = fmaxf(largest.average, fabsf(values.average));
  largest.second = fmaxf(largest.second, values.second);
}

// A block takes 64 rows and walks along them, a warp's width of columns at a time. A column is a
// group, of which each warp has an eighth.
template <typename T, bool kCoded>
__global__ void __launch_bounds__(kWarp* kRowWarps)
    low_bit_rows_kernel(const __grid_constant__ Batch batch, AdamRule rule, int64_t rows,
                        int64_t cols, int64_t stride) {
  __shared__ Pair shared[kRowWarps][kWarp];
  const int matrix = blockIdx.y;
  const int lane = threadIdx.x, warp = threadIdx.y;
  const T* product = static_cast<const T*>(batch.product[matrix]);
  const int64_t col_step = int64_t{gridDim.z} * kWarp;
  for (int64_t group = blockIdx.x; group * kChannelsAScale < rows; group += gridDim.x) {
    const int64_t first_row = group * kChannelsAScale + warp;
    Squares sums[kRowsAThread] = {};
    for (int64_t first = int64_t{blockIdx.z} * kWarp; first < cols; first += col_step) {
      const int64_t col = first + lane;
      const int64_t scale = group * cols + col;
      const bool has_scale = kCoded && col < cols;
      const Pair scales = has_scale ? scales_at(batch, matrix, scale) : Pair{};
      Pair moments[kRowsAThread] = {};
      Pair largest = {};
#pragma unroll
      for (int i = 0; i < kRowsAThread; ++i) {
        const int64_t row = first_row + i * kRowWarps;
        if (row < rows && col < cols) {
          moments[i] = step<T, kCoded>(rule, batch, matrix, product + row * stride + col,
                                       row * cols + col, scales, sums[i]);
        }
        raise(largest, moments[i]);
      }
      if constexpr (kCoded) {
        shared[warp][lane] = largest;
        __syncthreads();
#pragma unroll
        for (int other = 0; other < kRowWarps; ++other) raise(largest, shared[other][lane]);
        if (warp == 0 && col < cols) {
          batch.exp_avg_scale[matrix][scale] = largest.average;
          batch.exp_avg_sq_scale[matrix][scale] = largest.second;
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < kRowsAThread; ++i) {
        const int64_t row = first_row + i * kRowWarps;
        if (row < rows && col < cols)
          store<kCoded>(batch, matrix, row * cols + col, moments[i], largest, row, col);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsAThread; ++i) {
#pragma unroll
      for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        sums[i].direction += __shfl_down_sync(0xffffffff, sums[i].direction, offset);
        sums[i].projected += __shfl_down_sync(0xffffffff, sums[i].projected, offset);
      }
      const int64_t row = first_row + i * kRowWarps;
      if (lane == 0 && row < rows && batch.direction_sq[matrix]) {
        batch.direction_sq[matrix][row] = sums[i].direction;
        batch.projected_sq[matrix][row] = sums[i].projected;
      }
    }
  }
}

// A block takes 64 columns and walks down them; a warp has a row of them, which is a group.
template <typename T, bool kCoded>
__global__ void __launch_bounds__(kWarp* kColumnWarps, 2)
    low_bit_columns_kernel(const __grid_constant__ Batch batch, AdamRule rule, int64_t rows,
                           int64_t cols, int64_t stride) {
  __shared__ Squares partial[kColumnWarps][kChannelsAScale];
  const int matrix = blockIdx.y;
  const int lane = threadIdx.x, warp = threadIdx.y;
  const T* product = static_cast<const T*>(batch.product[matrix]);
  const int64_t groups = groups_of(cols, kChannelsAScale);
  const int64_t row_step = int64_t{gridDim.z} * kColumnWarps;
  for (int64_t group = blockIdx.x; group < groups; group += gridDim.x) {
    const int64_t first_col = group * kChannelsAScale + lane;
    Squares sums[kColumnsAThread] = {};
    for (int64_t row = int64_t{blockIdx.z} * kColumnWarps + warp; row < rows; row += row_step) {
      const int64_t scale = row * groups + group;
      const Pair scales = kCoded ? scales_at(batch, matrix, scale) : Pair{};
      Pair moments[kColumnsAThread] = {};
      Pair largest = {};
#pragma unroll
      for (int i = 0; i < kColumnsAThread; ++i) {
        const int64_t col = first_col + i * kWarp;
        if (col < cols) {
          moments[i] = step<T, kCoded>(rule, batch, matrix, product + row * stride + col,
                                       row * cols + col, scales, sums[i]);
        }
        raise(largest, moments[i]);
      }
      if constexpr (kCoded) {
#pragma unroll
        for (int mask = kWarp / 2; mask > 0; mask /= 2) {
          raise(largest, {__shfl_xor_sync(0xffffffff, largest.average, mask),
                          __shfl_xor_sync(0xffffffff, largest.second, mask)});
        }
        if (lane == 0) {
          batch.exp_avg_scale[matrix][scale] = largest.average;
          batch.exp_avg_sq_scale[matrix][scale] = largest.second;
        }
      }
#pragma unroll
      for (int i = 0; i < kColumnsAThread; ++i) {
        const int64_t col = first_col + i * kWarp;
        if (col < cols)
          store<kCoded>(batch, matrix, row * cols + col, moments[i], largest, col, row);
      }
    }
#pragma unroll
    for (int i = 0; i < kColumnsAThread; ++i) partial[warp][lane + i * kWarp] = sums[i];
    for (int half = kColumnWarps / 2; half > 0; half /= 2) {
      __syncthreads();
      if (warp < half) {
#pragma unroll
        for (int col = lane; col < kChannelsAScale; col += kWarp) {
          partial[warp][col].direction += partial[warp + half][col].direction;
          partial[warp][col].projected += partial[warp + half][col].projected;
        }
      }
    }
    if (warp == 0 && batch.direction_sq[matrix]) {
#pragma unroll
      for (int i = 0; i < kColumnsAThread; ++i) {
        const int64_t col = first_col + i * kWarp;
        if (col < cols) {
          batch.direction_sq[matrix][col] = partial[0][lane + i * kWarp].direction;
          batch.projected_sq[matrix][col] = partial[0][lane + i * kWarp].projected;
        }
      }
    }
    __syncthreads();
  }
}

// Without sums nothing has to walk: then the whole matrix is cut.
template <typename T, bool kCoded>
void launch(const Batch& batch, unsigned count, const AdamMoments& pass, cudaStream_t stream) {
  const auto& [_, rows, cols, channels_are_rows] = pass.group;
  const bool walks = !pass.direction_sq.empty();
  const unsigned groups = blocks(pass.group.channels(), kChannelsAScale);
  if (channels_are_rows) {
    const dim3 grid(groups, count, walks ? 1 : blocks(cols, kWarp, 65535));
    low_bit_rows_kernel<T, kCoded><<<grid, dim3(kWarp, kRowWarps), 0, stream>>>(
        batch, pass.rule, rows, cols, pass.product.stride);
  } else {
    const dim3 grid(groups, count, walks ? 1 : blocks(rows, kColumnWarps, 65535));
    low_bit_columns_kernel<T, kCoded><<<grid, dim3(kWarp, kColumnWarps), 0, stream>>>(
        batch, pass.rule, rows, cols, pass.product.stride);
  }
}

}  // namespace

const char* low_bit_moments(const AdamMoments& pass, int device, std::uintptr_t stream) {
  const Moments& moments = pass.moments;
  if (pass.group.elements() == 0 && pass.direction_sq.empty()) return nullptr;
  return on_device(device, [&] {
    in_batches(
        pass.group.count, [](std::size_t) { return true; },
        [&](const auto& matrices, bool) {
          Batch batch{};
          copy_addresses(batch.product, pass.product.data, matrices);
          copy_addresses(batch.projected, pass.projected, matrices);
          copy_addresses(batch.direction, pass.direction, matrices);
          copy_addresses(batch.exp_avg, moments.exp_avg, matrices);
          copy_addresses(batch.exp_avg_sq, moments.exp_avg_sq, matrices);
          copy_addresses(batch.exp_avg_scale, moments.exp_avg_scale, matrices);
          copy_addresses(batch.exp_avg_sq_scale, moments.exp_avg_sq_scale, matrices);
          copy_addresses(batch.direction_sq, pass.direction_sq, matrices);
          copy_addresses(batch.projected_sq, pass.projected_sq, matrices);
          batch.has_noise = !moments.noise.empty();
          for (std::size_t i = 0; batch.has_noise && i < matrices.size(); ++i)
            batch.noise[i] = moments.noise[matrices[i]];
          visit(pass.product.dtype, [&](auto element) {
            using T = decltype(element);
            const auto start =
                moments.format == Format::kCodes ? launch<T, true> : launch<T, false>;
            start(batch, size_of_batch(matrices), pass, reinterpret_cast<cudaStream_t>(stream));
          });
        });
  });
}

}  // namespace lowrank::cuda
