// What loops over whole registers of floats are built with, where they can be built: defines
// SALIENCY_FAST_REGISTERS there. Their code is compiled once for each instruction set, by
// instruction_sets.h, in a namespace of its own.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#include <ATen/Version.h>
#include <immintrin.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/launch.h"

#define SALIENCY_FAST_REGISTERS

// Compiled into its caller, and for the instruction set.
#define HERE __attribute__((target(SALIENCY_FAST_ARCH), always_inline)) static inline
#define LEAF __attribute__((target(SALIENCY_FAST_ARCH), noinline)) static

// A register of kLanes floats, and what is done with it.
#define SALIENCY_FAST_FLOATS(prefix, Raw)                                                         \
  using Floats = float __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));           \
  HERE Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }          \
  HERE void store(float* to, Floats value) { *reinterpret_cast<Floats*>(to) = value; }            \
  HERE Floats fma(Floats a, Floats b, Floats c) {                                                 \
    return (Floats)prefix##_fmadd_ps((Raw)a, (Raw)b, (Raw)c);                                     \
  }                                                                                               \
  HERE Floats fma(float a, Floats b, Floats c) { return fma(a - Floats{}, b, c); }                \
  /* NaN stays. */                                                                                \
  HERE Floats at_least(Floats least, Floats value) { return value < least ? least : value; }

namespace saliency_fast {

// As PyTorch's own kernels, by ATEN_CPU_CAPABILITY too.
inline bool has_avx512() {
  static const bool found =
      __builtin_cpu_supports("x86-64-v4") && at::get_cpu_capability() == "AVX512";
  return found;
}

// Channels in parts of up to `widest` registers, as even as can be: where each begins, and the end.
inline std::vector<int64_t> parts_of(int64_t channels, int64_t lanes, int64_t widest) {
  const int64_t registers = channels / lanes, parts = ceil_div(registers, widest);
  std::vector<int64_t> starts;
  for (int64_t i = 0; i <= parts; ++i) starts.push_back(registers * i / parts * lanes);
  return starts;
}

inline bool has_avx2() { return __builtin_cpu_supports("x86-64-v3"); }

}  // namespace saliency_fast
#endif
