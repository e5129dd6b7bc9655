// The operators' CUDA implementations over LibTorch's stable ABI; the schemas are csrc/registration.cpp's.
//
// Compiled with FUSEDREG_CUDA_EMULATION, the same for tensors on the CPU, in a library of its own (fusedreg_emulated):
// the kernels then run on an emulated device, so that they are tested where no GPU is.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "cuda/choice_cache.h"
#include "cuda/layer.h"
#include "cuda/persistent_backward.h"
#include "cuda/persistent_forward.h"
#include "stable/float32_precision.h"
#include "stable/layer_calls.h"
#include "stable/library_products.h"
#include "stable/plan_query.h"
#include "stable/schemas.h"
#if defined(FUSEDREG_CUDA_EMULATION)
#include "cuda/emulation/machine.h"
#include "cuda/emulation/recording.h"
#endif

namespace fusedreg {
namespace {

using stable::Place;
using stable::ScalarType;
using stable::Tensor;

#if defined(FUSEDREG_CUDA_EMULATION)
constexpr Place kPlace = Place::Emulated;

struct CurrentDevice {
  explicit CurrentDevice(const Tensor& /*tensor*/) {}
  void* stream = nullptr;
};

// A record of a call holds its products too.
class Products final : public cuda::Products {
 public:
  explicit Products(const Tensor& like) : library_(like) {}
  void multiply(const cuda::Matrix& out, const cuda::Matrix& a, const cuda::Matrix& b) override {
    cuda::emulation::perform([=, library = library_]() mutable { library.multiply(out, a, b); });
  }

 private:
  stable::LibraryProducts library_;
};
#else
constexpr Place kPlace = Place::Cuda;

// The tensor's device becomes the current one while this lives; `stream` is the caller's there.
struct CurrentDevice {
  explicit CurrentDevice(const Tensor& tensor) : guard(tensor.get_device_index()) {
    if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != 0) {
      stable::fail("fusedreg: torch gave no current stream of CUDA device ", tensor.get_device_index());
    }
  }
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
};

using Products = stable::LibraryProducts;
#endif

// For tests: the tier that every call must use.
std::atomic<cuda::Tier> asked_tier{cuda::Tier::Auto};

// Which tier a layer gets: a pure function of what stands in the key, remembered.
std::shared_ptr<const cuda::Choice> choose(cuda::Direction direction, const stable::LayerArguments& layer,
                                           const LayerInputs& in) {
  static cuda::ChoiceCache cache;
  const bool forward = direction == cuda::Direction::Forward, tf32 = stable::allows_tf32();
  const cuda::DeviceLimits limits = cuda::device_limits();
  const cuda::Tier asked = asked_tier.load();
  cuda::ChoiceCache::Key key = {forward,
                                tf32,
                                static_cast<int64_t>(asked),
                                limits.multiprocessors,
                                limits.major,
                                limits.minor,
                                limits.shared_bytes_per_block,
                                layer.input.get_device_index(),  // devices of one kind differ in clusters
                                in.steps,
                                in.rows,
                                in.input_size,
                                in.hidden_size,
                                in.projected_size,
                                in.weight_hr != nullptr,
                                static_cast<int64_t>(in.dtype)};
  layer.add_options(key);
  return cache.find(key, [&] {
    return cuda::choose(direction, in, tf32, limits, asked,
                        forward ? &cuda::persistent_forward_clusters : &cuda::persistent_backward_clusters);
  });
}

cuda::DeviceArguments device_arguments(const stable::LayerArguments& layer, const LayerInputs& in) {
  const int64_t rows_a_group = in.grouped_seed ? in.rows / in.groups : 0;
  return {
      {layer.seed_pointer(), static_cast<uint32_t>(rows_a_group)}, layer.running_rows(), layer.running_input_rows()};
}

// One block from torch's caching allocator: used on the caller's stream alone, so it may be given back at the end of
// the call, whatever of it is still to run.
Tensor allocate_scratch(const Tensor& like, size_t bytes) {
  Tensor scratch = stable::empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
#if defined(FUSEDREG_CUDA_EMULATION)
  cuda::emulation::keep_alive(std::make_shared<Tensor>(scratch));
#endif
  return scratch;
}

// Models are queued one after another. Being of one size they have one choice, and one block of scratch memory, which
// is free again when the next one's kernels come.
void forward(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stable::Calls<stable::ForwardCall> calls(stack, kPlace);
  const CurrentDevice device(calls.input());
  if (!calls.have_work()) {
    calls.results.zero();
  } else {
    const auto choice = choose(cuda::Direction::Forward, calls[0].layer, calls[0].params.in);
    Tensor scratch = allocate_scratch(calls.input(), cuda::lstm_layer_forward_scratch(calls[0].params, *choice));
    Products products(calls.input());
    for (int64_t index = 0; index < calls.count(); ++index) {
      const stable::ForwardCall& call = calls[index];
      cuda::lstm_layer_forward(call.params, device_arguments(call.layer, call.params.in), *choice,
                               scratch.mutable_data_ptr(), products, device.stream);
    }
  }
  calls.results.give(stack);
}

void backward(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stable::Calls<stable::BackwardCall> calls(stack, kPlace);
  const CurrentDevice device(calls.input());
  if (!calls.have_work()) {
    calls.results.zero();
  } else {
    const auto choice = choose(cuda::Direction::Backward, calls[0].layer, calls[0].params.in);
    Tensor scratch = allocate_scratch(calls.input(), cuda::lstm_layer_backward_scratch(calls[0].params, *choice));
    Products products(calls.input());
    for (int64_t index = 0; index < calls.count(); ++index) {
      const stable::BackwardCall& call = calls[index];
      cuda::lstm_layer_backward(call.params, call.second_grad_bias, device_arguments(call.layer, call.params.in),
                                *choice, scratch.mutable_data_ptr(), products, device.stream);
    }
  }
  calls.results.give(stack);
}

// "auto", "cluster", "grid" or "step"; false for anything else.
void set_tier(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  const auto name = torch::stable::detail::to<std::string>(stack[0]);
  cuda::Tier tier = cuda::Tier::Auto;
  const bool known = cuda::parse_tier(name, tier);
  if (known) asked_tier.store(tier);
  stack[0] = torch::stable::detail::from(known);
}

#if defined(FUSEDREG_CUDA_EMULATION)

void set_device(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  const auto numbers = torch::stable::detail::to<std::vector<int64_t>>(stack[0]);
  if (numbers.size() != 4) {
    stable::fail("fusedreg_emulated::_set_device: expected multiprocessors, shared bytes a block, and the compute ",
                 "capability's two numbers, got ", numbers.size(), " numbers");
  }
  const auto number = [&](int index) { return static_cast<int>(numbers[index]); };
  cuda::emulation::set_limits({number(0), number(1), number(2), number(3)});
}

void set_schedule(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  cuda::emulation::set_schedule(static_cast<uint64_t>(torch::stable::detail::to<int64_t>(stack[0])));
}

void start_recording(StableIValue* /*stack*/, uint64_t /*arguments*/, uint64_t /*results*/) {
  cuda::emulation::start_recording();
}

void replay(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stack[0] = torch::stable::detail::from(static_cast<int64_t>(cuda::emulation::replay()));
}

void forget_recording(StableIValue* /*stack*/, uint64_t /*arguments*/, uint64_t /*results*/) {
  cuda::emulation::forget_recording();
}

#else

// Which tier a layer gets on the current device, whose limits are given, and why: as fusedreg::_cuda_plan, but that the
// device itself is asked how many blocks a cluster can have.
void plan_on_device(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  const stable::PlanQuery query("fusedreg::_cuda_plan_on_device", stack);
  stack[0] = torch::stable::detail::from(cuda::explain_choice(query.in, query.tf32_allowed, query.limits,
                                                              &cuda::persistent_forward_clusters,
                                                              &cuda::persistent_backward_clusters));
}

// The version that this file was built from, for fusedreg/backends/cuda.py to compare with the Python files'.
void cuda_version(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stack[0] = torch::stable::detail::from(std::string(FUSEDREG_VERSION));
}

// What the driver can run and what this file was built with, for fusedreg/backends/cuda.py to compare.
void cuda_versions(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  const cuda::CudaVersions versions = cuda::cuda_versions();
  stack[0] = torch::stable::detail::from(std::vector<int64_t>{versions.driver, versions.runtime});
}

#endif

}  // namespace
}  // namespace fusedreg

