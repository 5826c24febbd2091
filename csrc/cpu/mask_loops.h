// The loops of masks.cpp, in float or double. They keep a byte per element in a small buffer, so
// that they vectorise; eight such flags then become one byte of the mask.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

static_assert(std::endian::native == std::endian::little, "bytes of flags are read as one number");

namespace saliency_fast {
namespace {

// What a rectifier does beside setting negative numbers to 0: nothing, a slope, an upper bound.
enum class Bend { plain, slope, bound };
// How scale and shift meet the elements of a run: not at all, one pair for all, a pair for each.
enum class Affine { none, one, each };

template <typename T>
struct Forward {
  const T* x;
  const T* residual;  // null for none
  T* y;               // may be x
  uint8_t* flags;
  int64_t count;
  Bend bend;
  T value;  // of the slope or bound
};

template <typename T>
struct Backward {
  const T* grad;
  const uint8_t* flags;  // not 0 where the bit is set
  T* scaled;
  T* plain;  // null for none
  int64_t count;
  T slope, floor;  // no gradient lies below a floor that is NaN
};

// In-place calls have y == x: ivdep says that elements do not depend on each other.
template <Affine kAffine, bool kResidual, Bend kBend, typename T>
SALIENCY_FAST_INLINE void rectify_as(const Forward<T>& run, const T* scale, const T* shift) {
  const T* const x = run.x;
  const T* const residual = run.residual;
  T* const y = run.y;
  uint8_t* const flags = run.flags;
  const int64_t count = run.count;  // flags may alias the run itself
  const T value = run.value;
  const T factor = kAffine == Affine::one ? *scale : T{1};
  const T offset = kAffine == Affine::one ? *shift : T{0};
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    T z = x[i];
    if (kAffine == Affine::one) z = factor * z + offset;
    if (kAffine == Affine::each) z = scale[i] * z + shift[i];
    if (kResidual) z += residual[i];
    // NaN is above 0 and under every bound.
    const bool above = !(z <= 0), under = kBend != Bend::bound || !(z >= value);
    const T low = kBend == Bend::slope ? value * z : T{0};
    y[i] = above ? (under ? z : value) : low;
    flags[i] = static_cast<uint8_t>(above & under);
  }
}

template <Affine kAffine, bool kResidual, typename T>
SALIENCY_FAST_INLINE void rectify_bend(const Forward<T>& run, const T* scale, const T* shift) {
  if (run.bend == Bend::plain) {
    rectify_as<kAffine, kResidual, Bend::plain>(run, scale, shift);
  } else if (run.bend == Bend::slope) {
    rectify_as<kAffine, kResidual, Bend::slope>(run, scale, shift);
  } else {
    rectify_as<kAffine, kResidual, Bend::bound>(run, scale, shift);
  }
}

template <Affine kAffine, typename T>
SALIENCY_FAST_INLINE void rectify_body(const Forward<T>& run, const T* scale, const T* shift) {
  if (run.residual == nullptr) {
    rectify_bend<kAffine, false>(run, scale, shift);
  } else {
    rectify_bend<kAffine, true>(run, scale, shift);
  }
}

template <Affine kAffine, bool kBoth, bool kLeak, typename T>
SALIENCY_FAST_INLINE void gradient_as(const Backward<T>& run, const T* scale) {
  const T* const grad = run.grad;
  const uint8_t* const flags = run.flags;
  T* const scaled = run.scaled;
  T* const plain = run.plain;
  const int64_t count = run.count;
  const T slope = run.slope, floor = run.floor;
  const T factor = kAffine == Affine::one ? *scale : T{1};
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const T g = grad[i];
    const bool kept = (flags[i] != 0) & !(g <= floor);
    const T below = kLeak ? slope * g : T{0};
    const T m = kept ? g : below;
    if (kBoth) plain[i] = m;
    if (kAffine == Affine::none) scaled[i] = m;
    if (kAffine == Affine::one) scaled[i] = factor * m;
    if (kAffine == Affine::each) scaled[i] = scale[i] * m;
  }
}

template <Affine kAffine, bool kBoth, typename T>
SALIENCY_FAST_INLINE void gradient_leak(const Backward<T>& run, const T* scale) {
  if (run.slope == 0) {
    gradient_as<kAffine, kBoth, false>(run, scale);
  } else {
    gradient_as<kAffine, kBoth, true>(run, scale);
  }
}

template <Affine kAffine, typename T>
SALIENCY_FAST_INLINE void gradient_body(const Backward<T>& run, const T* scale) {
  if (kAffine == Affine::none || run.plain == nullptr) {
    gradient_leak<kAffine, false>(run, scale);
  } else {
    gradient_leak<kAffine, true>(run, scale);
  }
}

// Clones are made of functions, not of templates: one set per type.
#define SALIENCY_FAST_LEAVES(T)                                                     \
  SALIENCY_FAST_CLONES                                                              \
  void rectify(const Forward<T>& run, const T* scale, const T* shift, Affine how) { \
    if (how == Affine::none) {                                                      \
      rectify_body<Affine::none>(run, scale, shift);                                \
    } else if (how == Affine::one) {                                                \
      rectify_body<Affine::one>(run, scale, shift);                                 \
    } else {                                                                        \
      rectify_body<Affine::each>(run, scale, shift);                                \
    }                                                                               \
  }                                                                                 \
  SALIENCY_FAST_CLONES                                                              \
  void gradient(const Backward<T>& run, const T* scale, Affine how) {               \
    if (how == Affine::none) {                                                      \
      gradient_body<Affine::none>(run, scale);                                      \
    } else if (how == Affine::one) {                                                \
      gradient_body<Affine::one>(run, scale);                                       \
    } else {                                                                        \
      gradient_body<Affine::each>(run, scale);                                      \
    }                                                                               \
  }
SALIENCY_FAST_LEAVES(float)
SALIENCY_FAST_LEAVES(double)
#undef SALIENCY_FAST_LEAVES

// Eight bytes, each 0 or 1, to one: the product moves byte j's bit to place 56 + j.
SALIENCY_FAST_CLONES
void pack(const uint8_t* flags, int64_t bytes, uint8_t* mask) {
  for (int64_t i = 0; i < bytes; ++i) {
    uint64_t eight;
    std::memcpy(&eight, flags + 8 * i, sizeof eight);
    mask[i] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
}

// One byte to eight, of which byte j is not 0 where bit j is set.
SALIENCY_FAST_CLONES
void unpack(const uint8_t* mask, int64_t bytes, uint8_t* flags) {
  for (int64_t i = 0; i < bytes; ++i) {
    const uint64_t eight = (mask[i] * 0x0101010101010101u) & 0x8040201008040201u;
    std::memcpy(flags + 8 * i, &eight, sizeof eight);
  }
}

}  // namespace
}  // namespace saliency_fast
