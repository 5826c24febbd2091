// relu_mask, relu_mask_, relu_mask_backward, pack_mask. CUDA beside Triton: a thread owns eight
// elements, so that a byte of the mask needs no exchange between lanes (a ballot would take one
// element per lane, in accesses of 4 bytes), and one division finds its channels, which then count
// on.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 8;

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ float widen(float number) { return number; }
__device__ double widen(double number) { return number; }
__device__ float widen(__half number) { return __half2float(number); }
__device__ float widen(__nv_bfloat16 number) { return __bfloat162float(number); }

__device__ void narrow(float number, float& out) { out = number; }
__device__ void narrow(double number, double& out) { out = number; }
__device__ void narrow(float number, __half& out) { out = __float2half_rn(number); }
__device__ void narrow(float number, __nv_bfloat16& out) { out = __float2bfloat16_rn(number); }

// Never fused, so that the bits equal those of the CPU.
__device__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ float sum(float a, float b) { return __fadd_rn(a, b); }
__device__ double sum(double a, double b) { return __dadd_rn(a, b); }

template <typename T>
struct alignas(16) Access {
  static constexpr int size = 16 / sizeof(T);
  T value[size];
};

// Eight elements, by 16-byte accesses where `whole`, else `count` of them one by one.
template <typename T>
__device__ void load(const T* from, bool whole, int count, Wide<T> (&to)[kGroup]) {
  if (whole) {
#pragma unroll
    for (int first = 0; first < kGroup; first += Access<T>::size) {
      const Access<T> access = *reinterpret_cast<const Access<T>*>(from + first);
#pragma unroll
      for (int i = 0; i < Access<T>::size; ++i) to[first + i] = widen(access.value[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) to[i] = i < count ? widen(from[i]) : Wide<T>{0};
  }
}

template <typename T>
__device__ void store(const Wide<T> (&from)[kGroup], bool whole, int count, T* to) {
  if (whole) {
#pragma unroll
    for (int first = 0; first < kGroup; first += Access<T>::size) {
      Access<T> access;
#pragma unroll
      for (int i = 0; i < Access<T>::size; ++i) narrow(from[first + i], access.value[i]);
      *reinterpret_cast<Access<T>*>(to + first) = access;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (i < count) narrow(from[i], to[i]);
    }
  }
}

// How eight elements meet the channels: not at all, all in one, in a row of them, or in any way.
enum class Affine { none, one, row, any };

// Elements lie in planes of `inner`, one channel after the other.
struct Planes {
  int64_t numel, inner, channels;
};

// The channel of element `at`, and how many elements of its plane come before it.
__device__ void find(const Planes& planes, int64_t at, int64_t& channel, int64_t& before) {
  if (planes.numel <= INT32_MAX) {
    const uint32_t inner = static_cast<uint32_t>(planes.inner);
    const uint32_t plane = static_cast<uint32_t>(at) / inner;
    before = static_cast<uint32_t>(at) - plane * inner;
    channel = plane % static_cast<uint32_t>(planes.channels);
  } else {
    before = at % planes.inner;
    channel = at / planes.inner % planes.channels;
  }
}

// The numbers of one or two parameters of channels for eight elements; `second` may be null.
template <Affine kAffine, typename T>
__device__ void parameters(const T* first, const T* second, const Planes& planes, int64_t at,
                           Wide<T> (&one)[kGroup], Wide<T> (&two)[kGroup]) {
  int64_t channel, before;
  find(planes, at, channel, before);
  if constexpr (kAffine == Affine::row) {
    load(first + channel, true, kGroup, one);
    if (second != nullptr) load(second + channel, true, kGroup, two);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      one[i] = widen(first[channel]);
      if (second != nullptr) two[i] = widen(second[channel]);
      if constexpr (kAffine == Affine::any) {
        if (++before == planes.inner) {
          before = 0;
          if (++channel == planes.channels) channel = 0;
        }
      }
    }
  }
}

// Reads x and the residual (null for none) once, writes y, which may be x, and a bit per element.
// Layout: x, residual, y flat in one memory order; no z reaches a limit that is NaN.
template <typename T, Affine kAffine>
__global__ void __launch_bounds__(kThreads)
    rectify(const T* x, const T* __restrict__ scale, const T* __restrict__ shift,
            const T* residual, T* y, uint8_t* __restrict__ mask, Planes planes, Wide<T> slope,
            Wide<T> limit, bool aligned) {
  const int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t at = kGroup * group;
  if (at >= planes.numel) return;
  const int count = static_cast<int>(min(int64_t{kGroup}, planes.numel - at));
  const bool whole = aligned && count == kGroup;

  Wide<T> z[kGroup], other[kGroup];
  load(x + at, whole, count, z);
  if constexpr (kAffine != Affine::none) {
    Wide<T> factor[kGroup];
    parameters<kAffine>(scale, shift, planes, at, factor, other);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) z[i] = sum(product(factor[i], z[i]), other[i]);
  }
  if (residual != nullptr) {
    load(residual + at, whole, count, other);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) z[i] = sum(z[i], other[i]);
  }
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const bool low = z[i] <= 0, high = z[i] >= limit;  // false for NaN, which passes through
    bits |= (!low && !high && i < count ? 1u : 0u) << i;
    z[i] = high ? limit : !low ? z[i] : slope == 0 ? Wide<T>{0} : product(slope, z[i]);
  }
  store(z, whole, count, y + at);
  mask[group] = static_cast<uint8_t>(bits);
}

