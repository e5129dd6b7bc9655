// The operators, and their CPU implementations over LibTorch's stable ABI.
//
// Python has validated the arguments for its users (fusedreg/validation.py). What is checked again, in stable/*.h, is
// what memory safety needs, because anyone can call an operator: devices, types, sizes, layouts, and the one kind of
// index that is read from a tensor.

#include <pthread.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "common/params.h"
#include "cpu/lstm_layer.h"
#include "stable/layer_calls.h"
#include "stable/plan_query.h"
#include "stable/schemas.h"
#include "stable/team.h"

namespace fusedreg {
namespace {

using stable::ArgumentReader;

// Set in the child of a fork. torch's OpenMP threads do not survive one, and libgomp then waits for them for ever.
std::atomic<bool> forked{false};
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

int available_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// cpu::RunTeam over torch's own threads.
void run_team(int asked, cpu::TeamBody body, void* context) {
  if (asked <= 1) {
    body(context, 0, 1);
  } else if (forked.load(std::memory_order_relaxed)) {
    stable::run_team_of_new_threads(asked, body, context);
  } else {
    stable::Team team(asked, body, context);
    torch::stable::parallel_for(0, asked, 1, [&team](int64_t begin, int64_t end) { team.run_piece(begin, end); });
    team.rethrow();
  }
}

template <typename Kernel>
void run_kernel(const char* name, const Kernel& kernel) {
  try {
    kernel();
  } catch (const std::bad_alloc&) {
    stable::fail(name, ": out of memory for the workspace; use a smaller batch or a shorter sequence");
  }
}

// Each worker runs whole calls, the next one that nobody has begun: models have nothing in common.
template <typename Call, typename Kernel>
void spread_over_team(stable::Calls<Call>& calls, const Kernel& kernel, int workers) {
  struct Spread {
    stable::Calls<Call>& calls;
    const Kernel& kernel;
    std::atomic<int64_t> next{0};
  } spread{calls, kernel};
  run_team(
      workers,
      [](void* context, int /*worker*/, int /*workers*/) {
        auto& all = *static_cast<Spread*>(context);
        for (int64_t index = all.next++; index < all.calls.count(); index = all.next++) {
          all.kernel(all.calls[index].params, 1, &run_team);
        }
      },
      &spread);
}

// With at least as many models as threads a model is run by one thread, otherwise by all of them. No result depends on
// that.
template <typename Call, typename Kernel>
void run_calls(stable::Calls<Call>& calls, const Kernel& kernel) {
  if (!calls.have_work()) {
    calls.results.zero();
    return;
  }
  const int threads = available_threads();
  run_kernel(Call::kName, [&] {
    const int64_t count = calls.count();
    if (count > 1 && count >= threads) {
      const double operations = cpu::operations_of(calls[0].params.in) * static_cast<double>(count);
      spread_over_team(calls, kernel, cpu::workers_worth_having(operations, threads));
    } else {
      for (int64_t index = 0; index < count; ++index) kernel(calls[index].params, threads, &run_team);
    }
  });
}

void forward(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stable::Calls<stable::ForwardCall> calls(stack, stable::Place::Cpu);
  run_calls(calls, cpu::lstm_layer_forward);
  calls.results.give(stack);
}

void backward(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stable::Calls<stable::BackwardCall> calls(stack, stable::Place::Cpu);
  run_calls(calls, cpu::lstm_layer_backward);
  if (calls.have_work() && calls[0].second_grad_bias != nullptr) {
    const stable::Tensor& first = calls.results[stable::kBiasIh];
    std::memcpy(calls[0].second_grad_bias, calls[0].params.grad_bias, stable::Results::bytes_of(first));
  }
  calls.results.give(stack);
}

// What this file can use on this processor, best first: "avx512,avx2,portable".
void cpu_instruction_sets(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stack[0] = torch::stable::detail::from(cpu::usable_instruction_sets());
}

void cpu_instruction_set(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stack[0] = torch::stable::detail::from(cpu::get_instruction_set());
}

void set_cpu_instruction_set(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  const auto name = torch::stable::detail::to<std::string>(stack[0]);
  stack[0] = torch::stable::detail::from(cpu::set_instruction_set(name));
}

// The multiply-add rate in GFLOP/s of `threads` threads at once, each busy for `seconds`: the benchmarks' roof.
void measure_fma_rate(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  ArgumentReader reader(stack);
  const auto threads = reader.take<int64_t>();
  const auto seconds = reader.take<double>();
  if (threads < 1 || threads > available_threads() || !(seconds > 0.0 && seconds < 60.0)) {
    stable::fail("fusedreg::_measure_fma_rate: expected 1 to ", available_threads(),
                 " threads (torch.set_num_threads) and 0 to 60 seconds, got ", threads, " and ", seconds);
  }
  struct Measurement {
    double seconds;
    std::vector<double> rates;
  } measurement{seconds, std::vector<double>(threads)};
  run_team(
      static_cast<int>(threads),
      [](void* context, int worker, int /*workers*/) {
        auto& each = *static_cast<Measurement*>(context);
        each.rates[worker] = cpu::measure_fma_rate(each.seconds);
      },
      &measurement);
  double total = 0;
  for (const double rate : measurement.rates) total += rate;
  stack[0] = torch::stable::detail::from(total / 1e9);
}

// Which tier of the CUDA kernels a layer gets on a device that is described, and why: for fusedreg.backends.explain().
// The choice is plain C++, so it can be asked where no GPU is.
void cuda_plan(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  const stable::PlanQuery query("fusedreg::_cuda_plan", stack);
  stack[0] = torch::stable::detail::from(cuda::explain_choice(query.in, query.tf32_allowed, query.limits));
}

// The version that this file was built from, for fusedreg/backends/cpu.py to compare with the Python files'.
void cpu_version(StableIValue* stack, uint64_t /*arguments*/, uint64_t /*results*/) {
  stack[0] = torch::stable::detail::from(std::string(FUSEDREG_VERSION));
}

}  // namespace
}  // namespace fusedreg

STABLE_TORCH_LIBRARY(fusedreg, library) {
  library.def(fusedreg::stable::kForwardSchema);
  library.def(fusedreg::stable::kBackwardSchema);
  library.def("_cpu_instruction_sets() -> str");
  library.def("_cpu_instruction_set() -> str");
  library.def("_set_cpu_instruction_set(str name) -> bool");
  library.def("_measure_fma_rate(int threads, float seconds) -> float");
  library.def("_cpu_version() -> str");
  library.def((std::string("_cuda_plan") + fusedreg::stable::kPlanArguments).c_str());
}

STABLE_TORCH_LIBRARY_IMPL(fusedreg, CPU, library) {
  library.impl("lstm_layer_forward", &fusedreg::forward);
  library.impl("lstm_layer_backward", &fusedreg::backward);
}

STABLE_TORCH_LIBRARY_IMPL(fusedreg, CompositeExplicitAutograd, library) {
  library.impl("_cpu_instruction_sets", &fusedreg::cpu_instruction_sets);
  library.impl("_cpu_instruction_set", &fusedreg::cpu_instruction_set);
  library.impl("_set_cpu_instruction_set", &fusedreg::set_cpu_instruction_set);
  library.impl("_measure_fma_rate", &fusedreg::measure_fma_rate);
  library.impl("_cpu_version", &fusedreg::cpu_version);
  library.impl("_cuda_plan", &fusedreg::cuda_plan);
}
