// Philox words of a group of blocks, transposed: word[j][i] is word j of block i.
//
// The rounds need the 64-bit product of 32-bit words, which x86 has as one instruction (pmuludq).
// Compilers make three or a slow one of it, so it is named here, once per register width.
#pragma once

#include <cstdint>
#include <cstring>

#include "philox.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SALIENCY_FAST_PMULUDQ 1
#endif

namespace saliency_fast {

constexpr int64_t kGroup = 64;

struct Counter {
  uint32_t low, high, sample, stream, key0, key1;
};

inline Counter counter_of(uint64_t seed, uint64_t block, uint32_t sample, uint32_t stream) {
  return {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), sample, stream,
          static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
}

inline void plain_words(Counter at, uint32_t (*word)[kGroup]) {
  for (int64_t i = 0; i < kGroup; ++i) {
    const uint32_t low = at.low + static_cast<uint32_t>(i);
    const uint32_t high = at.high + static_cast<uint32_t>(low < at.low);
    const Block block = philox_rounds(low, high, at.sample, at.stream, at.key0, at.key1);
    for (int64_t j = 0; j < 4; ++j) word[j][i] = block.word[j];
  }
}

#if defined(SALIENCY_FAST_PMULUDQ)

// Words lie in the low halves of 64-bit lanes; what the products leave in the high halves is
// ignored by the next product and cut off at the end. Two vectors at once hide the latency.
#define SALIENCY_FAST_WORDS(NAME, TARGET, BYTES, REGISTER, MULTIPLY)                             \
  __attribute__((target(TARGET))) inline void NAME(Counter at, uint32_t(*word)[kGroup]) {        \
    using Lanes = uint64_t __attribute__((vector_size(BYTES)));                                  \
    using Words = uint32_t __attribute__((vector_size(BYTES / 2)));                              \
    constexpr int64_t kLanes = BYTES / 8;                                                        \
    constexpr int64_t kVectors = 2;                                                              \
    const Lanes zero = {};                                                                       \
    const Lanes multiplier0 = zero + 0xD2511F53u;                                                \
    const Lanes multiplier1 = zero + 0xCD9E8D57u;                                                \
    alignas(64) uint64_t low[kGroup], high[kGroup];                                              \
    for (int64_t i = 0; i < kGroup; ++i) {                                                       \
      low[i] = at.low + static_cast<uint32_t>(i);                                                \
      high[i] = at.high + static_cast<uint32_t>(low[i] < at.low);                                \
    }                                                                                            \
    for (int64_t first = 0; first < kGroup; first += kVectors * kLanes) {                        \
      Lanes lanes[4][kVectors];                                                                  \
      std::memcpy(lanes[0], low + first, sizeof lanes[0]);                                       \
      std::memcpy(lanes[1], high + first, sizeof lanes[1]);                                      \
      for (int64_t v = 0; v < kVectors; ++v) {                                                   \
        lanes[2][v] = zero + at.sample;                                                          \
        lanes[3][v] = zero + at.stream;                                                          \
      }                                                                                          \
      uint32_t key0 = at.key0, key1 = at.key1;                                                   \
      for (int round = 0; round < 10; ++round) {                                                 \
        for (int64_t v = 0; v < kVectors; ++v) {                                                 \
          const Lanes product0 = (Lanes)MULTIPLY((REGISTER)lanes[0][v], (REGISTER)multiplier0);  \
          const Lanes product1 = (Lanes)MULTIPLY((REGISTER)lanes[2][v], (REGISTER)multiplier1);  \
          lanes[0][v] = (product1 >> 32) ^ lanes[1][v] ^ (zero + key0);                          \
          lanes[1][v] = product1;                                                                \
          lanes[2][v] = (product0 >> 32) ^ lanes[3][v] ^ (zero + key1);                          \
          lanes[3][v] = product0;                                                                \
        }                                                                                        \
        key0 += 0x9E3779B9u;                                                                     \
        key1 += 0xBB67AE85u;                                                                     \
      }                                                                                          \
      for (int64_t j = 0; j < 4; ++j) {                                                          \
        for (int64_t v = 0; v < kVectors; ++v) {                                                 \
          const Words words = __builtin_convertvector(lanes[j][v], Words);                       \
          std::memcpy(word[j] + first + v * kLanes, &words, sizeof words);                       \
        }                                                                                        \
      }                                                                                          \
    }                                                                                            \
  }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12 warns of its own header
SALIENCY_FAST_WORDS(words_512, "avx512f", 64, __m512i, _mm512_mul_epu32)
SALIENCY_FAST_WORDS(words_256, "avx2", 32, __m256i, _mm256_mul_epu32)
#pragma GCC diagnostic pop
#undef SALIENCY_FAST_WORDS

inline void group_words(Counter at, uint32_t (*word)[kGroup]) {
  static const int width =
      __builtin_cpu_supports("avx512f") ? 512 : __builtin_cpu_supports("avx2") ? 256 : 0;
  if (width == 512) return words_512(at, word);
  if (width == 256) return words_256(at, word);
  plain_words(at, word);
}

#else

inline void group_words(Counter at, uint32_t (*word)[kGroup]) { plain_words(at, word); }

#endif

}  // namespace saliency_fast
