// The one file through which kernels see CUDA. nvcc gets the hardware's instructions (hardware.h); any other compiler,
// given FUSEDREG_CUDA_EMULATION, gets twins that run a fiber per CUDA thread on the host
// (emulation/device_functions.h), so that the same sources are tested where no GPU is.
//
// Kernels keep to what is named here: no threadIdx, no __shared__ variable, no intrinsic of CUDA's own.
//
//   template <...> FUSEDREG_KERNEL FUSEDREG_LAUNCH_BOUNDS(256, 1) void name(FUSEDREG_PARAMETER Params params)
//       takes one trivially copyable struct; launch<name<...>>(Launch{...}, params) runs it.
//   thread_index() block_threads() block_index() block_index_y() grid_blocks() lane() warp_index()
//   char* dynamic_shared()            the block's shared memory, 16-byte aligned: Launch::shared_bytes of it
//   sync_block()  sync_warp()         every thread of the block (warp) takes part; none may have returned
//   shuffle_xor(value, mask)  shuffle(value, lane)      float, double, uint32_t, int; all 32 lanes take part
//   mma<Storage>(accumulator, a, b)   m16n8k16 of BFloat16 or Float16, m16n8k8 of float rounded to TF32
//   to_tf32(float)                    rounded to nearest, ties away from zero
// Between blocks of a resident grid, through device memory:
//   load_exchanged(pointer)  store_exchanged(pointer, value)      Words4, uint32_t, float: past the L1 cache. Nothing
//       is promised of the order in which others see these stores, until
//   store_release(flag, value)        which shows its value only after all that happened before it, in this thread and,
//       by a sync_block() in between, in its block;
//   load_acquire(flag)                after which the loads of this thread see what the flag's value promised;
//   fence_device()                    orders the stores before it before those after it, for the whole device.
// Between blocks of a cluster (compute capability 9.0 and up; a trap below), through shared memory:
//   cluster_rank()  cluster_blocks()
//   store_to_block(address, rank, value)  load_from_block(address, rank)     `address` is this block's own: the same
//       place in block `rank`. 2, 4, 8 or 16 bytes.
//   cluster_arrive()  cluster_wait()  every thread of every block: what was stored before the arrival is seen after the
//       wait. No block may return while another may still store to it or load from it.
// Into the block's shared memory, while the thread goes on:
//   fetch_to_shared(to, from)         four bytes of device memory; `to` may hold anything until
//   wait_for_fetched()                all that this thread has asked for is there, for itself, and after a sync_block()
//       for the block
// Else:
//   opaque(integer)                   the same, but the compiler does not know: what is computed from it inside a loop
//       is computed there, and takes no register before the loop
//   timer_nanoseconds()               for bounded waits
//   stop(message, integers...)        prints the message, then the integers, and ends the kernel with an error
//   sigmoid(x) tanh(x)                float and double, to full precision at any argument
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "runtime.h"

namespace fusedreg::cuda {

// Sixteen bytes, moved by one instruction.
struct alignas(16) Words4 {
  uint32_t word[4];
};

// The 16-bit types of storage.h, here as names of mma's operands.
struct BFloat16;
struct Float16;

}  // namespace fusedreg::cuda

#if defined(__CUDACC__)
#include "hardware.h"
#elif defined(FUSEDREG_CUDA_EMULATION)
#include "emulation/device_functions.h"
#else
#error "device.h is for nvcc, or for a C++ compiler with FUSEDREG_CUDA_EMULATION; host code includes runtime.h"
#endif

namespace fusedreg::cuda {

// Runs a kernel. Every return code is checked; what cannot run (a grid that cannot be resident as a whole, more shared
// memory than the device has, a cluster that is too large) throws std::runtime_error with the kernel's name.
template <auto kernel, class Params>
void launch(const Launch& how, const Params& params) {
  static_assert(std::is_trivially_copyable_v<Params>, "a kernel's parameters are copied as bytes");
  Params copy = params;
  launch_kernel(address_of_kernel<kernel, Params>(), __PRETTY_FUNCTION__, how, &copy);
}

// How many clusters of so many blocks of this kernel the current device holds at a time; 0 where it cannot run them.
template <auto kernel>
int resident_clusters(int threads, size_t shared_bytes, int cluster) {
  return resident_clusters_of(reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__, threads, shared_bytes,
                              cluster);
}

}  // namespace fusedreg::cuda
