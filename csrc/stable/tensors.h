// Checking, converting and allocating tensors through LibTorch's stable ABI. Used by the registration files alone:
// kernels see pointers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedreg::stable {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string text(const Shape& shape) {
  std::ostringstream result;
  result << "(";
  for (size_t i = 0; i < shape.size(); ++i) result << (i ? ", " : "") << shape[i];
  result << (shape.size() == 1 ? ",)" : ")");
  return result.str();
}

inline const char* text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return torch::headeronly::toString(type);
  }
}

inline Shape shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

// What every tensor of one call must satisfy, named for its messages.
struct Expectation {
  const char* operator_name;
  bool cpu;  // otherwise CUDA, all on one device
  int32_t device_index;

  // Fails unless `tensor` is on the device, of the type, and of the shape; `symbols` is the shape in letters.
  void check(const char* name, const Tensor& tensor, ScalarType type, const char* symbols, const Shape& shape) const {
    if (cpu ? !tensor.is_cpu() : (!tensor.is_cuda() || tensor.get_device_index() != device_index)) {
      fail(operator_name, ": ", name, ": expected a tensor on the device of input, got one elsewhere; move it there");
    }
    if (tensor.scalar_type() != type) {
      fail(operator_name, ": ", name, ": expected dtype ", text(type), ", got ", text(tensor.scalar_type()),
           "; convert it with .to()");
    }
    if (const Shape got = shape_of(tensor); got != shape) {
      fail(operator_name, ": ", name, ": expected shape ", symbols, " = ", text(shape), ", got ", text(got));
    }
  }

  // The same, and afterwards `tensor` is contiguous. Gradients often are not: that of y.sum() is one number, expanded.
  void check_contiguous(const char* name, Tensor& tensor, ScalarType type, const char* symbols,
                        const Shape& shape) const {
    check(name, tensor, type, symbols, shape);
    if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
  }

  void check_contiguous(const char* name, OptionalTensor& tensor, ScalarType type, const char* symbols,
                        const Shape& shape) const {
    if (tensor) check_contiguous(name, *tensor, type, symbols, shape);
  }

  // The same for (T, B, features), of which only the features need to lie next to each other.
  void check_strided(const char* name, Tensor& tensor, ScalarType type, const char* symbols, const Shape& shape) const {
    check(name, tensor, type, symbols, shape);
    if (shape.back() > 1 && tensor.stride(2) != 1) tensor = torch::stable::contiguous(tensor);
  }
};

inline const void* pointer(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline const void* pointer(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

inline int32_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return aoti_torch_dtype_float32();
    case ScalarType::Double: return aoti_torch_dtype_float64();
    case ScalarType::BFloat16: return aoti_torch_dtype_bfloat16();
    case ScalarType::Half: return aoti_torch_dtype_float16();
    case ScalarType::Long: return aoti_torch_dtype_int64();
    case ScalarType::Short: return aoti_torch_dtype_int16();
    case ScalarType::Byte: return aoti_torch_dtype_uint8();
    default: fail("fusedreg: no result has dtype ", text(type));
  }
}

// A tensor of shape (0,), which stands for a result that is not there. Seven of a tiny call's ten results are such, so
// it goes the short way: there is nothing to fill.
inline Tensor absent(const Tensor& like, ScalarType type) {
  constexpr int64_t kSize = 0, kStride = 1;
  int32_t device_type = 0, device_index = 0;
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_get_device_type(like.get(), &device_type) != TORCH_SUCCESS ||
      aoti_torch_get_device_index(like.get(), &device_index) != TORCH_SUCCESS ||
      aoti_torch_empty_strided(1, &kSize, &kStride, dtype_code(type), device_type, device_index, &handle) !=
          TORCH_SUCCESS) {
    fail("fusedreg: could not make an empty tensor of dtype ", text(type));
  }
  return Tensor(handle);
}

// An uninitialised contiguous tensor on the device of `like`. By the C interface: torch::stable::empty looks its
// operator up by name each time. Not by aoti_torch_empty_strided either, though it is faster: it goes past the filling
// of uninitialised memory that torch.use_deterministic_algorithms promises, and that our tests rely on.
inline Tensor empty(const Tensor& like, const Shape& shape, ScalarType type) {
  int32_t dtype = dtype_code(type);  // the interface takes it by a pointer that is not const
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_aten_new_empty(like.get(), shape.data(), static_cast<int64_t>(shape.size()), &dtype,
                                /*layout=*/nullptr, /*device=*/nullptr, /*device_index=*/0, /*pin_memory=*/nullptr,
                                &handle) != TORCH_SUCCESS) {
    fail("fusedreg: could not allocate a result of shape ", text(shape), " and dtype ", text(type),
         "; use a smaller batch or a shorter sequence");
  }
  return Tensor(handle);
}

// ---- an axis of models in front ----

inline void check_model_axis(const char* operator_name, const char* name, const Tensor& tensor, int64_t models) {
  if (tensor.dim() > 0 && tensor.size(0) == models) return;
  fail(operator_name, ": ", name, ": expected an axis of ", models, " models in front, as input (M, T, B, I) has, got ",
       "shape ", text(shape_of(tensor)), "; expand it where models have it in common");
}
inline void check_model_axis(const char* operator_name, const char* name, const OptionalTensor& tensor,
                             int64_t models) {
  if (tensor) check_model_axis(operator_name, name, *tensor, models);
}

// Makes of a tensor one model's part of it. Where there are no models at all: zeros of the shape of such a part.
inline void select_model(Tensor& tensor, int64_t model) {
  const Shape shape = shape_of(tensor);
  tensor = shape[0] > 0 ? torch::stable::select(tensor, 0, model)
                        : torch::stable::new_zeros(tensor, {shape.data() + 1, shape.size() - 1});
}
inline void select_model(OptionalTensor& tensor, int64_t model) {
  if (tensor) select_model(*tensor, model);
}

}  // namespace fusedreg::stable
