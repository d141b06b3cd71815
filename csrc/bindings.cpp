#include <optional>
#include <sstream>
#include <string>

#include "checks.h"
#include "cpu/passes.h"
#include "rules/channel.h"
#include "tensors.h"
#if defined(LOWRANK_CUDA)
#include "cuda/passes.h"
#define LOWRANK_ON_CUDA(pass) &cuda::pass
#else
#define LOWRANK_ON_CUDA(pass) nullptr
#endif

namespace py = pybind11;

namespace lowrank {
namespace {

// Where a pass runs: on `threads` of the CPU for device -1, else on a stream of a CUDA device.
struct Place {
  Place(int threads, int device, std::uintptr_t stream)
      : threads(threads), device(device), stream(stream) {
    require(threads >= 1, "threads must be at least 1, got ", threads);
    require(device >= -1, "device must be -1 (CPU) or a CUDA device index, got ", device);
  }

  int threads;
  int device;
  std::uintptr_t stream;
};

template <typename Pass>
struct Halves {
  void (*on_cpu)(const Pass&, int threads);
  // Enqueues and returns at once: a text if that failed, else null. Null without a CUDA half.
  const char* (*on_cuda)(const Pass&, int device, std::uintptr_t stream);
};

template <typename Pass>
void run(const char* name, const Pass& pass, const Place& place, const Halves<Pass>& halves) {
  if (place.device < 0) {
    const py::gil_scoped_release release;
    halves.on_cpu(pass, place.threads);
    return;
  }
  const std::string device = "device " + std::to_string(place.device);
  if (halves.on_cuda == nullptr) {
    throw std::runtime_error(device +
                             " needs the CUDA half of lowrank_kernels._native, and this build has "
                             "only the CPU half: install nvcc and rebuild with LOWRANK_CUDA=on");
  }
  const char* error;
  {
    const py::gil_scoped_release release;
    error = halves.on_cuda(pass, place.device, place.stream);
  }
  if (error != nullptr)
    throw std::runtime_error(std::string(name) + " on CUDA " + device + ": " + error);
}

AdamRule checked_adam(double beta1, double beta2, double eps, double bias_correction1,
                      double bias_correction2) {
  require(beta1 >= 0.0 && beta1 < 1.0, "beta1 must be in [0, 1), got ", beta1);
  require(beta2 >= 0.0 && beta2 < 1.0, "beta2 must be in [0, 1), got ", beta2);
  require(eps >= 0.0 && std::isfinite(eps), "eps must be finite and not negative, got ", eps);
  require(bias_correction1 > 0.0 && bias_correction1 <= 1.0,
          "bias_correction1 must be in (0, 1], got ", bias_correction1);
  require(bias_correction2 > 0.0 && bias_correction2 <= 1.0,
          "bias_correction2 must be in (0, 1], got ", bias_correction2);
  return AdamRule(beta1, beta2, eps, bias_correction1, bias_correction2);
}

std::vector<NoiseRule> checked_noise(const char* name, const std::vector<uint32_t>& salts,
                                     std::size_t count, uint32_t step) {
  require(salts.size() == count, name, " must have ", count, " values, got ", salts.size());
  std::vector<NoiseRule> noise;
  for (const uint32_t salt : salts) noise.emplace_back(salt, step);
  return noise;
}

// Addresses of M and V, a code of Format, of their scales, and what rounds V.
struct MomentArguments {
  const Addresses& exp_avg;
  const Addresses& exp_avg_sq;
  int format;
  const std::optional<Addresses>& exp_avg_scale;
  const std::optional<Addresses>& exp_avg_sq_scale;
  const std::optional<std::vector<uint32_t>>& salts;
  uint32_t step;
};

Moments checked_moments(const MomentArguments& arguments, const Group& group, int64_t scales,
                        ArrayChecks& checks) {
  const auto& [exp_avg, exp_avg_sq, code, exp_avg_scale, exp_avg_sq_scale, salts, step] = arguments;
  require(code >= 0 && code <= 2, "format must be 0, 1 or 2, got ", code);
  const auto format = static_cast<Format>(code);
  const bool coded = format == Format::kCodes;
  require(exp_avg_scale.has_value() == coded && exp_avg_sq_scale.has_value() == coded,
          "exp_avg_scale and exp_avg_sq_scale go with codes");
  require(!salts || format != Format::kFloat32, "moment_salts are for fewer than 32 bits");
  return {
      format,
      checks.dense("exp_avg", exp_avg, group.elements(), size_of(format), true),
      checks.dense("exp_avg_sq", exp_avg_sq, group.elements(), size_of(format), true),
      coded ? checks.dense("exp_avg_scale", *exp_avg_scale, scales, true) : Arrays{},
      coded ? checks.dense("exp_avg_sq_scale", *exp_avg_sq_scale, scales, true) : Arrays{},
      salts ? checked_noise("moment_salts", *salts, group.count, step) : std::vector<NoiseRule>{}};
}

void adam_moments(const MatrixArguments& product, const Addresses& projected,
                  const Addresses& exp_avg, const Addresses& exp_avg_sq, const Addresses& direction,
                  const std::optional<Addresses>& direction_sq,
                  const std::optional<Addresses>& projected_sq, int64_t rows, int64_t cols,
                  bool channels_are_rows, double beta1, double beta2, double eps,
                  double bias_correction1, double bias_correction2, int format,
                  const std::optional<Addresses>& exp_avg_scale,
                  const std::optional<Addresses>& exp_avg_sq_scale,
                  const std::optional<std::vector<uint32_t>>& moment_salts, uint32_t step,
                  int threads, int device, std::uintptr_t stream) {
  require(direction_sq.has_value() == projected_sq.has_value(),
          "direction_sq and projected_sq go together");
  const AdamRule rule = checked_adam(beta1, beta2, eps, bias_correction1, bias_correction2);
  const Place place(threads, device, stream);
  const Group group = checked_group(projected.size(), rows, cols, channels_are_rows);
  const int64_t scales = channels_are_rows ? groups_of(rows, kChannelsAScale) * cols
                                           : rows * groups_of(cols, kChannelsAScale);
  ArrayChecks checks(group);
  const auto& [products, code, stride] = product;
  // The product may be converted in place, which for float32 is no conversion at all.
  const bool in_place = products == projected && code == 0 && stride == cols;
  Matrices read = in_place ? ArrayChecks(group).matrices("product", product, false)
                           : checks.matrices("product", product, false);
  const MomentArguments moments{exp_avg,          exp_avg_sq,   format, exp_avg_scale,
                                exp_avg_sq_scale, moment_salts, step};
  const AdamMoments pass{
      group,
      std::move(read),
      checks.elements("projected", projected, true),
      checks.elements("direction", direction, true),
      checked_moments(moments, group, scales, checks),
      direction_sq ? checks.channels("direction_sq", *direction_sq, true) : Arrays{},
      projected_sq ? checks.channels("projected_sq", *projected_sq, true) : Arrays{},
      rule};
  checks.no_overlap();
  run("adam_moments", pass, place, {&cpu::adam_moments, LOWRANK_ON_CUDA(adam_moments)});
}

void residual_sums(const MatrixArguments& matrix, const Addresses& residual_sq,
                   const std::optional<Addresses>& projected_sq, int64_t rows, int64_t cols,
                   bool channels_are_rows, double kappa, int threads, int device,
                   std::uintptr_t stream) {
  require_finite("kappa", kappa);
  const Place place(threads, device, stream);
  const Group group = checked_group(residual_sq.size(), rows, cols, channels_are_rows);
  ArrayChecks checks(group);
  const ResidualSums pass{
      group, checks.matrices("matrix", matrix, false),
      checks.channels("residual_sq", residual_sq, true),
      projected_sq ? checks.channels("projected_sq", *projected_sq, false) : Arrays{},
      static_cast<float>(2.0 * kappa - kappa * kappa)};
  checks.no_overlap();
  run("residual_sums", pass, place, {&cpu::residual_sums, LOWRANK_ON_CUDA(residual_sums)});
}

void channel_scale(const Addresses& direction_sq, const Addresses& projected_sq,
                   const Addresses& residual_sq, const Addresses& limiter_norm,
                   const Addresses& factor, int64_t channels, int threads, int device,
                   std::uintptr_t stream) {
  require(channels >= 0, "channels must not be negative, got ", channels);
  const Place place(threads, device, stream);
  const Group group = checked_group(factor.size(), channels, 1, true);
  ArrayChecks checks(group);
  const ChannelScale pass{group,
                          checks.channels("direction_sq", direction_sq, false),
                          checks.channels("projected_sq", projected_sq, false),
                          checks.channels("residual_sq", residual_sq, false),
                          checks.dense("limiter_norm", limiter_norm, 1, true),
                          checks.channels("factor", factor, true)};
  checks.no_overlap();
  run("channel_scale", pass, place, {&cpu::channel_scale, LOWRANK_ON_CUDA(channel_scale)});
}

void combine(const Addresses& direction, const Addresses& projected,
             const std::optional<Addresses>& factor, const MatrixArguments& combined, int64_t rows,
             int64_t cols, bool channels_are_rows, double scale, double rho_kappa, int threads,
             int device, std::uintptr_t stream) {
  require_finite("scale", scale);
  require_finite("rho_kappa", rho_kappa);
  const Place place(threads, device, stream);
  const Group group = checked_group(direction.size(), rows, cols, channels_are_rows);
  ArrayChecks checks(group);
  const Combine pass{group,
                     checks.elements("direction", direction, false),
                     checks.elements("projected", projected, false),
                     factor ? checks.channels("factor", *factor, false) : Arrays{},
                     checks.matrices("combined", combined, true),
                     CombineRule(scale, rho_kappa)};
  checks.no_overlap();
  run("combine", pass, place, {&cpu::combine, LOWRANK_ON_CUDA(combine)});
}

void update(const MatrixArguments& param, const MatrixArguments& product,
            const std::optional<MatrixArguments>& grad, const std::optional<Addresses>& factor,
            int64_t rows, int64_t cols, bool channels_are_rows, double step_size, double decay,
            double rho, const std::optional<std::vector<uint32_t>>& salts, uint32_t step,
            int64_t first_row, int64_t first_col, int threads, int device, std::uintptr_t stream) {
  require_finite("step_size", step_size);
  require_finite("decay", decay);
  require_finite("rho", rho);
  require(grad.has_value() == factor.has_value(), "grad and factor go together");
  require(first_row >= 0 && first_col >= 0, "first_row and first_col must not be negative");
  const Place place(threads, device, stream);
  const std::size_t count = std::get<0>(param).size();
  const Group group = checked_group(count, rows, cols, channels_are_rows);
  ArrayChecks checks(group);
  Update pass{group,
              checks.matrices("param", param, true),
              grad ? checks.matrices("grad", *grad, false) : Matrices{},
              checks.matrices("product", product, false),
              factor ? checks.channels("factor", *factor, false) : Arrays{},
              UpdateRule(step_size, decay, rho),
              {},
              first_row,
              first_col};
  checks.no_overlap();
  if (salts) {
    require(pass.param.dtype == DType::kBFloat16, "salts are for a bfloat16 param only");
    pass.noise = checked_noise("salts", *salts, count, step);
  }
  run("update", pass, place, {&cpu::update, LOWRANK_ON_CUDA(update)});
}

void adamw(const MatrixArguments& param, const MatrixArguments& grad, const Addresses& exp_avg,
           const Addresses& exp_avg_sq, int64_t elements, double step_size, double decay,
           double beta1, double beta2, double eps, double bias_correction1, double bias_correction2,
           int format, const std::optional<Addresses>& exp_avg_scale,
           const std::optional<Addresses>& exp_avg_sq_scale,
           const std::optional<std::vector<uint32_t>>& moment_salts, uint32_t step, int threads) {
  require_finite("step_size", step_size);
  require_finite("decay", decay);
  require(elements >= 0, "elements must not be negative, got ", elements);
  const AdamRule adam = checked_adam(beta1, beta2, eps, bias_correction1, bias_correction2);
  const Place place(threads, -1, 0);
  const Group group = checked_group(std::get<0>(param).size(), 1, elements, true);
  ArrayChecks checks(group);
  const MomentArguments moments{exp_avg,          exp_avg_sq,   format, exp_avg_scale,
                                exp_avg_sq_scale, moment_salts, step};
  const AdamW pass{group,
                   checks.matrices("param", param, true),
                   checks.matrices("grad", grad, false),
                   checked_moments(moments, group, groups_of(elements, kElementsAScale), checks),
                   adam,
                   StepRule(step_size, decay)};
  checks.no_overlap();
  run("adamw", pass, place, {&cpu::adamw, nullptr});
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
  module.doc() = "The compiled half of lowrank_kernels: addresses and sizes, no torch.";
  module.def("adam_moments", &lowrank::adam_moments, py::kw_only(), "product"_a, "projected"_a,
             "exp_avg"_a, "exp_avg_sq"_a, "direction"_a, "direction_sq"_a, "projected_sq"_a,
             "rows"_a, "cols"_a, "channels_are_rows"_a, "beta1"_a, "beta2"_a, "eps"_a,
             "bias_correction1"_a, "bias_correction2"_a, "format"_a = 0,
             "exp_avg_scale"_a = py::none(), "exp_avg_sq_scale"_a = py::none(),
             "moment_salts"_a = py::none(), "step"_a = 0, "threads"_a, "device"_a = -1,
             "stream"_a = 0);
  module.def("residual_sums", &lowrank::residual_sums, py::kw_only(), "matrix"_a, "residual_sq"_a,
             "projected_sq"_a, "rows"_a, "cols"_a, "channels_are_rows"_a, "kappa"_a, "threads"_a,
             "device"_a = -1, "stream"_a = 0);
  module.def("channel_scale", &lowrank::channel_scale, py::kw_only(), "direction_sq"_a,
             "projected_sq"_a, "residual_sq"_a, "limiter_norm"_a, "factor"_a, "channels"_a,
             "threads"_a, "device"_a = -1, "stream"_a = 0);
  module.def("combine", &lowrank::combine, py::kw_only(), "direction"_a, "projected"_a, "factor"_a,
             "combined"_a, "rows"_a, "cols"_a, "channels_are_rows"_a, "scale"_a, "rho_kappa"_a,
             "threads"_a, "device"_a = -1, "stream"_a = 0);
  module.def("update", &lowrank::update, py::kw_only(), "param"_a, "product"_a, "grad"_a,
             "factor"_a, "rows"_a, "cols"_a, "channels_are_rows"_a, "step_size"_a, "decay"_a,
             "rho"_a, "salts"_a, "step"_a, "first_row"_a, "first_col"_a, "threads"_a,
             "device"_a = -1, "stream"_a = 0);
  module.def("adamw", &lowrank::adamw, py::kw_only(), "param"_a, "grad"_a, "exp_avg"_a,
             "exp_avg_sq"_a, "elements"_a, "step_size"_a, "decay"_a, "beta1"_a, "beta2"_a, "eps"_a,
             "bias_correction1"_a, "bias_correction2"_a, "format"_a = 0,
             "exp_avg_scale"_a = py::none(), "exp_avg_sq_scale"_a = py::none(),
             "moment_salts"_a = py::none(), "step"_a = 0, "threads"_a);
  module.def("build_info", &lowrank::build_info);
  using lowrank::TensorReader;
  py::class_<TensorReader>(module, "TensorReader")
      .def(py::init<const py::capsule&, py::object>(), "exchange_api"_a, "others"_a)
      .def("layouts", &TensorReader::layouts)
      .def("places", &TensorReader::places)
      .def("counts", &TensorReader::counts)
      .def("add_one", &TensorReader::add_one);
}
