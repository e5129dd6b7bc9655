// The arguments of the private operators that say which tier of the CUDA kernels a layer gets, and why.
#pragma once

#include <cstdint>
#include <vector>

#include "../common/params.h"
#include "../cuda/plan.h"
#include "argument_reader.h"
#include "layer_options.h"

namespace fusedreg::stable {

// After the operator's name. `sizes`: T, B, I, H, P (H without a projection). `dtype`: one of ScalarType in
// common/params.h. `device`: multiprocessors, shared bytes a block, and the compute capability's two numbers.
constexpr const char* kPlanArguments =
    "(int[] sizes, int dtype, float[] rates, int[] options, bool tf32_allowed, int[] device) -> str";

struct PlanQuery {
  LayerInputs in;
  bool tf32_allowed = false;
  cuda::DeviceLimits limits;

  PlanQuery(const char* name, StableIValue* stack) {
    ArgumentReader reader(stack);
    const auto sizes = reader.take<std::vector<int64_t>>();
    const auto dtype = reader.take<int64_t>();
    const auto rates = reader.take<std::vector<double>>();
    const auto options = reader.take<std::vector<int64_t>>();
    tf32_allowed = reader.take<bool>();
    const auto device = reader.take<std::vector<int64_t>>();
    check_option_counts(name, rates, options);
    if (sizes.size() != 5 || device.size() != 4 || dtype < 0 || dtype > 3) {
      fail(name, ": expected 5 sizes, a dtype from 0 to 3 and 4 numbers of the device, got ", sizes.size(), ", ", dtype,
           " and ", device.size());
    }
    for (const int64_t size : sizes) {
      if (size < 1) fail(name, ": sizes: expected numbers above 0, got ", size);
    }
    in.steps = sizes[0];
    in.rows = sizes[1];
    in.input_size = sizes[2];
    in.hidden_size = sizes[3];
    in.projected_size = sizes[4];
    in.dtype = static_cast<fusedreg::ScalarType>(dtype);
    in.rates = decode_rates(name, rates);
    in.options = decode_options(name, options);
    const auto number = [&](int index) { return static_cast<int>(device[index]); };
    limits = {number(0), number(1), number(2), number(3)};
  }
};

}  // namespace fusedreg::stable
