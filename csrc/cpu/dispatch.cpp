// Chooses the instruction set, once, by what this processor can run.
#include <atomic>

#include "kernels.h"

namespace fusedreg::cpu {
namespace {

struct Kernels {
  const char* name;
  bool (*runs_here)();
  void (*forward)(const ForwardParams&, int, RunTeam);
  void (*backward)(const BackwardParams&, int, RunTeam);
  double (*measure_fma_rate)(double);
};

bool always() { return true; }

#if defined(FUSEDREG_HAVE_AVX512)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
         __builtin_cpu_supports("fma");
}
#endif
#if defined(FUSEDREG_HAVE_AVX2)
// Every processor with AVX2 and FMA that was ever sold has F16C too; the compilers' run-time check does not know it.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

// Best first.
constexpr Kernels kKernels[] = {
#if defined(FUSEDREG_HAVE_AVX512)
    {"avx512", has_avx512, avx512::forward, avx512::backward, avx512::measure_fma_rate},
#endif
#if defined(FUSEDREG_HAVE_AVX2)
    {"avx2", has_avx2, avx2::forward, avx2::backward, avx2::measure_fma_rate},
#endif
    {"portable", always, portable::forward, portable::backward, portable::measure_fma_rate},
};

const Kernels* best() {
  for (const Kernels& kernels : kKernels) {
    if (kernels.runs_here()) return &kernels;
  }
  return nullptr;  // not reached: the portable build runs everywhere
}

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& current() {
  const Kernels* kernels = chosen.load(std::memory_order_relaxed);
  if (kernels == nullptr) {
    kernels = best();
    chosen.store(kernels, std::memory_order_relaxed);
  }
  return *kernels;
}

}  // namespace

void lstm_layer_forward(const ForwardParams& params, int threads, RunTeam run_team) {
  current().forward(params, threads, run_team);
}

void lstm_layer_backward(const BackwardParams& params, int threads, RunTeam run_team) {
  current().backward(params, threads, run_team);
}

double measure_fma_rate(double seconds) { return current().measure_fma_rate(seconds); }

std::string usable_instruction_sets() {
  std::string names;
  for (const Kernels& kernels : kKernels) {
    if (!kernels.runs_here()) continue;
    if (!names.empty()) names += ",";
    names += kernels.name;
  }
  return names;
}

bool set_instruction_set(const std::string& name) {
  for (const Kernels& kernels : kKernels) {
    if (name == kernels.name && kernels.runs_here()) {
      chosen.store(&kernels, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

std::string get_instruction_set() { return current().name; }

}  // namespace fusedreg::cpu
