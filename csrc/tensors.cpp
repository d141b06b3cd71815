#include "tensors.h"

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"

namespace py = pybind11;

namespace lowrank {

// The binary interface of DLPack 1, as far as it is read here.
struct DLTensor {
  char* data;
  int32_t device_type, device_index;
  int32_t dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;

  char* address() const { return data + byte_offset; }
};
static_assert(sizeof(DLTensor) == 48, "DLPack 1 has tensors of 48 bytes");

struct ExchangeApi {
  uint32_t major, minor;
  const ExchangeApi* older;
  void (*allocate)();
  void (*from_object)();
  void (*to_object)();
  int (*borrow)(PyObject* object, DLTensor* tensor);  // 0, or a Python exception is set
  void (*stream)();
};

namespace {

constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2;
constexpr float kMaxCount = 16777216.0f;  // from here on adding 1 changes no float32

// Such as "cpu"; empty of what is no tensor.
std::string device_of(const py::object& tensor) {
  const py::object device = py::getattr(tensor, "device", py::none());
  return py::cast<std::string>(py::str(py::getattr(device, "type", py::str(""))));
}

void append_layout(std::vector<int64_t>& words, const DLTensor& tensor) {
  words.push_back(int64_t{tensor.device_type} << 32 | tensor.device_index);
  words.push_back(int64_t{tensor.dimensions} << 32 | tensor.lanes << 16 | tensor.code << 8 |
                  tensor.bits);
  words.insert(words.end(), tensor.shape, tensor.shape + tensor.dimensions);
  words.insert(words.end(), tensor.strides, tensor.strides + tensor.dimensions);
}

py::bytes as_bytes(const std::vector<int64_t>& words) {
  return {reinterpret_cast<const char*>(words.data()), words.size() * sizeof(int64_t)};
}

}  // namespace

TensorReader::TensorReader(const py::capsule& exchange_api, py::object others)
    : api_(static_cast<const ExchangeApi*>(
          PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"))),
      others_(std::move(others)) {
  if (api_ == nullptr) throw py::error_already_set();
  require(api_->major == 1, "DLPack 1 is read here, not ", api_->major);
  require(api_->borrow != nullptr, "these tensors cannot be read without being exported");
}

// False as soon as a tensor cannot be read, which takes torch milliseconds to say.
template <typename Visit>
bool TensorReader::each(const py::list& tensors, const Visit& visit) const {
  if (!unreadable_.empty() && !tensors.empty() && unreadable_.count(device_of(tensors[0])))
    return false;
  // A tensor of another class may run Python code when it is asked, which may change the list.
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(tensors.ptr()); ++i) {
    const auto object = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(tensors.ptr(), i));
    DLTensor tensor;
    if (api_->borrow(object.ptr(), &tensor) != 0) {
      if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
      PyErr_Clear();
      const std::string device = device_of(object);
      if (device != "cpu" && device != "cuda") unreadable_.insert(device);
      return false;
    }
    visit(object, tensor);
  }
  return true;
}

// Visits none unless all are counters of steps that can be read and written as they lie in memory.
template <typename Visit>
bool TensorReader::each_counter(const py::list& counters, const Visit& visit) const {
  if (py::cast<bool>(others_.attr("is_intercepted")())) return false;
  std::vector<float*> found;
  const bool read = each(counters, [&](py::handle, const DLTensor& tensor) {
    const bool is_float32 = tensor.code == kFloat && tensor.bits == 32 && tensor.lanes == 1;
    const bool is_scalar = tensor.dimensions == 0 && tensor.data != nullptr;
    if (tensor.device_type != kCpu || !is_float32 || !is_scalar) return;
    auto* counter = reinterpret_cast<float*>(tensor.address());
    const bool is_aligned = reinterpret_cast<std::uintptr_t>(counter) % alignof(float) == 0;
    if (is_aligned && *counter >= 0.0f && *counter < kMaxCount) found.push_back(counter);
  });
  if (!read || found.size() != counters.size()) return false;
  for (float* counter : found) visit(*counter);
  return true;
}

py::object TensorReader::layouts(const py::list& tensors) const {
  std::vector<int64_t> words;
  const bool read =
      each(tensors, [&](py::handle, const DLTensor& tensor) { append_layout(words, tensor); });
  return read ? as_bytes(words) : others_.attr("layouts")(tensors);
}

py::object TensorReader::places(const py::list& tensors) const {
  std::vector<int64_t> words;
  const bool read = each(tensors, [&](py::handle object, const DLTensor& tensor) {
    words.push_back(reinterpret_cast<int64_t>(object.ptr()));
    words.push_back(reinterpret_cast<int64_t>(tensor.address()));
    append_layout(words, tensor);
  });
  return read ? as_bytes(words) : others_.attr("places")(tensors);
}

py::object TensorReader::counts(const py::list& counters) const {
  std::vector<int64_t> found;
  const bool read = each_counter(
      counters, [&](const float& counter) { found.push_back(static_cast<int64_t>(counter)); });
  return read ? py::cast(found) : others_.attr("counts")(counters);
}

py::object TensorReader::add_one(const py::list& counters) const {
  const bool read = each_counter(counters, [](float& counter) { counter += 1.0f; });
  return read ? py::none() : others_.attr("add_one")(counters);
}

}  // namespace lowrank
