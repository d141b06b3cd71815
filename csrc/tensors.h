// What Python asks of all tensors of a step, in one call: torch's tensors show themselves to C by
// DLPack's exchange API (https://dmlc.github.io/dlpack), without a header of torch.
#pragma once

#include <pybind11/pybind11.h>

#include <set>
#include <string>

namespace lowrank {

struct ExchangeApi;

class TensorReader {
 public:
  // `exchange_api`: the capsule that a class of tensors has as `__dlpack_c_exchange_api__`.
  // `others`: what is asked, by the same names, where a tensor cannot be read; and
  // `is_intercepted()`, whether counters are to be left to it.
  TensorReader(const pybind11::capsule& exchange_api, pybind11::object others);

  // Equal for tensors of equal shapes, strides, dtypes and devices.
  pybind11::object layouts(const pybind11::list& tensors) const;

  // The same, and equal only if they are the same tensors at the same addresses.
  pybind11::object places(const pybind11::list& tensors) const;

  // The numbers in counters of steps, which are read if they are float32 scalars of the CPU. None
  // has a pending negation: that is not seen here.
  pybind11::object counts(const pybind11::list& counters) const;

  // Adds 1 to each.
  pybind11::object add_one(const pybind11::list& counters) const;

 private:
  template <typename Visit>
  bool each(const pybind11::list& tensors, const Visit& visit) const;
  template <typename Visit>
  bool each_counter(const pybind11::list& counters, const Visit& visit) const;

  const ExchangeApi* api_;
  pybind11::object others_;
  mutable std::set<std::string> unreadable_;  // devices that DLPack does not know
};

}  // namespace lowrank
