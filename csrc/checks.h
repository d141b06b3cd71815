// Checks of everything that enters from Python; each error names the argument.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <sstream>
#include <tuple>
#include <vector>

#include "arguments.h"

namespace lowrank {

using Addresses = std::vector<std::uintptr_t>;
// Addresses, a code of DType, elements from row to row.
using MatrixArguments = std::tuple<Addresses, int, int64_t>;

// The message is put together only if it is needed.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw pybind11::value_error(message.str());
}

inline void require_finite(const char* name, double value) {
  require(std::isfinite(value), name, " must be finite, got ", value);
}

inline Group checked_group(std::size_t count, int64_t rows, int64_t cols, bool channels_are_rows) {
  constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 8;
  require(rows >= 0, "rows must not be negative, got ", rows);
  require(cols >= 0, "cols must not be negative, got ", cols);
  require(cols == 0 || rows <= kMaxElements / cols, "rows * cols overflows: ", rows, " * ", cols);
  require(rows <= kMaxElements && cols <= kMaxElements, "the number of channels overflows");
  return {count, rows, cols, channels_are_rows};
}

// Checks the arrays of one pass as they are handed over, and at last that none which is written
// overlaps another.
class ArrayChecks {
 public:
  explicit ArrayChecks(const Group& group) : group_(group) {}

  Arrays elements(const char* name, const Addresses& addresses, bool written) {
    return dense(name, addresses, group_.elements(), written);
  }

  Arrays channels(const char* name, const Addresses& addresses, bool written) {
    return dense(name, addresses, group_.channels(), written);
  }

  Arrays dense(const char* name, const Addresses& addresses, int64_t size, bool written) {
    check(name, addresses, size, size, sizeof(float), written);
    return pointers<float>(addresses);
  }

  // Dense arrays of another type.
  std::vector<char*> dense(const char* name, const Addresses& addresses, int64_t size,
                           int64_t bytes, bool written) {
    check(name, addresses, size, size, bytes, written);
    return pointers<char>(addresses);
  }

  Matrices matrices(const char* name, const MatrixArguments& arguments, bool written) {
    const auto& [addresses, code, stride] = arguments;
    require(code >= 0 && code <= 2, name, " has an unknown dtype code ", code);
    require(stride >= group_.cols || group_.rows <= 1, name, " has rows of ", group_.cols,
            " elements but a stride of ", stride);
    const int64_t gaps = std::max<int64_t>(0, group_.rows - 1);
    constexpr int64_t kMaxExtent = std::numeric_limits<int64_t>::max() / 8;
    require(gaps == 0 || stride <= (kMaxExtent - group_.cols) / gaps, name,
            " has a stride that overflows: ", stride);
    const auto dtype = static_cast<DType>(code);
    const int64_t extent = group_.elements() == 0 ? 0 : gaps * stride + group_.cols;
    check(name, addresses, group_.elements(), extent, size_of(dtype), written);
    return {pointers<char>(addresses), dtype, stride};
  }

  void no_overlap() {
    std::sort(spans_.begin(), spans_.end(),
              [](const Span& a, const Span& b) { return a.begin < b.begin; });
    for (std::size_t i = 0; i < spans_.size(); ++i) {
      for (std::size_t j = i + 1; j < spans_.size() && spans_[j].begin < spans_[i].end; ++j) {
        require(!spans_[i].written && !spans_[j].written, spans_[i].name, " overlaps ",
                spans_[j].name);
      }
    }
  }

 private:
  struct Span {
    const char* name;
    std::uintptr_t begin, end;
    bool written;
  };

  template <typename T>
  static std::vector<T*> pointers(const Addresses& addresses) {
    std::vector<T*> result;
    for (const std::uintptr_t address : addresses) result.push_back(reinterpret_cast<T*>(address));
    return result;
  }

  void check(const char* name, const Addresses& addresses, int64_t size, int64_t extent,
             int64_t bytes, bool written) {
    require(addresses.size() == group_.count, name, " must have ", group_.count, " addresses, got ",
            addresses.size());
    for (const std::uintptr_t address : addresses) {
      require(size == 0 || address != 0, name, " is a null pointer but has ", size, " elements");
      require(address % static_cast<std::uintptr_t>(bytes) == 0, name, " is not aligned to ", bytes,
              " bytes");
      const std::uintptr_t end = address + static_cast<std::uintptr_t>(extent * bytes);
      require(end >= address, name, " runs past the end of the address space");
      // Others may lie between the rows of a strided matrix: only dense ones are compared.
      if (size > 0 && extent == size) spans_.push_back({name, address, end, written});
    }
  }

  Group group_;
  std::vector<Span> spans_;
};

}  // namespace lowrank
