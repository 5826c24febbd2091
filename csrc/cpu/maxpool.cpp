// maxpool: for a row of windows first along all axes but the last, in whole lines, then along that
// one, channel by channel. Each line is read once for every row of windows that sees it.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <limits>
#include <type_traits>

#include "cpu/launch.h"
#include "cpu/pool.h"
#include "cpu/simd.h"

namespace saliency_fast {
namespace {

// The first of equal numbers stays and the last NaN, as in PyTorch.
template <typename T, typename Wide>
SALIENCY_FAST_INLINE void keep_largest(const T* seen, int64_t count, Wide* best) {
  for (int64_t i = 0; i < count; ++i) {
    const Wide value = seen[i];
    const bool taken = (value > best[i]) | (value != value);
    best[i] = taken ? value : best[i];
  }
}

// Rows [begin, end) of the result; line and best: what a row's windows see along their other axes,
// and the maxima of one window.
template <typename T, typename Wide>
SALIENCY_FAST_INLINE void pool_rows_body(const Pool& pool, const T* x, int64_t begin, int64_t end,
                                         Wide* line, Wide* best, T* y) {
  constexpr Wide kLeast = -std::numeric_limits<Wide>::infinity();
  const int64_t inner = pool.inner, length = pool.w.in * inner;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t oh = row % pool.h.out, od = row / pool.h.out % pool.d.out;
    const Range kd = pool.d.places(od), kh = pool.h.places(oh);
    const T* const example = x + row / pool.rows_out() * pool.rows_in() * length;
    std::fill_n(line, length, kLeast);
    for (int64_t d = kd.first; d < kd.last; ++d) {
      for (int64_t h = kh.first; h < kh.last; ++h) {
        const int64_t id = pool.d.start(od) + d * pool.d.dilation;
        const int64_t ih = pool.h.start(oh) + h * pool.h.dilation;
        keep_largest(example + (id * pool.h.in + ih) * length, length, line);
      }
    }
    T* const to = y + row * pool.w.out * inner;
    for (int64_t ow = 0; ow < pool.w.out; ++ow) {
      const Range kw = pool.w.places(ow);
      std::fill_n(best, inner, kLeast);
      for (int64_t w = kw.first; w < kw.last; ++w) {
        keep_largest(line + (pool.w.start(ow) + w * pool.w.dilation) * inner, inner, best);
      }
      for (int64_t c = 0; c < inner; ++c) to[ow * inner + c] = static_cast<T>(best[c]);
    }
  }
}

#define SALIENCY_FAST_POOL(T, Wide)                                                             \
  SALIENCY_FAST_CLONES void pool_rows(const Pool& pool, const T* x, int64_t begin, int64_t end, \
                                      Wide* line, Wide* best, T* y) {                           \
    pool_rows_body<T, Wide>(pool, x, begin, end, line, best, y);                                \
  }
SALIENCY_FAST_POOL(float, float)
SALIENCY_FAST_POOL(double, double)
SALIENCY_FAST_POOL(at::Half, float)
SALIENCY_FAST_POOL(at::BFloat16, float)

at::Tensor maxpool(const at::Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  const char* op = "maxpool";
  check_batch(x, op, "x");
  std::array<Axis, 3> axes =
      checked_axes(op, x.sizes().slice(2), kernel, stride, padding, dilation);
  const std::vector<int64_t> shape = pooled_shape(op, x, kernel, ceil_mode, axes);
  const at::MemoryFormat form = layout(x);
  const at::Tensor input = x.contiguous(form);
  at::Tensor values = at::empty(shape, x.options(), form);
  const Pool pool = pool_of(x, form, axes);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "maxpool", [&] {
    const scalar_t* const from = input.const_data_ptr<scalar_t>();
    scalar_t* const to = values.mutable_data_ptr<scalar_t>();
    const int64_t work = pool.w.in * pool.inner * pool.h.kernel;
    using Wide = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    at::parallel_for(0, pool.outer * pool.rows_out(), ceil_div(kMinimumWork, work),
                     [&](int64_t begin, int64_t end) {
      std::vector<Wide> line(pool.w.in * pool.inner), best(pool.inner);
      pool_rows(pool, from, begin, end, line.data(), best.data(), to);
    });
  });
  return values;
}

}  // namespace

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) { m.impl("maxpool", &maxpool); }

}  // namespace saliency_fast