// Reads grad once and a bit per element (mask is null where bits do not matter), writes one
// gradient, or two. Layout: flat in the mask's memory order; none lies below a floor that is NaN.
template <typename T, Affine kAffine>
__global__ void __launch_bounds__(kThreads)
    gradient(const T* __restrict__ grad, const uint8_t* __restrict__ mask,
             const T* __restrict__ scale, T* __restrict__ scaled, T* __restrict__ plain,
             Planes planes, Wide<T> slope, Wide<T> floor, bool aligned) {
  const int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t at = kGroup * group;
  if (at >= planes.numel) return;
  const int count = static_cast<int>(min(int64_t{kGroup}, planes.numel - at));
  const bool whole = aligned && count == kGroup;

  Wide<T> m[kGroup];
  const unsigned bits = mask == nullptr ? 0xFFu : mask[group];
  load(grad + at, whole, count, m);
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const bool kept = (bits >> i & 1u) != 0 && !(m[i] <= floor);
    m[i] = kept ? m[i] : slope == 0 ? Wide<T>{0} : product(slope, m[i]);
  }
  if (plain != nullptr) store(m, whole, count, plain + at);
  if constexpr (kAffine != Affine::none) {
    Wide<T> factor[kGroup], unused[kGroup];
    parameters<kAffine, T>(scale, nullptr, planes, at, factor, unused);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) m[i] = product(factor[i], m[i]);
  }
  store(m, whole, count, scaled + at);
}

// Reads a byte per element, writes a bit. Layout: flags [numel], each 0 or 1.
__global__ void __launch_bounds__(kThreads)
    pack(const uint8_t* __restrict__ flags, uint8_t* __restrict__ mask, int64_t numel,
         bool aligned) {
  const int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t at = kGroup * group;
  if (at >= numel) return;
  if (aligned && at + kGroup <= numel) {
    // The product moves the bit of byte j to place 56 + j.
    const uint64_t eight = *reinterpret_cast<const uint64_t*>(flags + at);
    mask[group] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  } else {
    unsigned bits = 0;
    for (int i = 0; i < kGroup; ++i) {
      if (at + i < numel && flags[at + i] != 0) bits |= 1u << i;
    }
    mask[group] = static_cast<uint8_t>(bits);
  }
}

// Reads numbers once, writes a bit of each: whether it is not 0. Layout: numbers [numel].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    pack_numbers(const T* __restrict__ numbers, uint8_t* __restrict__ mask, int64_t numel,
                 bool aligned) {
  const int64_t group = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t at = kGroup * group;
  if (at >= numel) return;
  const int count = static_cast<int>(min(int64_t{kGroup}, numel - at));
  Wide<T> z[kGroup];
  load(numbers + at, aligned && count == kGroup, count, z);
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) bits |= (i < count && z[i] != 0 ? 1u : 0u) << i;
  mask[group] = static_cast<uint8_t>(bits);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Blocks of a grid for so many elements; 0 where they are too many.
uint32_t blocks(int64_t numel) {
  const int64_t each = int64_t{kThreads} * kGroup;
  const int64_t found = (numel + each - 1) / each;
  return found > INT32_MAX ? 0 : static_cast<uint32_t>(found);
}

Affine affine_of(const Planes& planes, const void* scale, const void* shift) {
  if (scale == nullptr) return Affine::none;
  if (planes.inner % kGroup == 0) return Affine::one;
  const bool row = planes.inner == 1 && planes.channels % kGroup == 0;
  return row && aligned(scale) && aligned(shift) ? Affine::row : Affine::any;
}

template <typename T>
int launch_forward(const void* x, const void* scale, const void* shift, const void* residual,
                   void* y, void* mask, int64_t numel, int64_t inner, int64_t channels,
                   double slope, double upper, void* stream) {
  if (numel == 0) return cudaSuccess;
  const uint32_t grid = blocks(numel);
  if (grid == 0) return cudaErrorInvalidConfiguration;
  const Planes planes{numel, inner, channels};
  const Affine affine = affine_of(planes, scale, shift);
  const auto kernel = affine == Affine::none  ? rectify<T, Affine::none>
                      : affine == Affine::one ? rectify<T, Affine::one>
                      : affine == Affine::row ? rectify<T, Affine::row>
                                              : rectify<T, Affine::any>;
  const Wide<T> limit = std::isinf(upper) ? std::numeric_limits<Wide<T>>::quiet_NaN()
                                          : static_cast<Wide<T>>(upper);
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const T*>(x), static_cast<const T*>(scale), static_cast<const T*>(shift),
      static_cast<const T*>(residual), static_cast<T*>(y), static_cast<uint8_t*>(mask), planes,
      static_cast<Wide<T>>(slope), limit, aligned(x) && aligned(residual) && aligned(y));
  return cudaGetLastError();
}

