// magnitude_percentile. CUDA, not Triton: histograms are shared-memory atomics here, so a pass
// settles 11 bits; Triton's are warp votes, whose work doubles with every bit.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 512;
constexpr int kDigit = 11;
constexpr int kBins = 1 << kDigit;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int64_t kValuesPerThread = 16;
constexpr int64_t kMostParts = 1024;

using Count = unsigned long long;

// What a row knows between passes; all zero before the first.
struct Row {
  Count prefix;  // the bits found so far
  Count left;    // how many of the values with this prefix are smaller than the one sought
  Count ticket;  // blocks of this pass that have added their counts
  Count count[kBins];
};

// Counts a value's digit. Maps hold long runs of zeros: a warp of equal digits adds once.
__device__ void add(unsigned* count, unsigned digit) {
  const unsigned lanes = __activemask();
  int equal;
  __match_all_sync(lanes, digit, &equal);
  if (!equal) {
    atomicAdd(count + digit, 1u);
  } else if ((threadIdx.x & 31) == __ffs(lanes) - 1) {
    atomicAdd(count + digit, static_cast<unsigned>(__popc(lanes)));
  }
}

// Moves the row on by the digit in which the counts pass `left`, and clears it for the next pass.
__device__ void narrow(Row& row, Count left, int width) {
  __shared__ Count sums[kThreads];
  Count found[kBinsPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    Count& count = row.count[threadIdx.x * kBinsPerThread + i];
    found[i] = __ldcg(&count);
    count = 0;
    sum += found[i];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned step = 1; step < kThreads; step *= 2) {
    const Count before = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
    __syncthreads();
  }
  Count below = sums[threadIdx.x] - sum;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (below <= left && left < below + found[i]) {
      row.prefix = row.prefix << width | (threadIdx.x * kBinsPerThread + i);
      row.left = left - below;
      atomicExch(&row.ticket, Count{0});  // atomic, like the other blocks' additions to it
    }
    below += found[i];
  }
}

// Reads the map once a pass, from L2 after the first; a block counts in shared memory.
// Layout: values [rows, numel] contiguous, as bits; the block that ends last narrows its row.
template <typename Bits>
__global__ void __launch_bounds__(kThreads)
    select(const Bits* __restrict__ values, Row* rows_state, Bits* __restrict__ out, uint32_t rows,
           uint32_t parts, int64_t numel, int64_t rank, int shift, int width, bool first) {
  __shared__ unsigned count[kBins];
  __shared__ bool last;
  for (int i = threadIdx.x; i < kBins; i += kThreads) count[i] = 0;
  __syncthreads();

  Row& row = rows_state[blockIdx.x % rows];
  const Bits* from = values + int64_t{blockIdx.x % rows} * numel;
  const Bits prefix = static_cast<Bits>(row.prefix);
  const Bits magnitude = static_cast<Bits>(~Bits{0}) >> 1;
  const int64_t start = int64_t{blockIdx.x / rows} * kThreads + threadIdx.x;
#pragma unroll 4
  for (int64_t at = start; at < numel; at += int64_t{parts} * kThreads) {
    const Bits high = (from[at] & magnitude) >> shift;
    if (high >> width == prefix) add(count, static_cast<unsigned>(high) & ((1u << width) - 1));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (count[i] != 0) atomicAdd(&row.count[i], static_cast<Count>(count[i]));
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&row.ticket, Count{1}) == parts - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  narrow(row, first ? static_cast<Count>(rank) : row.left, width);
  __syncthreads();
  if (shift == 0 && threadIdx.x == 0) out[blockIdx.x % rows] = static_cast<Bits>(row.prefix);
}

template <typename Bits>
int launch(const void* values, void* state, void* out, int64_t rows, int64_t numel, int64_t rank,
           void* stream) {
  if (rows == 0) return cudaSuccess;
  int64_t parts = (numel + kThreads * kValuesPerThread - 1) / (kThreads * kValuesPerThread);
  parts = parts < kMostParts ? parts : kMostParts;
  if (rows * parts > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int bits = 8 * sizeof(Bits) - 1;
  for (int shift = bits; shift > 0;) {
    const int width = shift < kDigit ? shift : kDigit;
    const bool first = shift == bits;
    shift -= width;
    select<Bits><<<static_cast<uint32_t>(rows * parts), kThreads, 0,
                   static_cast<cudaStream_t>(stream)>>>(
        static_cast<const Bits*>(values), static_cast<Row*>(state), static_cast<Bits*>(out),
        static_cast<uint32_t>(rows), static_cast<uint32_t>(parts), numel, rank, shift, width,
        first);
    if (const cudaError_t code = cudaGetLastError(); code != cudaSuccess) return code;
  }
  return cudaSuccess;
}

}  // namespace

// Bytes of zeroed state that a row needs.
extern "C" int64_t saliency_fast_percentile_state() { return sizeof(Row); }

extern "C" int saliency_fast_magnitude_percentile_f32(const void* values, void* state, void* out,
                                                      int64_t rows, int64_t numel, int64_t rank,
                                                      void* stream) {
  return launch<uint32_t>(values, state, out, rows, numel, rank, stream);
}

extern "C" int saliency_fast_magnitude_percentile_f64(const void* values, void* state, void* out,
                                                      int64_t rows, int64_t numel, int64_t rank,
                                                      void* stream) {
  return launch<uint64_t>(values, state, out, rows, numel, rank, stream);
}
