// noise_points. CUDA, not Triton: a thread's registers are the vector, so that four normals of one
// Philox block leave in 16-byte stores, for float64 too, without an exchange through shared memory.
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "philox.h"

namespace {

using saliency_fast::Normals;

constexpr int kThreads = 256;

// Sixteen bytes. The compiler takes other stores of them apart (nvcc 13.0): __stwb does not let it.
__device__ void store(float* to, const float* four) {
  __stwb(reinterpret_cast<float4*>(to), make_float4(four[0], four[1], four[2], four[3]));
}
__device__ void store(double* to, const double* two) {
  __stwb(reinterpret_cast<double2*>(to), make_double2(two[0], two[1]));
}

// Reads x once (from L2 for its further rows), writes rows * numel points; noise is never stored.
// Layout: x [B, numel], out [rows, numel] contiguous; Aligned: whole accesses of 16 bytes.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(kThreads)
    noise_points(const T* __restrict__ x, const double* __restrict__ sigma,
                 const int64_t* __restrict__ seed, const int64_t* __restrict__ item,
                 const int64_t* __restrict__ sample, T* __restrict__ out, uint32_t rows,
                 int64_t numel, bool antithetic, int64_t first_element) {
  const int64_t row = blockIdx.x % rows;
  const int64_t quad = int64_t{blockIdx.x / rows} * kThreads + threadIdx.x;
  const int64_t at = 4 * quad - first_element % 4;
  if (at >= numel) return;

  const int64_t example = item[row];
  int64_t number = sample[row];
  T width = static_cast<T>(sigma[example]);
  if (antithetic) {
    if (number % 2 == 1) width = -width;
    number /= 2;
  }
  const Normals<T> noise = saliency_fast::normals<T>(
      saliency_fast::philox(static_cast<uint64_t>(seed[example]),
                            static_cast<uint64_t>(first_element / 4 + quad),
                            static_cast<uint32_t>(number), saliency_fast::kNoiseStream));
  const T* from = x + example * numel + at;
  T* to = out + row * numel + at;
  if constexpr (Aligned) {
    using Access = std::conditional_t<std::is_same_v<T, float>, float4, double2>;
    constexpr int size = sizeof(Access) / sizeof(T);
    alignas(16) T point[4];
#pragma unroll
    for (int first = 0; first < 4; first += size) {
      *reinterpret_cast<Access*>(point + first) = *reinterpret_cast<const Access*>(from + first);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) point[i] += width * noise.value[i];
#pragma unroll
    for (int first = 0; first < 4; first += size) store(to + first, point + first);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at + i >= 0 && at + i < numel) to[i] = from[i] + width * noise.value[i];
    }
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T>
int launch(const void* x, const double* sigma, const int64_t* seed, const int64_t* item,
           const int64_t* sample, void* out, int64_t rows, int64_t numel, int antithetic,
           int64_t first_element, void* stream) {
  if (rows == 0 || numel == 0) return cudaSuccess;
  const int64_t quads = (first_element % 4 + numel + 3) / 4;
  const int64_t grid = rows * ((quads + kThreads - 1) / kThreads);
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool vector = first_element % 4 == 0 && numel % 4 == 0 && aligned(x) && aligned(out);
  const auto kernel = vector ? noise_points<T, true> : noise_points<T, false>;
  kernel<<<static_cast<uint32_t>(grid), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const T*>(x), sigma, seed, item, sample, static_cast<T*>(out),
      static_cast<uint32_t>(rows), numel, antithetic != 0, first_element);
  return cudaGetLastError();
}

}  // namespace

extern "C" int saliency_fast_noise_points_f32(const void* x, const double* sigma,
                                              const int64_t* seed, const int64_t* item,
                                              const int64_t* sample, void* out, int64_t rows,
                                              int64_t numel, int antithetic, int64_t first_element,
                                              void* stream) {
  return launch<float>(x, sigma, seed, item, sample, out, rows, numel, antithetic, first_element,
                       stream);
}

extern "C" int saliency_fast_noise_points_f64(const void* x, const double* sigma,
                                              const int64_t* seed, const int64_t* item,
                                              const int64_t* sample, void* out, int64_t rows,
                                              int64_t numel, int antithetic, int64_t first_element,
                                              void* stream) {
  return launch<double>(x, sigma, seed, item, sample, out, rows, numel, antithetic, first_element,
                        stream);
}
