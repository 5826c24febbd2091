// Half-precision numbers as bits, with conversions that have no branch, so that loops vectorise on
// every instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#define SALIENCY_FAST_HAS_CLONES 1
#else
#define SALIENCY_FAST_HAS_CLONES 0
#endif

namespace saliency_fast {

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

SALIENCY_FAST_INLINE float as_float(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

SALIENCY_FAST_INLINE uint32_t as_bits(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}

SALIENCY_FAST_INLINE float widen(float number) { return number; }
SALIENCY_FAST_INLINE double widen(double number) { return number; }

SALIENCY_FAST_INLINE float widen(Brain number) {
  return as_float(static_cast<uint32_t>(number.bits) << 16);
}

SALIENCY_FAST_INLINE float widen(Half number) {
  const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Moved to float's place the exponent is 112 too small, or that of infinity and NaN 224.
  const float normal = as_float((magnitude >> 3) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = as_float((magnitude >> 16) | (126u << 23)) - 0.5f;
  const float chosen = magnitude < (0x0400u << 16) ? subnormal : normal;
  return as_float(as_bits(chosen) | (bits & 0x80000000u));
}

// To the nearest, ties to even; NaN stays NaN.
SALIENCY_FAST_INLINE void narrow(float number, float& out) { out = number; }
SALIENCY_FAST_INLINE void narrow(double number, double& out) { out = number; }

SALIENCY_FAST_INLINE void narrow(float number, Brain& out) {
  const uint32_t bits = as_bits(number);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(number != number ? 0x7FC0u : rounded);
}

SALIENCY_FAST_INLINE void narrow(float number, Half& out) {
  const uint32_t bits = as_bits(number);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits ^ sign;
  // Past half's largest exponent the first product is infinite, and stays it.
  const float clipped = (as_float(magnitude) * 0x1.0p+112f) * 0x1.0p-110f;
  // A sum with 2^(exponent + 15) leaves half's ten bits at the end, rounded by the addition; below
  // half's smallest normal number the exponent is that number's.
  const uint32_t exponent = magnitude & 0x7F800000u;
  const uint32_t least = exponent < 0x38800000u ? 0x38800000u : exponent;
  const uint32_t sum = as_bits(as_float(least + 0x07800000u) + clipped);
  const uint32_t found = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  out.bits = static_cast<uint16_t>((sign >> 16) | (magnitude > 0x7F800000u ? 0x7E00u : found));
}

namespace {

SALIENCY_FAST_CLONES
[[maybe_unused]] void widen_all(const Brain* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

SALIENCY_FAST_CLONES
[[maybe_unused]] void narrow_all(const float* from, int64_t count, Brain* to) {
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

#if SALIENCY_FAST_HAS_CLONES
// float16 has instructions of its own since x86-64-v3, to which no loop is compiled.
__attribute__((target("arch=x86-64-v3"))) [[maybe_unused]] void widen_all(const Half* from,
                                                                          int64_t count,
                                                                          float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(eight));
  }
  for (; i < count; ++i) to[i] = widen(from[i]);
}

__attribute__((target("arch=x86-64-v3"))) [[maybe_unused]] void narrow_all(const float* from,
                                                                           int64_t count,
                                                                           Half* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), eight);
  }
  for (; i < count; ++i) narrow(from[i], to[i]);
}

__attribute__((target("default")))
#endif
[[maybe_unused]] void widen_all(const Half* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

#if SALIENCY_FAST_HAS_CLONES
__attribute__((target("default")))
#endif
[[maybe_unused]] void narrow_all(const float* from, int64_t count, Half* to) {
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

}  // namespace
}  // namespace saliency_fast
