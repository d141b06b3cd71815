#include "cpu/moments.h"

#include <algorithm>

#include "cpu/clones.h"
#include "cpu/resize.h"
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

// Codes as they are computed with.
struct Wide {
  int32_t average[kStretch];
  int32_t root[kStretch];
};

// Of M and of the root of V.
struct Largest {
  float average;
  float root;
};

// M and the root of V of some elements, each with a scale, and the largest of them. Those are found
// by their bits, in whose order numbers are that are not negative: of integers it vectorizes.
template <typename AverageScale, typename RootScale>
[[gnu::always_inline]] inline Largest decode_and_step(
    const AdamRule& shared_rule, const Wide& wide, const AverageScale& average_scale,
    const RootScale& root_scale, float* __restrict__ projected, float* __restrict__ direction,
    float* __restrict__ average, float* __restrict__ root, int64_t count) {
  const AdamRule rule = shared_rule;
  int32_t average_bits = 0, root_bits = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float old_root = decode_root(wide.root[i], root_scale(i));
    const AdamElement out =
        rule(projected[i], decode_average(wide.average[i], average_scale(i)), old_root * old_root);
    projected[i] = out.projected;
    direction[i] = out.direction;
    average[i] = out.exp_avg;
    const float new_root = sqrtf(out.exp_avg_sq);
    root[i] = new_root;
    average_bits = std::max(average_bits, static_cast<int32_t>(bits_of(fabsf(out.exp_avg))));
    root_bits = std::max(root_bits, static_cast<int32_t>(bits_of(new_root)));
  }
  return {float_of(static_cast<uint32_t>(average_bits)),
          float_of(static_cast<uint32_t>(root_bits))};
}

template <typename AverageScale, typename RootScale, typename Bits>
[[gnu::always_inline]] inline void encode(const float* __restrict__ average,
                                          const float* __restrict__ root,
                                          const AverageScale& average_scale,
                                          const RootScale& root_scale, const Bits& bits, Wide& wide,
                                          int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    wide.average[i] = encode_average(average[i], code_divisor(average_scale(i)));
    wide.root[i] =
        encode_root(root[i], code_divisor(root_scale(i)), bits(static_cast<uint32_t>(i)));
  }
}

// Calls work(bits), where bits(i) rounds element i.
template <typename Work>
[[gnu::always_inline]] inline void with_bits(const NoiseRule* noise, const Draws& draws,
                                             const Work& work) {
  const auto channel = static_cast<uint32_t>(draws.channel);
  const auto place = static_cast<uint32_t>(draws.place);
  if (!noise) {
    work([](uint32_t) { return kNearestCode; });
  } else if (draws.up_channels) {
    const NoiseRule own = *noise;
    work([=](uint32_t i) { return own(channel + i, place); });
  } else {
    const ChannelNoise own = noise->of_channel(channel);
    work([=](uint32_t i) { return own(place + i); });
  }
}

LOWRANK_CLONES
void step_float32(const AdamRule& rule, float* exp_avg, float* exp_avg_sq, float* projected,
                  float* direction, int64_t count) {
  step(rule, exp_avg, exp_avg_sq, projected, direction, count);
}

LOWRANK_CLONES
void step_bfloat16(const AdamRule& rule, uint16_t* exp_avg, uint16_t* exp_avg_sq,
                   const NoiseRule* noise, const Draws& draws, float* projected, float* direction,
                   int64_t count) {
  float average[kStretch], square[kStretch];
  uint32_t wide[kStretch];
  resize(exp_avg, wide, count);
  for (int64_t i = 0; i < count; ++i) average[i] = from_bfloat16(wide[i]);
  resize(exp_avg_sq, wide, count);
  for (int64_t i = 0; i < count; ++i) square[i] = from_bfloat16(wide[i]);
  step(rule, average, square, projected, direction, count);
  for (int64_t i = 0; i < count; ++i) wide[i] = wide_bfloat16(average[i]);
  resize(wide, exp_avg, count);
  if (noise) {
    with_bits(noise, draws, [&](const auto& bits) LOWRANK_INLINE {
      for (int64_t i = 0; i < count; ++i)
        wide[i] = wide_bfloat16(square[i], bits(static_cast<uint32_t>(i)));
    });
  } else {
    for (int64_t i = 0; i < count; ++i) wide[i] = wide_bfloat16(square[i]);
  }
  resize(wide, exp_avg_sq, count);
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
  resize(codes.exp_avg, wide.average, count);
  resize(codes.exp_avg_sq, wide.root, count);
  const Largest largest = decode_and_step(
      rule, wide, [=](int64_t) { return average_scale; }, [=](int64_t) { return root_scale; },
      projected, direction, average, root, count);
  with_bits(noise, draws, [&](const auto& bits) LOWRANK_INLINE {
    encode(
        average, root, [=](int64_t) { return largest.average; },
        [=](int64_t) { return largest.root; }, bits, wide, count);
  });
  resize(wide.average, codes.exp_avg, count);
  resize(wide.root, codes.exp_avg_sq, count);
  *codes.exp_avg_scale = largest.average;
  *codes.exp_avg_sq_scale = largest.root;
}

// Of a row whose elements have a scale each, the first pass.
LOWRANK_CLONES
void step_row(const AdamRule& rule, const Codes& codes, float* projected, float* direction,
              float* average, float* root, int64_t count) {
  const float *average_scale = codes.exp_avg_scale, *root_scale = codes.exp_avg_sq_scale;
  Wide wide;
  resize(codes.exp_avg, wide.average, count);
  resize(codes.exp_avg_sq, wide.root, count);
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
  with_bits(noise, draws, [&](const auto& bits) LOWRANK_INLINE {
    encode(
        average, root, [=](int64_t i) { return average_scale[i]; },
        [=](int64_t i) { return root_scale[i]; }, bits, wide, count);
  });
  resize(wide.average, codes.exp_avg, count);
  resize(wide.root, codes.exp_avg_sq, count);
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
