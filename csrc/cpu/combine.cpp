#include <algorithm>

#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/passes.h"
#include "cpu/split.h"

namespace lowrank::cpu {
namespace {

// What a chunk of a row is worked on in stays in L1.
constexpr int64_t kChunk = 1024;

LOWRANK_CLONES
void apply(const CombineRule& shared_rule, const float* __restrict__ direction,
           const float* __restrict__ projected, const float* __restrict__ phi,
           float* __restrict__ combined, int64_t count) {
  const CombineRule rule = shared_rule;
  for (int64_t i = 0; i < count; ++i) combined[i] = rule(direction[i], projected[i], phi[i]);
}

struct Buffers {
  float phi[kChunk] = {};
  float combined[kChunk];
};

void combine_row(const Combine& p, std::size_t matrix, int64_t row, Buffers& buffers) {
  const int64_t cols = p.group.cols;
  const float* factor = p.factor.empty() ? nullptr : p.factor[matrix];
  float* phi = buffers.phi;
  if (factor && p.group.channels_are_rows) std::fill_n(phi, std::min(kChunk, cols), factor[row]);
  for (int64_t col = 0; col < cols; col += kChunk) {
    const int64_t count = std::min(kChunk, cols - col);
    const int64_t offset = row * cols + col;
    if (factor && !p.group.channels_are_rows) std::copy_n(factor + col, count, phi);
    // Without a factor phi stays 0, and so it stands for R too.
    const float* projected = factor ? p.projected[matrix] + offset : phi;
    apply(p.rule, p.direction[matrix] + offset, projected, phi, buffers.combined, count);
    store(p.combined.dtype, buffers.combined, p.combined.at(matrix, row, col), count);
  }
}

}  // namespace

void combine(const Combine& p, int threads) {
  const Group& group = p.group;
  threads = useful_threads(static_cast<int64_t>(group.count) * group.elements(), threads);
  split(group.count, group.rows, 1, threads, [&](std::size_t matrix, int64_t begin, int64_t end) {
    Buffers buffers;
    for (int64_t row = begin; row < end; ++row) combine_row(p, matrix, row, buffers);
  });
}

}  // namespace lowrank::cpu
