#include "cpu/moments.h"

#include <algorithm>

#include "cpu/clones.h"
#include "rules/codes.h"
#include "rules/convert.h"

namespace lowrank::cpu {
namespace {

[[gnu::always_inline]] inline void step(const AdamRule& shared_rule, float* __restrict__ exp_avg,
                                        float* __restrict__ exp_avg_sq,
                                        float* __restrict__ projected,
                                        float* __restrict__ direction, int64_t count) {
  const AdamRule rule = shared_rule;
  for (int64_t i = 0; i < count; ++i) {
    const AdamElement out = rule(projected[i], exp_avg[i], exp_avg_sq[i]);
    projected[i] = out.projected;
    exp_avg[i] = out.exp_avg;
    exp_avg_sq[i] = out.exp_avg_sq;
    direction[i] = out.direction;
  }
}

// Codes as numbers of 32 bits and back, in loops of their own: beside bytes the others would get
// half the width of vectors.
struct Wide {
  int32_t average[kStretch];
  int32_t root[kStretch];
};

[[gnu::always_inline]] inline void widen(const int8_t* __restrict__ average,
                                         const uint8_t* __restrict__ root, Wide& wide,
                                         int64_t count) {
  for (int64_t i = 0; i < count; ++i) wide.average[i] = average[i];
  for (int64_t i = 0; i < count; ++i) wide.root[i] = root[i];
}

[[gnu::always_inline]] inline void narrow(const Wide& wide, int8_t* __restrict__ average,
                                          uint8_t* __restrict__ root, int64_t count) {
  for (int64_t i = 0; i < count; ++i) average[i] = static_cast<int8_t>(wide.average[i]);
  for (int64_t i = 0; i < count; ++i) root[i] = static_cast<uint8_t>(wide.root[i]);
}

// M and the root of V of some elements with the scales of theirs.
template <typename AverageScale, typename RootScale>
[[gnu::always_inline]] inline void decode_and_step(
    const AdamRule& shared_rule, const Wide& wide, const AverageScale& average_scale,
    const RootScale& root_scale, float* __restrict__ projected, float* __restrict__ direction,
    float* __restrict__ average, float* __restrict__ root, int64_t count) {
  const AdamRule rule = shared_rule;
  for (int64_t i = 0; i < count; ++i) {
    const float old_root = decode_root(wide.root[i], root_scale(i));
    const AdamElement out =
        rule(projected[i], decode_average(wide.average[i], average_scale(i)), old_root * old_root);
    projected[i] = out.projected;
    direction[i] = out.direction;
    average[i] = out.exp_avg;
    root[i] = sqrtf(out.exp_avg_sq);
  }
}

[[gnu::always_inline]] inline void draw(const NoiseRule& shared_noise, const Draws& draws,
                                        uint32_t* __restrict__ bits, int64_t count) {
  const NoiseRule noise = shared_noise;
  const uint32_t channel_step = draws.up_channels ? 1 : 0;
  const uint32_t place_step = 1 - channel_step;
  const auto channel = static_cast<uint32_t>(draws.channel);
  const auto place = static_cast<uint32_t>(draws.place);
  for (int64_t i = 0; i < count; ++i) {
    const auto up = static_cast<uint32_t>(i);
    bits[i] = noise(channel + up * channel_step, place + up * place_step);
  }
}

template <typename AverageScale, typename RootScale>
[[gnu::always_inline]] inline void encode(const float* __restrict__ average,
                                          const float* __restrict__ root,
                                          const AverageScale& average_scale,
                                          const RootScale& root_scale, const NoiseRule* noise,
                                          const Draws& draws, Wide& wide, int64_t count) {
  uint32_t bits[kStretch];
  if (noise) {
    draw(*noise, draws, bits, count);
  } else {
    std::fill_n(bits, count, kNearestCode);
  }
  for (int64_t i = 0; i < count; ++i)
    wide.average[i] = encode_average(average[i], code_divisor(average_scale(i)));
  for (int64_t i = 0; i < count; ++i)
    wide.root[i] = encode_root(root[i], code_divisor(root_scale(i)), bits[i]);
}

// By their bits, in whose order numbers are that are not negative: of integers it vectorizes.
[[gnu::always_inline]] inline float largest(const float* values, int64_t count) {
  int32_t bits = 0;
  for (int64_t i = 0; i < count; ++i)
    bits = std::max(bits, static_cast<int32_t>(bits_of(fabsf(values[i]))));
  return float_of(static_cast<uint32_t>(bits));
}

LOWRANK_CLONES
void step_float32(const AdamRule& rule, float* exp_avg, float* exp_avg_sq, float* projected,
                  float* direction, int64_t count) {
  step(rule, exp_avg, exp_avg_sq, projected, direction, count);
}

LOWRANK_CLONES
void step_bfloat16(const AdamRule& rule, uint16_t* __restrict__ exp_avg,
                   uint16_t* __restrict__ exp_avg_sq, const NoiseRule* noise, const Draws& draws,
                   float* projected, float* direction, int64_t count) {
  float average[kStretch], square[kStretch];
  for (int64_t i = 0; i < count; ++i) average[i] = from_bfloat16(exp_avg[i]);
  for (int64_t i = 0; i < count; ++i) square[i] = from_bfloat16(exp_avg_sq[i]);
  step(rule, average, square, projected, direction, count);
  for (int64_t i = 0; i < count; ++i) exp_avg[i] = to_bfloat16(average[i]);
  if (!noise) {
    for (int64_t i = 0; i < count; ++i) exp_avg_sq[i] = to_bfloat16(square[i]);
    return;
  }
  uint32_t bits[kStretch];
  draw(*noise, draws, bits, count);
  for (int64_t i = 0; i < count; ++i) exp_avg_sq[i] = to_bfloat16(square[i], bits[i]);
}

struct Codes {
  int8_t* exp_avg;
  uint8_t* exp_avg_sq;
  float* exp_avg_scale;
  float* exp_avg_sq_scale;
};

Codes codes_of(const Moments& moments, std::size_t matrix, int64_t begin, int64_t scale) {
  return {reinterpret_cast<int8_t*>(moments.exp_avg[matrix]) + begin,
          reinterpret_cast<uint8_t*>(moments.exp_avg_sq[matrix]) + begin,
          moments.exp_avg_scale[matrix] + scale, moments.exp_avg_sq_scale[matrix] + scale};
}

LOWRANK_CLONES
void step_group(const AdamRule& rule, const Codes& codes, const NoiseRule* noise,
                const Draws& draws, float* projected, float* direction, int64_t count) {
  float average[kStretch], root[kStretch];
  const float average_scale = *codes.exp_avg_scale, root_scale = *codes.exp_avg_sq_scale;
  Wide wide;
  widen(codes.exp_avg, codes.exp_avg_sq, wide, count);
  decode_and_step(
      rule, wide, [=](int64_t) { return average_scale; }, [=](int64_t) { return root_scale; },
      projected, direction, average, root, count);
  const float largest_average = largest(average, count), largest_root = largest(root, count);
  encode(
      average, root, [=](int64_t) { return largest_average; },
      [=](int64_t) { return largest_root; }, noise, draws, wide, count);
  narrow(wide, codes.exp_avg, codes.exp_avg_sq, count);
  *codes.exp_avg_scale = largest_average;
  *codes.exp_avg_sq_scale = largest_root;
}

// Of a row whose elements have a scale each, the first pass.
LOWRANK_CLONES
void step_row(const AdamRule& rule, const Codes& codes, float* projected, float* direction,
              float* average, float* root, int64_t count) {
  const float *average_scale = codes.exp_avg_scale, *root_scale = codes.exp_avg_sq_scale;
  Wide wide;
  widen(codes.exp_avg, codes.exp_avg_sq, wide, count);
  decode_and_step(
      rule, wide, [=](int64_t i) { return average_scale[i]; },
      [=](int64_t i) { return root_scale[i]; }, projected, direction, average, root, count);
}

// And the second, when the scales are those of the new moments.
LOWRANK_CLONES
void encode_row(const float* average, const float* root, const NoiseRule* noise, const Draws& draws,
                const Codes& codes, int64_t count) {
  const float *average_scale = codes.exp_avg_scale, *root_scale = codes.exp_avg_sq_scale;
  Wide wide;
  encode(
      average, root, [=](int64_t i) { return average_scale[i]; },
      [=](int64_t i) { return root_scale[i]; }, noise, draws, wide, count);
  narrow(wide, codes.exp_avg, codes.exp_avg_sq, count);
}

LOWRANK_CLONES
void raise(float* __restrict__ largest, const float* __restrict__ values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float size = fabsf(values[i]);
    largest[i] = size > largest[i] ? size : largest[i];
  }
}

Codes row_of(const Codes& codes, int64_t begin) {
  return {codes.exp_avg + begin, codes.exp_avg_sq + begin, codes.exp_avg_scale,
          codes.exp_avg_sq_scale};
}

const NoiseRule* noise_of(const Moments& moments, std::size_t matrix) {
  return moments.noise.empty() ? nullptr : &moments.noise[matrix];
}

}  // namespace

