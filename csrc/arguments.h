// What each pass works on. A pass serves a group: `count` matrices that are equal in all but their
// addresses, every list has an entry for each, and a channel is a row or a column.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "rules/adam.h"
#include "rules/codes.h"
#include "rules/noise.h"
#include "rules/update.h"

namespace lowrank {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

inline int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Elements of a row are adjacent, `stride` elements lie from row to row.
struct Matrices {
  std::vector<char*> data;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;

  char* at(std::size_t matrix, int64_t row, int64_t col) const {
    return data[matrix] + (row * stride + col) * size_of(dtype);
  }
};

using Arrays = std::vector<float*>;

struct Group {
  std::size_t count;
  int64_t rows;
  int64_t cols;
  bool channels_are_rows;

  int64_t channels() const { return channels_are_rows ? rows : cols; }
  int64_t elements() const { return rows * cols; }
};

// How M and V are stored.
enum class Format : int { kFloat32 = 0, kBFloat16 = 1, kCodes = 2 };

inline int64_t size_of(Format format) {
  return format == Format::kFloat32 ? 4 : format == Format::kBFloat16 ? 2 : 1;
}

// M and V of each matrix, dense, and of codes the scales, a group of channels after the other on
// the right, a direction after the other on the left. V that is not float32 is rounded by noise, or
// to the nearest where there is none.
struct Moments {
  Format format;
  std::vector<char*> exp_avg, exp_avg_sq;
  Arrays exp_avg_scale, exp_avg_sq_scale;
  std::vector<NoiseRule> noise;
};

// The product R arrives in any dtype and stride and leaves as `projected`, which may be the same
// memory. All arrays are dense. Without a residual nobody asks for the sums, and they are empty.
struct AdamMoments {
  Group group;
  Matrices product;
  Arrays projected, direction;
  Moments moments;
  Arrays direction_sq, projected_sq;
  AdamRule rule;
};

// Whole parameters, each a dense row.
struct AdamW {
  Group group;
  Matrices param, grad;
  Moments moments;
  AdamRule adam;
  StepRule rule;
};

// Squared norms of the channels of `matrix`, less `share` of those in `projected_sq` if there are.
struct ResidualSums {
  Group group;
  Matrices matrix;
  Arrays residual_sq, projected_sq;
  float share;
};

struct ChannelScale {
  Group group;  // rows x 1
  Arrays direction_sq, projected_sq, residual_sq;
  Arrays limiter_norm, factor;
};

// Without factors, GaLore's: then `projected` is not read.
struct Combine {
  Group group;
  Arrays direction, projected, factor;
  Matrices combined;
  CombineRule rule;
};

// Without factors, GaLore's: then there is no gradient. The matrices may be a part of larger ones:
// with noise, (first_row, first_col) is its place there.
struct Update {
  Group group;
  Matrices param, grad, product;
  Arrays factor;
  UpdateRule rule;
  std::vector<NoiseRule> noise;
  int64_t first_row, first_col;
};

}  // namespace lowrank
