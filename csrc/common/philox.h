// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3; SC 2011) and the
// coordinates at which each mask reads it. A mask is a pure function of the seed and of where it stands, never of a
// thread, a tile or the order of the steps; every backend makes the same bits.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FUSEDREG_HOST_DEVICE __host__ __device__
#else
#define FUSEDREG_HOST_DEVICE
#endif

namespace fusedreg {

// Counter word c2 of the families whose masks last a whole sequence or call; per-step families put t there.
constexpr uint32_t kSequenceFamily = 0xFFFFFFFFu;
constexpr uint32_t kUntiedHiddenFamily = 0xFFFFFFFEu;
constexpr uint32_t kInputFamily = 0xFFFFFFFDu;
constexpr uint32_t kUntiedInputFamily = 0xFFFFFFFCu;
constexpr uint32_t kWeightFamily = 0xFFFFFFFBu;

// Which word of the step family serves which site.
enum StepSite { kZoneoutHidden = 0, kZoneoutCell = 1, kUpdateStep = 2, kBetweenLayers = 3 };
// Which word of the sequence family serves which site.
enum SequenceSite { kHiddenTied = 0, kCell = 1, kUpdateSequence = 2, kOutput = 3 };

template <class Word>
struct PhiloxWords {
  Word word[4];
};

// The 64-bit product of two 32-bit words. Vectors of words bring specialisations of their own.
template <class Word>
struct WideProduct;

template <>
struct WideProduct<uint32_t> {
  FUSEDREG_HOST_DEVICE static inline void take(uint32_t a, uint32_t b, uint32_t& high, uint32_t& low) {
    const uint64_t product = static_cast<uint64_t>(a) * b;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

template <class Word>
FUSEDREG_HOST_DEVICE static inline PhiloxWords<Word> philox4x32_10(Word c0, Word c1, Word c2, Word c3, uint32_t k0,
                                                                   uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    Word high0, low0, high1, low1;
    WideProduct<Word>::take(0xD2511F53u, c0, high0, low0);
    WideProduct<Word>::take(0xCD9E8D57u, c2, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// An element is dropped, or zoned out, when its word is below this.
FUSEDREG_HOST_DEVICE static inline uint32_t drop_threshold(double rate) {
  return static_cast<uint32_t>(static_cast<uint64_t>(rate * 4294967296.0));
}

}  // namespace fusedreg
