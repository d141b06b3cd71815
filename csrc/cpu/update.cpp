#include <algorithm>

#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/passes.h"
#include "cpu/split.h"

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
  split(group.count, group.rows, 1, threads, [&](std::size_t matrix, int64_t begin, int64_t end) {
    Buffers buffers;
    for (int64_t row = begin; row < end; ++row) update_row(p, matrix, row, buffers);
  });
}

}  // namespace lowrank::cpu
