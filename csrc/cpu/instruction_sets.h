// The code of SALIENCY_FAST_LOOPS for every instruction set: included where it is wanted, so without
// a guard. Sums take up to kSums registers; the others are for factors.
namespace avx512 {
constexpr int kLanes = 16, kSums = 24;
#define SALIENCY_FAST_ARCH "arch=x86-64-v4"
SALIENCY_FAST_FLOATS(_mm512, __m512)
#include SALIENCY_FAST_LOOPS
#undef SALIENCY_FAST_ARCH
}  // namespace avx512

namespace avx2 {
constexpr int kLanes = 8, kSums = 12;
#define SALIENCY_FAST_ARCH "arch=x86-64-v3"
SALIENCY_FAST_FLOATS(_mm256, __m256)
#include SALIENCY_FAST_LOOPS
#undef SALIENCY_FAST_ARCH
}  // namespace avx2
