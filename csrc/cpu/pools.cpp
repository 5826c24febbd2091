// maxpool_index, maxpool_index_backward. Forward, several windows of a row at a time, their maxima
// in the first-level cache. Backward, gradients are spread in the windows' row-major order over
// bands of the result that stay in the cache, so that sums depend neither on the threads nor on
// the layout.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>

#include "cpu/launch.h"
#include "cpu/pool.h"
#include "cpu/simd.h"

namespace saliency_fast {
namespace {

// Outputs whose maxima and places are kept at a time.
constexpr int64_t kTogether = 256;
// Elements of an input row that they may see.
constexpr int64_t kSeen = 1024;
// Loops over outputs run on to a multiple, so that none is left over for a scalar loop.
constexpr int64_t kLanes = 16;
// Sums of a band: in the result itself they are 2 MB of float32, else 128 KB of the stack.
constexpr int64_t kBandInPlace = 524288;
constexpr int64_t kBand = 32768;

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
// As wide as the number it belongs to, so that one comparison serves both registers.
template <typename T>
using Place = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;
template <typename T>
constexpr bool kIsWide = std::is_same_v<T, Wide<T>>;
template <typename T>
constexpr Wide<T> kLeast = -std::numeric_limits<Wide<T>>::infinity();

// The windows of one row of the output, and their places along its other axes.
struct Taps {
  int64_t od, oh;
  Range kd, kh;

