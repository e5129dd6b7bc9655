// device.h for nvcc: one small function for each instruction. What each promises stands in device.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>

#define FUSEDREG_KERNEL __global__
#define FUSEDREG_DEVICE __device__ __forceinline__
#define FUSEDREG_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define FUSEDREG_PARAMETER const __grid_constant__

namespace fusedreg {

FUSEDREG_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
FUSEDREG_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }
FUSEDREG_DEVICE float tanh(float x) { return ::tanhf(x); }
FUSEDREG_DEVICE double tanh(double x) { return ::tanh(x); }

}  // namespace fusedreg

namespace fusedreg::cuda {

using fusedreg::sigmoid;
using fusedreg::tanh;

template <auto kernel, class Params>
const void* address_of_kernel() {
  return reinterpret_cast<const void*>(kernel);
}

FUSEDREG_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FUSEDREG_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FUSEDREG_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FUSEDREG_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
FUSEDREG_DEVICE int grid_blocks() { return static_cast<int>(gridDim.x); }
FUSEDREG_DEVICE int lane() { return static_cast<int>(threadIdx.x) & 31; }
FUSEDREG_DEVICE int warp_index() { return static_cast<int>(threadIdx.x) >> 5; }

FUSEDREG_DEVICE char* dynamic_shared() {
  extern __shared__ uint4 fusedreg_dynamic_shared[];
  return reinterpret_cast<char*>(fusedreg_dynamic_shared);
}

FUSEDREG_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

FUSEDREG_DEVICE void sync_block() { __syncthreads(); }
FUSEDREG_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
FUSEDREG_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}

template <class T>
FUSEDREG_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(0xFFFFFFFFu, value, from);
}

FUSEDREG_DEVICE float to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return __uint_as_float(bits);
}

template <class Storage>
FUSEDREG_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<Storage, BFloat16> || std::is_same_v<Storage, Float16> ||
                std::is_same_v<Storage, float>);
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (std::is_same_v<Storage, Float16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Strong accesses of device scope go to L2, where every block sees the same. They are volatile, so that the compiler
// keeps them in order among themselves; what orders them for other blocks carries a "memory" clobber as well.
FUSEDREG_DEVICE Words4 load_exchanged(const Words4* from) {
  Words4 value;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(__cvta_generic_to_global(from)));
  return value;
}

FUSEDREG_DEVICE uint32_t load_exchanged(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(from)));
  return value;
}

FUSEDREG_DEVICE float load_exchanged(const float* from) {
  float value;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(value) : "l"(__cvta_generic_to_global(from)));
  return value;
}

FUSEDREG_DEVICE void store_exchanged(Words4* to, Words4 value) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3]));
}

FUSEDREG_DEVICE void store_exchanged(uint32_t* to, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "r"(value));
}

FUSEDREG_DEVICE void store_exchanged(float* to, float value) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(value));
}

FUSEDREG_DEVICE uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(__cvta_generic_to_global(flag)) : "memory");
  return value;
}

FUSEDREG_DEVICE void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(flag)), "r"(value) : "memory");
}

FUSEDREG_DEVICE void fence_device() { __threadfence(); }

FUSEDREG_DEVICE void fetch_to_shared(uint32_t* to, const uint32_t* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}
FUSEDREG_DEVICE void wait_for_fetched() { asm volatile("cp.async.wait_all;" ::: "memory"); }

FUSEDREG_DEVICE uint64_t timer_nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// printf's arguments lie in global memory: on the stack they would give every kernel that can stop a frame of its own.
// Where several threads stop at once, their integers may mix; each one's cause is as good as the other's.
static __device__ long long stop_arguments[8];
#pragma nv_diagnostic push
#pragma nv_diag_suppress 338  // the host's vprintf, of <cstdio>, has the same name
extern "C" __device__ int vprintf(const char*, void*);
#pragma nv_diagnostic pop

template <class... Integers>
[[noreturn]] FUSEDREG_DEVICE void stop(const char* message, Integers... integers) {
  static_assert(sizeof...(integers) <= 4, "stop prints up to four integers");
  const long long values[5] = {static_cast<long long>(integers)..., 0};
  stop_arguments[0] = reinterpret_cast<long long>(message);
  for (int i = 0; i < 4; ++i) stop_arguments[1 + i] = values[i];
  stop_arguments[5] = blockIdx.x;
  stop_arguments[6] = threadIdx.x;
  vprintf("fusedreg: %s %lld %lld %lld %lld (block %lld, thread %lld)\n", static_cast<void*>(stop_arguments));
  __trap();
  __builtin_unreachable();
}

}  // namespace fusedreg::cuda

#include "hardware_cluster.h"
