// The cluster's part of hardware.h. The instructions exist from compute capability 9.0 on; the same kernels are
// compiled for older devices too, which refuse to launch them, so that there a trap stands in.
#pragma once

namespace fusedreg::cuda {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

FUSEDREG_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

FUSEDREG_DEVICE int cluster_blocks() {
  uint32_t blocks;
  asm("mov.u32 %0, %cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}

FUSEDREG_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
FUSEDREG_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// The address, in the cluster's window of shared memory, of the same place in another block.
template <class T>
FUSEDREG_DEVICE uint32_t address_in_block(const T* address, int rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(mapped)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(address))), "r"(rank));
  return mapped;
}

template <class T>
FUSEDREG_DEVICE void store_to_block(T* address, int rank, const T& value) {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const uint32_t to = address_in_block(address, rank);
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    memcpy(&bits, &value, 2);
    asm volatile("st.shared::cluster.u16 [%0], %1;" ::"r"(to), "h"(bits) : "memory");
  } else {
    uint32_t word[sizeof(T) / 4];
    memcpy(word, &value, sizeof(T));
    if constexpr (sizeof(T) == 4) {
      asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(to), "r"(word[0]) : "memory");
    } else if constexpr (sizeof(T) == 8) {
      asm volatile("st.shared::cluster.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(word[0]), "r"(word[1]) : "memory");
    } else {
      asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word[0]), "r"(word[1]),
                   "r"(word[2]), "r"(word[3])
                   : "memory");
    }
  }
}

template <class T>
FUSEDREG_DEVICE T load_from_block(const T* address, int rank) {
  static_assert(std::is_trivially_copyable_v<T>);
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const uint32_t from = address_in_block(address, rank);
  T value;
  if constexpr (sizeof(T) == 2) {
    uint16_t bits;
    asm volatile("ld.shared::cluster.u16 %0, [%1];" : "=h"(bits) : "r"(from) : "memory");
    memcpy(&value, &bits, 2);
  } else {
    uint32_t word[sizeof(T) / 4];
    if constexpr (sizeof(T) == 4) {
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(word[0]) : "r"(from) : "memory");
    } else if constexpr (sizeof(T) == 8) {
      asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(word[0]), "=r"(word[1]) : "r"(from) : "memory");
    } else {
      asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                   : "r"(from)
                   : "memory");
    }
    memcpy(&value, word, sizeof(T));
  }
  return value;
}

#else

FUSEDREG_DEVICE int cluster_rank() { return 0; }
FUSEDREG_DEVICE int cluster_blocks() { return 1; }
FUSEDREG_DEVICE void cluster_arrive() { __trap(); }
FUSEDREG_DEVICE void cluster_wait() { __trap(); }
template <class T>
FUSEDREG_DEVICE void store_to_block(T*, int, const T&) {
  __trap();
}
template <class T>
FUSEDREG_DEVICE T load_from_block(const T* address, int) {
  __trap();
  return *address;
}

#endif

}  // namespace fusedreg::cuda
