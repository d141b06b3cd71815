#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/adam_moments.h"
#if defined(LOWRANK_CUDA)
#include "cuda/adam_moments.h"
#endif

namespace py = pybind11;

namespace lowrank {
namespace {

struct Array {
  const char* name;
  std::uintptr_t address;
  int64_t size;

  std::uintptr_t end() const { return address + static_cast<std::uintptr_t>(size) * sizeof(float); }
};

void require(bool condition, const std::string& message) {
  if (!condition) throw py::value_error(message);
}

template <std::size_t kCount>
void check_arrays(const std::array<Array, kCount>& arrays) {
  for (const Array& array : arrays) {
    require(array.size == 0 || array.address != 0, std::string(array.name) +
                                                       " is a null pointer but has " +
                                                       std::to_string(array.size) + " elements");
    require(array.address % alignof(float) == 0,
            std::string(array.name) + " is not aligned to 4 bytes");
    require(array.end() >= array.address,
            std::string(array.name) + " runs past the end of the address space");
  }
  for (std::size_t i = 0; i < kCount; ++i) {
    for (std::size_t j = i + 1; j < kCount; ++j) {
      const bool overlap =
          arrays[i].address < arrays[j].end() && arrays[j].address < arrays[i].end();
      require(!overlap, std::string(arrays[i].name) + " overlaps " + arrays[j].name);
    }
  }
}

void check_size(const char* name, int64_t size) {
  require(size >= 0, std::string(name) + " must not be negative, got " + std::to_string(size));
}

void check_beta(const char* name, double beta) {
  require(beta >= 0.0 && beta < 1.0,
          std::string(name) + " must be in [0, 1), got " + std::to_string(beta));
}

void check_bias_correction(const char* name, double correction) {
  require(correction > 0.0 && correction <= 1.0,
          std::string(name) + " must be in (0, 1], got " + std::to_string(correction));
}

void run_on_device(const AdamArrays& arrays, const AdamRule& rule, int device,
                   std::uintptr_t stream) {
#if defined(LOWRANK_CUDA)
  cudaError_t error;
  {
    const py::gil_scoped_release release;
    error = cuda::adam_moments(arrays, rule, device, reinterpret_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) {
    throw std::runtime_error("adam_moments on CUDA device " + std::to_string(device) + ": " +
                             cudaGetErrorString(error));
  }
#else
  (void)arrays, (void)rule, (void)stream;
  throw std::runtime_error("device " + std::to_string(device) +
                           " needs the CUDA half of lowrank_kernels._native, and this build has "
                           "only the CPU half: install nvcc and rebuild with LOWRANK_CUDA=on");
#endif
}

void adam_moments(std::uintptr_t projected, std::uintptr_t exp_avg, std::uintptr_t exp_avg_sq,
                  std::uintptr_t direction, std::uintptr_t direction_sq,
                  std::uintptr_t projected_sq, int64_t rows, int64_t cols, bool channels_are_rows,
                  double beta1, double beta2, double eps, double bias_correction1,
                  double bias_correction2, int threads, int device, std::uintptr_t stream) {
  check_size("rows", rows);
  check_size("cols", cols);
  constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / sizeof(float);
  require(cols == 0 || rows <= kMaxElements / cols,
          "rows * cols overflows: " + std::to_string(rows) + " * " + std::to_string(cols));
  check_beta("beta1", beta1);
  check_beta("beta2", beta2);
  require(eps >= 0.0 && std::isfinite(eps),
          "eps must be finite and not negative, got " + std::to_string(eps));
  check_bias_correction("bias_correction1", bias_correction1);
  check_bias_correction("bias_correction2", bias_correction2);
  require(threads >= 1, "threads must be at least 1, got " + std::to_string(threads));
  require(device >= -1,
          "device must be -1 (CPU) or a CUDA device index, got " + std::to_string(device));

  const int64_t elements = rows * cols;
  const int64_t channels = channels_are_rows ? rows : cols;
  require(channels <= kMaxElements, "the number of channels overflows");
  check_arrays<6>({{{"projected", projected, elements},
                    {"exp_avg", exp_avg, elements},
                    {"exp_avg_sq", exp_avg_sq, elements},
                    {"direction", direction, elements},
                    {"direction_sq", direction_sq, channels},
                    {"projected_sq", projected_sq, channels}}});

  const auto floats = [](std::uintptr_t address) { return reinterpret_cast<float*>(address); };
  const AdamArrays arrays{floats(projected),
                          floats(exp_avg),
                          floats(exp_avg_sq),
                          floats(direction),
                          floats(direction_sq),
                          floats(projected_sq),
                          rows,
                          cols,
                          channels_are_rows};
  const AdamRule rule(beta1, beta2, eps, bias_correction1, bias_correction2);
  if (device >= 0) {
    run_on_device(arrays, rule, device, stream);
  } else {
    const py::gil_scoped_release release;
    cpu::adam_moments(arrays, rule, threads);
  }
}

std::vector<std::string> words(const char* text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string word; stream >> word;) result.push_back(word);
  return result;
}

py::dict build_info() {
  using namespace py::literals;
#if defined(LOWRANK_CUDA)
  const std::optional<std::string> cuda = LOWRANK_CUDA;
#else
  const std::optional<std::string> cuda;
#endif
#if defined(_OPENMP)
  const bool openmp = true;
#else
  const bool openmp = false;
#endif
  return py::dict("version"_a = LOWRANK_VERSION, "compiler"_a = LOWRANK_COMPILER, "cuda"_a = cuda,
                  "cuda_architectures"_a = words(LOWRANK_CUDA_ARCHITECTURES), "openmp"_a = openmp,
                  "cpu_capability"_a = cpu::cpu_capability());
}

}  // namespace
}  // namespace lowrank

PYBIND11_MODULE(_native, module) {
  using namespace py::literals;
  module.doc() = "The compiled half of lowrank_kernels: pointers and sizes, no torch.";
  module.def("adam_moments", &lowrank::adam_moments, "projected"_a, "exp_avg"_a, "exp_avg_sq"_a,
             "direction"_a, "direction_sq"_a, "projected_sq"_a, "rows"_a, "cols"_a,
             "channels_are_rows"_a, "beta1"_a, "beta2"_a, "eps"_a, "bias_correction1"_a,
             "bias_correction2"_a, "threads"_a, "device"_a = -1, "stream"_a = 0);
  module.def("build_info", &lowrank::build_info);
}