  // The number of the first place of a window that lies in the input, else 0.
  int64_t first(const Pool& pool, Range kw) const {
    const bool none = kd.empty() || kh.empty() || kw.empty();
    return none ? 0 : pool.number(kd.first, kh.first) + kw.first;
  }
};

// The first of equal numbers stays and the last NaN, as in PyTorch.
template <typename T>
SALIENCY_FAST_INLINE void keep_largest(const Wide<T>* seen, int64_t number, int64_t count,
                                       Wide<T>* best, Place<T>* place) {
  for (int64_t i = 0; i < count; ++i) {
    const bool taken = (seen[i] > best[i]) | (seen[i] != seen[i]);
    best[i] = taken ? seen[i] : best[i];
    place[i] = taken ? static_cast<Place<T>>(number) : place[i];
  }
}

// Stores maxima and places of buffers that are longer than `count` by up to kLanes.
template <typename T>
SALIENCY_FAST_INLINE void store(const Wide<T>* best, const Place<T>* place, int64_t count,
                                T* values, uint8_t* index) {
  T value[kTogether];
  uint8_t byte[kTogether];
  const int64_t padded = ceil_div(count, kLanes) * kLanes;
  for (int64_t i = 0; i < padded; ++i) value[i] = static_cast<T>(best[i]);
  for (int64_t i = 0; i < padded; ++i) byte[i] = static_cast<uint8_t>(place[i]);
  std::memcpy(values, value, static_cast<size_t>(count) * sizeof(T));
  std::memcpy(index, byte, static_cast<size_t>(count));
}

// Columns of an input row from `start` on, -inf beyond its ends; with a stride of 2, even and odd
// ones apart, so that neighbouring windows see neighbours.
template <typename T, int64_t kStride>
SALIENCY_FAST_INLINE void see_row(const T* row, int64_t in, int64_t start, int64_t length,
                                  Wide<T>* seen) {
  const int64_t part_length = ceil_div(length, kStride);
  for (int64_t part = 0; part < kStride; ++part) {
    Wide<T>* const to = seen + part * (kSeen / kStride);
    const int64_t column = start + part, room = std::max<int64_t>(0, in - column);
    const int64_t first = std::clamp<int64_t>(ceil_div(-column, kStride), 0, part_length);
    const int64_t last = std::clamp<int64_t>(ceil_div(room, kStride), first, part_length);
    for (int64_t i = 0; i < first; ++i) to[i] = kLeast<T>;
    for (int64_t i = first; i < last; ++i) to[i] = row[column + i * kStride];
    for (int64_t i = last; i < part_length; ++i) to[i] = kLeast<T>;
  }
}

// What `count` windows see, in `run` channels, at the place that the first has at column `start`.
template <typename T, int64_t kInner>
SALIENCY_FAST_INLINE void see_place(const T* row, const Axis& w, int64_t inner, int64_t run,
                                    int64_t start, int64_t count, int64_t padded, Wide<T>* seen) {
  const int64_t room = std::max<int64_t>(0, w.in - start);
  const int64_t first = std::clamp<int64_t>(ceil_div(-start, w.stride), 0, count);
  const int64_t last = std::clamp<int64_t>(ceil_div(room, w.stride), first, count);
  for (int64_t i = 0; i < first * run; ++i) seen[i] = kLeast<T>;
  for (int64_t i = first; i < last; ++i) {
    const T* const from = row + (start + i * w.stride) * inner;
    for (int64_t c = 0; c < (kInner == 0 ? run : kInner); ++c) seen[i * run + c] = from[c];
  }
  for (int64_t i = last * run; i < padded; ++i) seen[i] = kLeast<T>;
}

// The windows [first, first + count) of a row and `run` of their channels, all in one loop. kInner
// and kStride are 0 where they are not known here; with a known stride, rows are seen whole.
template <typename T, int64_t kInner, int64_t kStride>
SALIENCY_FAST_INLINE void pool_together(const Pool& pool, const T* x, const Taps& taps,
                                        int64_t first, int64_t count, int64_t run, T* values,
                                        uint8_t* index) {
  const Axis& w = pool.w;
  Wide<T> best[kTogether], seen[kStride == 0 ? kTogether : kSeen];
  Place<T> place[kTogether];
  const auto leading = static_cast<Place<T>>(taps.first(pool, {0, w.kernel}));
  const int64_t padded = ceil_div(count * run, kLanes) * kLanes;
  for (int64_t i = 0; i < padded; ++i) best[i] = kLeast<T>;
  for (int64_t i = 0; i < padded; ++i) place[i] = leading;
  // Where nothing exceeds -inf, the first place in the input counts.
  for (int64_t i = 0; i < count && w.start(first + i) < 0; ++i) {
    std::fill_n(place + i * run, run, taps.first(pool, w.places(first + i)));
  }
  for (int64_t kd = taps.kd.first; kd < taps.kd.last; ++kd) {
    const int64_t id = pool.d.start(taps.od) + kd * pool.d.dilation;
    for (int64_t kh = taps.kh.first; kh < taps.kh.last; ++kh) {
      const int64_t ih = pool.h.start(taps.oh) + kh * pool.h.dilation;
      const T* const row = x + (id * pool.h.in + ih) * w.in * pool.inner;
      if constexpr (kStride != 0) {
        see_row<T, kStride>(row, w.in, w.start(first), (padded - 1) * kStride + w.reach(), seen);
      }
      for (int64_t kw = 0; kw < w.kernel; ++kw) {
        const int64_t column = kw * w.dilation, number = pool.number(kd, kh) + kw;
        const Wide<T>* here = seen;
        if constexpr (kStride != 0) {
          here += column % kStride * (kSeen / kStride) + column / kStride;
        } else {
          see_place<T, kInner>(row, w, pool.inner, run, w.start(first) + column, count, padded,
                               seen);
        }
        keep_largest<T>(here, number, padded, best, place);
      }
    }
  }
  store(best, place, count * run, values, index);
}

template <typename T>
SALIENCY_FAST_INLINE void pool_rows_body(const Pool& pool, const T* x, int64_t begin, int64_t end,
                                         T* values, uint8_t* index) {
  const Axis& w = pool.w;
  const int64_t inner = pool.inner;
  // Several windows with all their channels, or one with some of them.
  const int64_t run = std::min(inner, kTogether), most = kTogether / run;
  const bool whole = inner == 1 && w.stride <= 2 && kTogether * w.stride + w.reach() <= kSeen;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t oh = row % pool.h.out, od = row / pool.h.out % pool.d.out;
    const Taps taps{od, oh, pool.d.places(od), pool.h.places(oh)};
    const T* const example = x + row / pool.rows_out() * pool.rows_in() * w.in * inner;
    for (int64_t first = 0; first < w.out; first += most) {
      const int64_t count = std::min(most, w.out - first);
      for (int64_t c = 0; c < inner; c += run) {
        const int64_t width = std::min(run, inner - c), at = (row * w.out + first) * inner + c;
        const T* const from = example + c;
        if (whole && w.stride == 1) {
          pool_together<T, 1, 1>(pool, from, taps, first, count, 1, values + at, index + at);
        } else if (whole) {
          pool_together<T, 1, 2>(pool, from, taps, first, count, 1, values + at, index + at);
        } else if (inner == 1) {
          pool_together<T, 1, 0>(pool, from, taps, first, count, 1, values + at, index + at);
        } else {
          pool_together<T, 0, 0>(pool, from, taps, first, count, width, values + at, index + at);
        }
      }
    }
  }
}

// Elements [first, last) of each of `run` channels of a result from `channel` on; sums of an
// element's channels lie together, `pitch` to an element.
struct Band {
  int64_t first, last, channel, run, pitch;
};

// How far each place of a window lies from its start; bytes that name none lie beyond all.
using Offsets = std::array<int64_t, kPlaces>;

Offsets offsets_in(const Pool& pool, int64_t pitch) {
  Offsets found;
  found.fill(std::numeric_limits<int64_t>::min() / 2);
  for (int64_t kd = 0; kd < pool.d.kernel; ++kd) {
    for (int64_t kh = 0; kh < pool.h.kernel; ++kh) {
      for (int64_t kw = 0; kw < pool.w.kernel; ++kw) {
        const int64_t row = kd * pool.d.dilation * pool.h.in + kh * pool.h.dilation;
        found[pool.number(kd, kh) + kw] = (row * pool.w.in + kw * pool.w.dilation) * pitch;
      }
    }
  }
  return found;
}

// Adds gradients where their index points, if that lies among the `size` sums of a band. Sums of
// a half type have one term.
template <typename T, typename Sum>
SALIENCY_FAST_INLINE void add_run(const T* grad, const uint8_t* index, const Offsets& offsets,
                                  int64_t count, int64_t start, int64_t step, uint64_t size,
                                  Sum* sum) {
  Sum wide[kTogether];
  for (int64_t from = 0; from < count; from += kTogether) {
    const int64_t length = std::min(kTogether, count - from);
    const Sum* value = wide;
    if constexpr (std::is_same_v<T, Sum>) {
      value = grad + from;
    } else {
      for (int64_t i = 0; i < length; ++i) wide[i] = grad[from + i];
    }
    for (int64_t i = 0; i < length; ++i) {
      const int64_t at = start + (from + i) * step + offsets[index[from + i]];
      if (static_cast<uint64_t>(at) >= size) continue;
      if constexpr (kIsWide<Sum>) {
        sum[at] += value[i];
      } else {
        sum[at] = value[i];
      }
    }
  }
}

// Adds the gradients of one example that belong to a band of its result.
template <typename T, typename Sum>
SALIENCY_FAST_INLINE void spread(const Pool& pool, const Offsets& offsets, const T* grad,
                                 const uint8_t* index, const Band& band, Sum* sum) {
  const auto& [outer, inner, d, h, w] = pool;
  const int64_t slice = h.in * w.in, from = band.first, to = band.last - 1;
  const Range all_d = d.windows(from / slice, to / slice);
  const Range all_h = from / slice == to / slice ? h.windows(from / w.in % h.in, to / w.in % h.in)
                                                 : Range{0, h.out};
  const uint64_t size = static_cast<uint64_t>((band.last - band.first) * band.pitch);
  const bool none_is_empty = w.in >= w.dilation;
  for (int64_t od = all_d.first; od < all_d.last; ++od) {
    for (int64_t oh = all_h.first; oh < all_h.last; ++oh) {
      if (d.places(od).empty() || h.places(oh).empty()) continue;
      const int64_t row = (od * h.out + oh) * w.out;
      const int64_t start = d.start(od) * slice + h.start(oh) * w.in - w.padding - band.first;
      if (inner == 1 && none_is_empty) {
        add_run(grad + row, index + row, offsets, w.out, start, w.stride, size, sum);
        continue;
      }
      for (int64_t ow = 0; ow < w.out; ++ow) {
        const int64_t at = (row + ow) * inner + band.channel;
        if (!none_is_empty && w.places(ow).empty()) continue;
        add_run(grad + at, index + at, offsets, band.run, (start + ow * w.stride) * band.pitch, 1,
                size, sum);
      }
    }
  }
}

// Whether a result can hold its own sums: those of half types only where they have one term.
template <typename T>
bool sums_in_place(const Pool& pool) {
  return kIsWide<T> || pool.apart();
}

// One band of a result; sums of half types are rounded once, when the band is done.
template <typename T>
SALIENCY_FAST_INLINE void fill_band_body(const Pool& pool, const Offsets& offsets, const T* grad,
                                         const uint8_t* index, const Band& band, T* out) {
  const int64_t count = band.last - band.first;
  T* const to = out + band.first * pool.inner + band.channel;
  if (sums_in_place<T>(pool)) {
    std::fill_n(to, count * pool.inner, T{0});
    spread(pool, offsets, grad, index, band, to);
    return;
  }
  if constexpr (!kIsWide<T>) {
    Wide<T> sum[kBand];
    std::fill_n(sum, count * band.pitch, Wide<T>{0});
    spread(pool, offsets, grad, index, band, sum);
    // In one loop where the band has all channels, since an element may have one.
    const int64_t run = band.run == pool.inner ? count * band.run : band.run;
    for (int64_t i = 0; i < count; i += run / band.run) {
      for (int64_t c = 0; c < run; ++c) {
        to[i * pool.inner + c] = static_cast<T>(sum[i * band.pitch + c]);
      }
    }
  }
}

// Clones are made of functions, not of templates: one set per type.
#define SALIENCY_FAST_LEAVES(T)                                                                 \
  SALIENCY_FAST_CLONES                                                                          \
  void pool_rows(const Pool& pool, const T* x, int64_t begin, int64_t end, T* values,           \
                 uint8_t* index) {                                                              \
    pool_rows_body(pool, x, begin, end, values, index);                                         \
  }                                                                                             \
  SALIENCY_FAST_CLONES                                                                          \
  void fill_band(const Pool& pool, const Offsets& offsets, const T* grad, const uint8_t* index, \
                 const Band& band, T* out) {                                                    \
    fill_band_body(pool, offsets, grad, index, band, out);                                      \
  }
SALIENCY_FAST_LEAVES(float)
SALIENCY_FAST_LEAVES(double)
SALIENCY_FAST_LEAVES(at::Half)
SALIENCY_FAST_LEAVES(at::BFloat16)
#undef SALIENCY_FAST_LEAVES

template <typename T>
void pool_all(const Pool& pool, const at::Tensor& x, at::Tensor& values, at::Tensor& index) {
  const T* const from = x.const_data_ptr<T>();
  T* const value = values.mutable_data_ptr<T>();
  uint8_t* const place = index.mutable_data_ptr<uint8_t>();
  const int64_t places = pool.d.kernel * pool.h.kernel * pool.w.kernel;
  const int64_t work = std::max<int64_t>(1, pool.w.out * pool.inner * places);
  at::parallel_for(0, pool.outer * pool.rows_out(), ceil_div(kMinimumWork, work),
                   [&](int64_t begin, int64_t end) {
    pool_rows(pool, from, begin, end, value, place);
  });
}

template <typename T>
void fill_all(const Pool& pool, const at::Tensor& grad, const at::Tensor& index, at::Tensor& out) {
  const T* const from = grad.const_data_ptr<T>();
  const uint8_t* const place = index.const_data_ptr<uint8_t>();
  T* const to = out.mutable_data_ptr<T>();
  const bool in_place = sums_in_place<T>(pool);
  const int64_t pitch = in_place ? pool.inner : std::min(pool.inner, kLanes);
  const Offsets offsets = offsets_in(pool, pitch);
  const int64_t plane = pool.rows_in() * pool.w.in;
  const int64_t pooled = pool.rows_out() * pool.w.out * pool.inner;
  const int64_t length = std::clamp<int64_t>((in_place ? kBandInPlace : kBand) / pitch, 1, plane);
  const int64_t bands = ceil_div(plane, length), runs = ceil_div(pool.inner, pitch);
  at::parallel_for(0, pool.outer * bands * runs, ceil_div(kMinimumWork, length * pitch),
                   [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t example = task / runs / bands;
      const int64_t channel = task % runs * pitch, first = task / runs % bands * length;
      const Band band{first, std::min(plane, first + length), channel,
                      std::min(pitch, pool.inner - channel), pitch};
      fill_band(pool, offsets, from + example * pooled, place + example * pooled, band,
                to + example * plane * pool.inner);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> maxpool_index(const at::Tensor& x, at::IntArrayRef kernel,
                                                 at::IntArrayRef stride, at::IntArrayRef padding,
                                                 at::IntArrayRef dilation, bool ceil_mode) {
  const char* op = "maxpool_index";
  check_batch(x, op, "x");
  std::array<Axis, 3> axes =
      checked_axes(op, x.sizes().slice(2), kernel, stride, padding, dilation);
  const std::vector<int64_t> shape = pooled_shape(op, x, kernel, ceil_mode, axes);
  const at::MemoryFormat form = layout(x);
  const at::Tensor input = x.contiguous(form);
  at::Tensor values = at::empty(shape, x.options(), form);
  at::Tensor index = at::empty(shape, x.options().dtype(at::kByte), form);
  const Pool pool = pool_of(x, form, axes);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "maxpool_index",
                                  [&] { pool_all<scalar_t>(pool, input, values, index); });
  return {values, index};
}

at::Tensor maxpool_index_backward(const at::Tensor& grad, const at::Tensor& index,
                                  at::IntArrayRef size, at::IntArrayRef kernel,
                                  at::IntArrayRef stride, at::IntArrayRef padding,
                                  at::IntArrayRef dilation) {
  const char* op = "maxpool_index_backward";
  check_batch(grad, op, "grad");
  TORCH_CHECK_VALUE(index.scalar_type() == at::kByte, op, ": index must be uint8: got ",
                    index.scalar_type());
  TORCH_CHECK_VALUE(grad.sizes() == index.sizes(), op, ": grad must be like index, ",
                    index.sizes(), ": got ", grad.sizes());
  std::array<Axis, 3> axes = checked_axes(op, size, kernel, stride, padding, dilation);
  const at::IntArrayRef out = grad.sizes().slice(2);
  std::vector<int64_t> shape = grad.sizes().vec();
  for (size_t i = 0; i < size.size(); ++i) {
    Axis& axis = axes[3 - size.size() + i];
    axis.out = out.size() == size.size() ? out[i] : 0;
    TORCH_CHECK_VALUE(
        axis.out > 0 && (axis.out == axis.fitting(false) || axis.out == axis.fitting(true)), op,
        ": grad must be a pool of an input of ", size, ": got ", grad.sizes());
    shape[2 + i] = axis.in;
  }
  const at::MemoryFormat form = layout(index);
  const at::Tensor grads = grad.contiguous(form);
  const at::Tensor places = index.contiguous(form);
  at::Tensor result = at::empty(shape, grad.options(), form);
  const Pool pool = pool_of(index, form, axes);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(),
                                  "maxpool_index_backward",
                                  [&] { fill_all<scalar_t>(pool, grads, places, result); });
  return result;
}

}  // namespace
}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("maxpool_index", &saliency_fast::maxpool_index);
  m.impl("maxpool_index_backward", &saliency_fast::maxpool_index_backward);
}