template <typename T>
int launch_backward(const void* grad, const void* mask, const void* scale, void* scaled,
                    void* plain, int64_t numel, int64_t inner, int64_t channels, double slope,
                    int positive, void* stream) {
  if (numel == 0) return cudaSuccess;
  const uint32_t grid = blocks(numel);
  if (grid == 0) return cudaErrorInvalidConfiguration;
  const Planes planes{numel, inner, channels};
  const Affine affine = affine_of(planes, scale, nullptr);
  const auto kernel = affine == Affine::none  ? gradient<T, Affine::none>
                      : affine == Affine::one ? gradient<T, Affine::one>
                      : affine == Affine::row ? gradient<T, Affine::row>
                                              : gradient<T, Affine::any>;
  const Wide<T> floor = positive != 0 ? 0 : std::numeric_limits<Wide<T>>::quiet_NaN();
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const T*>(grad), static_cast<const uint8_t*>(mask),
      static_cast<const T*>(scale), static_cast<T*>(scaled), static_cast<T*>(plain), planes,
      static_cast<Wide<T>>(slope), floor, aligned(grad) && aligned(scaled) && aligned(plain));
  return cudaGetLastError();
}

}  // namespace

// Null stands for a part that is not there; upper inf is no bound. In the backward a null mask is
// one of all bits, and `positive` keeps positive gradients alone.
#define SALIENCY_FAST_LAUNCHERS(T, suffix)                                                        \
  extern "C" int saliency_fast_relu_mask_##suffix(                                                \
      const void* x, const void* scale, const void* shift, const void* residual, void* y,         \
      void* mask, int64_t numel, int64_t inner, int64_t channels, double slope, double upper,     \
      void* stream) {                                                                             \
    return launch_forward<T>(x, scale, shift, residual, y, mask, numel, inner, channels, slope,   \
                             upper, stream);                                                      \
  }                                                                                               \
  extern "C" int saliency_fast_relu_mask_backward_##suffix(                                       \
      const void* grad, const void* mask, const void* scale, void* scaled, void* plain,           \
      int64_t numel, int64_t inner, int64_t channels, double slope, int positive, void* stream) { \
    return launch_backward<T>(grad, mask, scale, scaled, plain, numel, inner, channels, slope,    \
                              positive, stream);                                                  \
  }
#define SALIENCY_FAST_PACK(T, suffix)                                                             \
  extern "C" int saliency_fast_pack_mask_##suffix(const void* numbers, void* mask, int64_t numel, \
                                                  void* stream) {                                 \
    if (numel == 0) return cudaSuccess;                                                           \
    const uint32_t grid = blocks(numel);                                                          \
    if (grid == 0) return cudaErrorInvalidConfiguration;                                          \
    pack_numbers<T><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(                    \
        static_cast<const T*>(numbers), static_cast<uint8_t*>(mask), numel, aligned(numbers));    \
    return cudaGetLastError();                                                                    \
  }
SALIENCY_FAST_LAUNCHERS(float, f32)
SALIENCY_FAST_PACK(float, f32)
SALIENCY_FAST_LAUNCHERS(double, f64)
SALIENCY_FAST_PACK(double, f64)
SALIENCY_FAST_LAUNCHERS(__nv_bfloat16, bf16)
SALIENCY_FAST_PACK(__nv_bfloat16, bf16)
SALIENCY_FAST_LAUNCHERS(__half, f16)
SALIENCY_FAST_PACK(__half, f16)
#undef SALIENCY_FAST_LAUNCHERS
#undef SALIENCY_FAST_PACK

// cudaSuccess where the current device has code of this library that its driver can run. All files
// are compiled for the same devices.
extern "C" int saliency_fast_device_status() {
  cudaFuncAttributes attributes;
  const cudaError_t code = cudaFuncGetAttributes(&attributes, pack);
  cudaGetLastError();
  return code;
}

extern "C" int saliency_fast_pack_mask_u8(const void* flags, void* mask, int64_t numel,
                                          void* stream) {
  if (numel == 0) return cudaSuccess;
  const uint32_t grid = blocks(numel);
  if (grid == 0) return cudaErrorInvalidConfiguration;
  pack<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint8_t*>(flags), static_cast<uint8_t*>(mask), numel, aligned(flags));
  return cudaGetLastError();
}