void step_stretch(const AdamRule& rule, const Moments& moments, std::size_t matrix, int64_t begin,
                  int64_t scale, const Draws& draws, float* projected, float* direction,
                  int64_t count) {
  const NoiseRule* noise = noise_of(moments, matrix);
  char *exp_avg = moments.exp_avg[matrix], *exp_avg_sq = moments.exp_avg_sq[matrix];
  switch (moments.format) {
    case Format::kFloat32:
      return step_float32(rule, reinterpret_cast<float*>(exp_avg) + begin,
                          reinterpret_cast<float*>(exp_avg_sq) + begin, projected, direction,
                          count);
    case Format::kBFloat16:
      return step_bfloat16(rule, reinterpret_cast<uint16_t*>(exp_avg) + begin,
                           reinterpret_cast<uint16_t*>(exp_avg_sq) + begin, noise, draws, projected,
                           direction, count);
    case Format::kCodes:
      return step_group(rule, codes_of(moments, matrix, begin, scale), noise, draws, projected,
                        direction, count);
  }
}

void step_columns(const AdamRule& rule, const Moments& moments, std::size_t matrix, int64_t begin,
                  int64_t scale, const Draws& draws, float* projected, float* direction,
                  int64_t rows, int64_t cols, int64_t stride) {
  const Codes codes = codes_of(moments, matrix, begin, scale);
  float average[kChannelsAScale][kColumns], root[kChannelsAScale][kColumns];
  float largest_average[kColumns] = {}, largest_root[kColumns] = {};
  for (int64_t row = 0; row < rows; ++row) {
    step_row(rule, row_of(codes, row * stride), projected + row * stride, direction + row * stride,
             average[row], root[row], cols);
    raise(largest_average, average[row], cols);
    raise(largest_root, root[row], cols);
  }
  std::copy_n(largest_average, cols, codes.exp_avg_scale);
  std::copy_n(largest_root, cols, codes.exp_avg_sq_scale);
  const NoiseRule* noise = noise_of(moments, matrix);
  for (int64_t row = 0; row < rows; ++row) {
    const Draws own{draws.channel + row, draws.place, draws.up_channels};
    encode_row(average[row], root[row], noise, own, row_of(codes, row * stride), cols);
  }
}

}  // namespace lowrank::cpu
