#include <algorithm>

#include "cpu/clones.h"
#include "cpu/convert.h"
#include "cpu/moments.h"
#include "cpu/passes.h"
#include "cpu/resize.h"
#include "cpu/split.h"
#include "rules/convert.h"

namespace lowrank::cpu {
namespace {

// Two arrays of this many floats stay in L1 beside what is read; whole groups of scales.
constexpr int64_t kChunk = 1024;

LOWRANK_CLONES
void apply_float32(const StepRule& shared_rule, float* __restrict__ param,
                   const float* __restrict__ direction, int64_t count) {
  const StepRule rule = shared_rule;
  for (int64_t i = 0; i < count; ++i) param[i] = rule(param[i], direction[i]);
}

LOWRANK_CLONES
void apply_bfloat16(const StepRule& shared_rule, uint16_t* param,
                    const float* __restrict__ direction, int64_t count) {
  const StepRule rule = shared_rule;
  uint32_t wide[kChunk];
  resize(param, wide, count);
  for (int64_t i = 0; i < count; ++i)
    wide[i] = wide_bfloat16(rule(from_bfloat16(wide[i]), direction[i]));
  resize(wide, param, count);
}

void apply_to(const AdamW& p, std::size_t matrix, int64_t begin, const float* direction,
              int64_t count) {
  char* param = p.param.at(matrix, 0, begin);
  if (p.param.dtype == DType::kFloat32) {
    apply_float32(p.rule, reinterpret_cast<float*>(param), direction, count);
  } else if (p.param.dtype == DType::kBFloat16) {
    apply_bfloat16(p.rule, reinterpret_cast<uint16_t*>(param), direction, count);
  } else {
    float wide[kChunk];
    load(p.param.dtype, param, wide, count);
    apply_float32(p.rule, wide, direction, count);
    store(p.param.dtype, wide, param, count);
  }
}

void step_chunk(const AdamW& p, std::size_t matrix, int64_t begin, int64_t count) {
  float grad[kChunk], direction[kChunk];
  load(p.grad.dtype, p.grad.at(matrix, 0, begin), grad, count);
  for (int64_t i = 0; i < count; i += kElementsAScale) {
    const int64_t group = (begin + i) / kElementsAScale;
    step_stretch(p.adam, p.moments, matrix, begin + i, group, {group, 0, false}, grad + i,
                 direction + i, std::min(kElementsAScale, count - i));
  }
  apply_to(p, matrix, begin, direction, count);
}

}  // namespace

void adamw(const AdamW& p, int threads) {
  const Group& group = p.group;
  threads = useful_threads(static_cast<int64_t>(group.count) * group.elements(), threads);
  split(group.count, group.cols, kElementsAScale, threads,
        [&](std::size_t matrix, int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; i += kChunk)
            step_chunk(p, matrix, i, std::min(kChunk, end - i));
        });
}

}  // namespace lowrank::cpu
