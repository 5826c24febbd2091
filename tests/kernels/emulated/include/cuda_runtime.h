// Stand-in for <cuda_runtime.h> with which g++ compiles csrc/cuda/*.cu, and kernels run on the CPU.
// scheduler.cpp says how. What a kernel uses and this file does not declare does not compile.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__ inline
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
using std::max;
using std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };

namespace emulator {

extern dim3 block_index, thread_index, block_size;

// Of the running CUDA thread; each returns when the threads that it waits for have come.
void barrier();
unsigned active_mask();
bool match_all(unsigned mask, unsigned value);

void fence();
// The block's variable of this number, filled with a pattern when it is first asked for.
void* shared_memory(unsigned number, size_t size, size_t alignment);
cudaError_t last_error();

struct Grid {
  uint64_t blocks, threads, dynamic_shared = 0;
  cudaStream_t stream = nullptr;
};
void run(const Grid& grid, const std::function<void()>& thread);

// build.py makes this of `kernel<<<grid>>>(arguments)`.
template <typename... P>
auto launch(void (*kernel)(P...), Grid grid) {
  return [=](P... arguments) { run(grid, [&] { kernel(arguments...); }); };
}
// And this of `__shared__ T name;`.
template <typename T>
T& shared(unsigned number) {
  return *static_cast<T*>(shared_memory(number, sizeof(T), alignof(T)));
}

}  // namespace emulator

#define blockIdx (::emulator::block_index)
#define threadIdx (::emulator::thread_index)
#define blockDim (::emulator::block_size)

struct cudaFuncAttributes {};
template <typename... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*)(P...)) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return emulator::last_error(); }
inline void __syncthreads() { emulator::barrier(); }
inline void __threadfence() { emulator::fence(); }
inline unsigned __activemask() { return emulator::active_mask(); }
inline unsigned __match_all_sync(unsigned mask, unsigned value, int* equal) {
  *equal = emulator::match_all(mask, value);
  return *equal ? mask : 0;
}

// Atomics order nothing but themselves; loads and stores with a cache hint are plain ones.
template <typename T>
T atomicAdd(T* to, T value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}
template <typename T>
T atomicExch(T* to, T value) {
  return __atomic_exchange_n(to, value, __ATOMIC_RELAXED);
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

// build.py compiles without contraction into fused multiply-adds.
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __popc(unsigned value) { return __builtin_popcount(value); }