#if defined(FUSEDREG_CUDA_EMULATION)

STABLE_TORCH_LIBRARY(fusedreg_emulated, library) {
  library.def(fusedreg::stable::kForwardSchema);
  library.def(fusedreg::stable::kBackwardSchema);
  library.def("_set_tier(str name) -> bool");
  library.def("_set_device(int[] limits) -> ()");
  library.def("_set_schedule(int seed) -> ()");
  library.def("_start_recording() -> ()");
  library.def("_replay() -> int");
  library.def("_forget_recording() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedreg_emulated, CPU, library) {
  library.impl("lstm_layer_forward", &fusedreg::forward);
  library.impl("lstm_layer_backward", &fusedreg::backward);
}

STABLE_TORCH_LIBRARY_IMPL(fusedreg_emulated, CompositeExplicitAutograd, library) {
  library.impl("_set_tier", &fusedreg::set_tier);
  library.impl("_set_device", &fusedreg::set_device);
  library.impl("_set_schedule", &fusedreg::set_schedule);
  library.impl("_start_recording", &fusedreg::start_recording);
  library.impl("_replay", &fusedreg::replay);
  library.impl("_forget_recording", &fusedreg::forget_recording);
}

#else

STABLE_TORCH_LIBRARY_FRAGMENT(fusedreg, library) {
  library.def("_set_cuda_tier(str name) -> bool");
  library.def("_cuda_version() -> str");
  library.def("_cuda_versions() -> int[]");
  library.def((std::string("_cuda_plan_on_device") + fusedreg::stable::kPlanArguments).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(fusedreg, CUDA, library) {
  library.impl("lstm_layer_forward", &fusedreg::forward);
  library.impl("lstm_layer_backward", &fusedreg::backward);
}

STABLE_TORCH_LIBRARY_IMPL(fusedreg, CompositeExplicitAutograd, library) {
  library.impl("_set_cuda_tier", &fusedreg::set_tier);
  library.impl("_cuda_version", &fusedreg::cuda_version);
  library.impl("_cuda_versions", &fusedreg::cuda_versions);
  library.impl("_cuda_plan_on_device", &fusedreg::plan_on_device);
}

#endif
