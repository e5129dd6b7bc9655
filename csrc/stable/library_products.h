// cuda::Products by torch's own matrix products, through the dispatcher: cuBLAS with torch's handles and workspaces,
// its TF32 setting, and its rules for the capture of graphs.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "../cuda/products.h"
#include "tensors.h"

namespace fusedreg::stable {

class LibraryProducts final : public cuda::Products {
 public:
  // On the device of `like`.
  explicit LibraryProducts(const Tensor& like) : device_(like.device()) {}

  void multiply(const cuda::Matrix& out, const cuda::Matrix& a, const cuda::Matrix& b) override {
    Tensor result = view(out), left = view(a), right = view(b);
    const auto from = [](const auto& value) { return torch::stable::detail::from(value); };
    const char* const name = out.count == 1 ? "aten::mm" : "aten::bmm";
    if (out.type == a.type) {
      std::array<StableIValue, 3> stack{from(left), from(right), from(result)};
      call(name, "out", stack.data());
    } else if (device_.is_cpu()) {
      // torch's wide results are CUDA's alone. The emulation's numbers are small: widen the factors.
      Tensor wide_left = widened(left), wide_right = widened(right);
      std::array<StableIValue, 3> stack{from(wide_left), from(wide_right), from(result)};
      call(name, "out", stack.data());
    } else {
      std::array<StableIValue, 4> stack{from(left), from(right), from(type_of(out.type)), from(result)};
      call(name, "dtype_out", stack.data());
    }
  }

 private:
  static ScalarType type_of(fusedreg::ScalarType type) {
    switch (type) {
      case fusedreg::ScalarType::Float32: return ScalarType::Float;
      case fusedreg::ScalarType::Float64: return ScalarType::Double;
      case fusedreg::ScalarType::BFloat16: return ScalarType::BFloat16;
      case fusedreg::ScalarType::Float16: return ScalarType::Half;
    }
    fail("fusedreg: no such type");
  }

  // Of one matrix two dimensions, of several three.
  Tensor view(const cuda::Matrix& matrix) const {
    const std::array<int64_t, 3> sizes{matrix.count, matrix.rows, matrix.columns};
    const std::array<int64_t, 3> strides{matrix.count_stride, matrix.row_stride, matrix.column_stride};
    const size_t first = matrix.count == 1 ? 1 : 0;
    // Not by torch::stable::from_blob: in torch 2.11 what it calls passes over a refusal, and leaves the handle as it
    // was.
    AtenTensorHandle handle = nullptr;
    const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type_of(matrix.type)));
    const auto device = torch::stable::detail::to<int32_t>(torch::stable::detail::from(device_.type()));
    if (aoti_torch_create_tensor_from_blob(const_cast<void*>(matrix.data), static_cast<int64_t>(3 - first),
                                           sizes.data() + first, strides.data() + first, /*storage_offset=*/0, type,
                                           device, device_.index(), &handle) != TORCH_SUCCESS) {
      fail("fusedreg: torch takes no ", matrix.rows, " x ", matrix.columns, " matrix at ", matrix.data,
           " for one of the device of input; torch has printed why");
    }
    return Tensor(handle);
  }

  static Tensor widened(const Tensor& tensor) {
    Tensor wide = torch::stable::new_empty(tensor, tensor.sizes(), ScalarType::Float);
    return torch::stable::copy_(wide, tensor);
  }

  // One result, which is the tensor that was given for it.
  static void call(const char* name, const char* overload, StableIValue* stack) {
    if (torch_call_dispatcher(name, overload, stack, TORCH_ABI_VERSION) != 0) {
      fail("fusedreg: torch's product ", name, ".", overload, " failed; torch has printed why");
    }
    torch::stable::detail::to<Tensor>(stack[0]);
  }

  torch::stable::Device device_;
};

}  // namespace fusedreg::stable
