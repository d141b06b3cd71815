#include <algorithm>

#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/passes.h"
#include "cpu/split.h"
#include "rules/convert.h"

namespace lowrank::cpu {
namespace {

// What a chunk of a row is worked on in stays in L1.
constexpr int64_t kChunk = 1024;

// Without a factor the last two stay 0.
struct Buffers {
  float weight[kChunk];
  float product[kChunk];
  float grad[kChunk] = {};
  float phi[kChunk] = {};
};

LOWRANK_CLONES
void apply(const UpdateRule& shared_rule, Buffers& buffers, int64_t count) {
  const UpdateRule rule = shared_rule;
  for (int64_t i = 0; i < count; ++i) {
    buffers.weight[i] =
        rule(buffers.weight[i], buffers.product[i], buffers.grad[i], buffers.phi[i]);
  }
}

float as_float(float value) { return value; }
float as_float(uint16_t value) { return from_bfloat16(value); }
void assign(float& target, float value) { target = value; }
void assign(uint16_t& target, float value) { target = to_bfloat16(value); }

// A row whose matrices have one dtype, without a stop in a buffer; phi is that of the row, or one
// an element.
template <typename T, typename Phi>
[[gnu::always_inline]] inline void apply_direct(const UpdateRule& shared_rule,
                                                T* __restrict__ param,
                                                const T* __restrict__ product,
                                                const T* __restrict__ grad, const Phi& phi,
                                                int64_t count) {
  const UpdateRule rule = shared_rule;
  for (int64_t i = 0; i < count; ++i) {
    assign(param[i], rule(as_float(param[i]), as_float(product[i]), as_float(grad[i]), phi(i)));
  }
}

template <typename T>
[[gnu::always_inline]] inline void apply_to_row(const Update& p, std::size_t matrix, int64_t row) {
  const float* factor = p.factor[matrix];
  auto* param = reinterpret_cast<T*>(p.param.at(matrix, row, 0));
  const auto* product = reinterpret_cast<const T*>(p.product.at(matrix, row, 0));
  const auto* grad = reinterpret_cast<const T*>(p.grad.at(matrix, row, 0));
  if (p.group.channels_are_rows) {
    const float phi = factor[row];
    apply_direct(p.rule, param, product, grad, [phi](int64_t) { return phi; }, p.group.cols);
  } else {
    apply_direct(
        p.rule, param, product, grad, [factor](int64_t i) { return factor[i]; }, p.group.cols);
  }
}

LOWRANK_CLONES
void apply_float32(const Update& p, std::size_t matrix, int64_t row) {
  apply_to_row<float>(p, matrix, row);
}

LOWRANK_CLONES
void apply_bfloat16(const Update& p, std::size_t matrix, int64_t row) {
  apply_to_row<uint16_t>(p, matrix, row);
}

bool is_direct(const Update& p) {
  return p.noise.empty() && !p.factor.empty() && p.param.dtype == p.product.dtype &&
         p.param.dtype == p.grad.dtype && p.param.dtype != DType::kFloat16;
}

// From one element of the row to the next either the channel or the place goes up by one.
LOWRANK_CLONES
void store_with_noise(const NoiseRule& shared_rule, const float* __restrict__ source,
                      uint16_t* __restrict__ target, uint32_t row, uint32_t col,
                      bool channels_are_rows, int64_t count) {
  const NoiseRule rule = shared_rule;
  const uint32_t channel_step = channels_are_rows ? 0 : 1;
  const uint32_t place_step = 1 - channel_step;
  const uint32_t channel = channels_are_rows ? row : col;
  const uint32_t place = channels_are_rows ? col : row;
  for (int64_t i = 0; i < count; ++i) {
    const auto step = static_cast<uint32_t>(i);
    target[i] = rule.round(source[i], channel + step * channel_step, place + step * place_step);
  }
}

void update_row(const Update& p, std::size_t matrix, int64_t row, Buffers& buffers) {
  const int64_t cols = p.group.cols;
  const float* factor = p.factor.empty() ? nullptr : p.factor[matrix];
  if (factor && p.group.channels_are_rows)
    std::fill_n(buffers.phi, std::min(kChunk, cols), factor[row]);
  for (int64_t col = 0; col < cols; col += kChunk) {
    const int64_t count = std::min(kChunk, cols - col);
    char* param = p.param.at(matrix, row, col);
    load(p.param.dtype, param, buffers.weight, count);
    load(p.product.dtype, p.product.at(matrix, row, col), buffers.product, count);
    if (factor) {
      load(p.grad.dtype, p.grad.at(matrix, row, col), buffers.grad, count);
      if (!p.group.channels_are_rows) std::copy_n(factor + col, count, buffers.phi);
    }
    apply(p.rule, buffers, count);
    if (p.noise.empty()) {
      store(p.param.dtype, buffers.weight, param, count);
    } else {
      store_with_noise(p.noise[matrix], buffers.weight, reinterpret_cast<uint16_t*>(param),
                       static_cast<uint32_t>(p.first_row + row),
                       static_cast<uint32_t>(p.first_col + col), p.group.channels_are_rows, count);
    }
  }
}

}  // namespace

void update(const Update& p, int threads) {
  const Group& group = p.group;
  threads = useful_threads(static_cast<int64_t>(group.count) * group.elements(), threads);
  const bool direct = is_direct(p);
  const auto apply_row = p.param.dtype == DType::kFloat32 ? apply_float32 : apply_bfloat16;
  split(group.count, group.rows, 1, threads, [&](std::size_t matrix, int64_t begin, int64_t end) {
    if (direct) {
      for (int64_t row = begin; row < end; ++row) apply_row(p, matrix, row);
      return;
    }
    Buffers buffers;
    for (int64_t row = begin; row < end; ++row) update_row(p, matrix, row, buffers);
  });
}

}  // namespace lowrank::cpu
