// cam: channels are read once into float64 sums of a tile of places, whose order is fixed. Lines of
// the small map are widened first, so that all rows of the result are blends of contiguous lines.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>

#include "cpu/launch.h"
#include "cpu/simd.h"

namespace saliency_fast {
namespace {

// Places of a tile: its float64 sums are 8 KB.
constexpr int64_t kPlaces = 1024;
using Sizes = std::array<int64_t, 3>;

// Adds kChannels channels at once, so that a sum is loaded and stored once for all of them; kEach:
// weights lie like channels, not one for a channel.
template <typename T, bool kEach, int kChannels>
SALIENCY_FAST_INLINE void add(const T* channel, const T* weight, int64_t stride, int64_t count,
                              double* total) {
  for (int64_t i = 0; i < count; ++i) {
    double sum = total[i];
    for (int c = 0; c < kChannels; ++c) {
      const T factor = weight[kEach ? c * stride + i : c];
      sum += static_cast<double>(factor) * static_cast<double>(channel[c * stride + i]);
    }
    total[i] = sum;
  }
}

template <typename T, bool kEach>
SALIENCY_FAST_INLINE void weigh_body(const T* channel, const T* weight, int64_t channels,
                                     int64_t stride, int64_t count, bool rectify, T* out) {
  double total[kPlaces];
  for (int64_t i = 0; i < count; ++i) total[i] = 0.0;
  const int64_t step = kEach ? stride : 1;
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) {
    add<T, kEach, 4>(channel + c * stride, weight + c * step, stride, count, total);
  }
  for (; c < channels; ++c) {
    add<T, kEach, 1>(channel + c * stride, weight + c * step, stride, count, total);
  }
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<T>(rectify && total[i] < 0.0 ? 0.0 : total[i]);
  }
}

SALIENCY_FAST_CLONES
void weigh(const float* channel, const float* weight, int64_t channels, int64_t stride,
           int64_t count, bool each, bool rectify, float* out) {
  if (each) {
    weigh_body<float, true>(channel, weight, channels, stride, count, rectify, out);
  } else {
    weigh_body<float, false>(channel, weight, channels, stride, count, rectify, out);
  }
}

SALIENCY_FAST_CLONES
void weigh(const double* channel, const double* weight, int64_t channels, int64_t stride,
           int64_t count, bool each, bool rectify, double* out) {
  if (each) {
    weigh_body<double, true>(channel, weight, channels, stride, count, rectify, out);
  } else {
    weigh_body<double, false>(channel, weight, channels, stride, count, rectify, out);
  }
}

// The two places of the map that each place of the result lies between, and its share of the second.
template <typename T>
struct Axis {
  std::vector<int32_t> low, high;
  std::vector<T> share;

  // Numbers of half places are integers, so that shares are rounded once.
  Axis(int64_t in, int64_t out) : low(out), high(out), share(out) {
    for (int64_t i = 0; i < out; ++i) {
      const int64_t halves = std::max<int64_t>(0, (2 * i + 1) * in - out);
      low[i] = static_cast<int32_t>(halves / (2 * out));
      high[i] = static_cast<int32_t>(std::min<int64_t>(low[i] + 1, in - 1));
      share[i] = static_cast<T>(halves % (2 * out)) / static_cast<T>(2 * out);
    }
  }
};

template <typename T>
SALIENCY_FAST_INLINE T between(T a, T b, T share) {
  return a + share * (b - a);
}

template <typename T>
SALIENCY_FAST_INLINE void widen_body(const T* line, const int32_t* low, const int32_t* high,
                                     const T* share, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = between(line[low[i]], line[high[i]], share[i]);
}

SALIENCY_FAST_CLONES
void widen(const float* line, const int32_t* low, const int32_t* high, const float* share,
           int64_t count, float* out) {
  widen_body(line, low, high, share, count, out);
}

SALIENCY_FAST_CLONES
void widen(const double* line, const int32_t* low, const int32_t* high, const double* share,
           int64_t count, double* out) {
  widen_body(line, low, high, share, count, out);
}

// The four lines around one of the result, along depth and height, and its shares of the later.
template <typename T>
struct Lines {
  const T *near_low, *near_high, *far_low, *far_high;
  T height, depth;
};

template <typename T>
SALIENCY_FAST_INLINE void blend_body(const Lines<T>& lines, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = between(lines.near_low[i], lines.near_high[i], lines.height);
  }
  if (lines.depth == T{0}) return;
  for (int64_t i = 0; i < count; ++i) {
    const T far = between(lines.far_low[i], lines.far_high[i], lines.height);
    out[i] = between(out[i], far, lines.depth);
  }
}

SALIENCY_FAST_CLONES
void blend(const Lines<float>& lines, int64_t count, float* out) { blend_body(lines, count, out); }

SALIENCY_FAST_CLONES
void blend(const Lines<double>& lines, int64_t count, double* out) {
  blend_body(lines, count, out);
}

// map [examples, *in] to out [examples, *size].
template <typename T>
void resize(const T* map, int64_t examples, const Sizes& in, const Sizes& size, T* out) {
  const Axis<T> depth(in[0], size[0]), height(in[1], size[1]), width(in[2], size[2]);
  const int64_t lines = examples * in[0] * in[1], columns = size[2];
  std::vector<T> wide(lines * columns);
  const int64_t grain = ceil_div(kMinimumWork, columns);
  at::parallel_for(0, lines, grain, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      widen(map + line * in[2], width.low.data(), width.high.data(), width.share.data(), columns,
            wide.data() + line * columns);
    }
  });
  at::parallel_for(0, examples * size[0] * size[1], grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t y = row % size[1], z = row / size[1] % size[0];
      const T* const example = wide.data() + row / (size[0] * size[1]) * in[0] * in[1] * columns;
      const T* const near = example + depth.low[z] * in[1] * columns;
      const T* const far = example + depth.high[z] * in[1] * columns;
      const int64_t low = height.low[y] * columns, high = height.high[y] * columns;
      blend({near + low, near + high, far + low, far + high, height.share[y], depth.share[z]},
            columns, out + row * columns);
    }
  });
}

Sizes three(at::IntArrayRef sizes) {
  Sizes found{1, 1, 1};
  std::copy(sizes.rbegin(), sizes.rend(), found.rbegin());
  return found;
}

void check_arguments(const at::Tensor& activations, const at::Tensor& weights,
                     at::IntArrayRef size) {
  const int64_t axes = activations.dim() - 2;
  TORCH_CHECK(axes >= 1 && axes <= 3, "cam: activations must be [B, C, *] with 1 to 3 spatial "
              "axes: got ", activations.sizes());
  TORCH_CHECK(weights.sizes() == activations.sizes() ||
                  weights.sizes() == activations.sizes().slice(0, 2),
              "cam: weights must be [B, C] or like activations: got ", weights.sizes(),
              ", activations are ", activations.sizes());
  TORCH_CHECK(static_cast<int64_t>(size.size()) == axes &&
                  std::all_of(size.begin(), size.end(), [](int64_t n) { return n > 0; }),
              "cam: size must have a positive number for each of ", axes, " axes: got ", size);
  TORCH_CHECK(row_size(activations, "cam", "activations") > 0,
              "cam: activations must have elements: got ", activations.sizes());
}

at::Tensor cam(const at::Tensor& activations, const at::Tensor& weights, at::IntArrayRef size,
               bool rectify) {
  check_arguments(activations, weights, size);
  const at::ScalarType type = computed_in(activations, "cam", "activations");
  const at::Tensor values = activations.to(type).contiguous();
  const at::Tensor factors = weights.to(type).contiguous();
  const int64_t examples = values.size(0), channels = values.size(1);
  const int64_t positions = row_size(values, "cam", "activations") / channels;
  const bool each = weights.dim() > 2;
  std::vector<int64_t> shape = size.vec();
  shape.insert(shape.begin(), examples);
  at::Tensor out = empty_output(shape, values.options());
  const int64_t tiles = ceil_div(positions, kPlaces);
  AT_DISPATCH_FLOATING_TYPES(type, "cam", [&] {
    std::vector<scalar_t> map(examples * positions);
    const scalar_t* const from = values.const_data_ptr<scalar_t>();
    const scalar_t* const weight = factors.const_data_ptr<scalar_t>();
    const int64_t work = std::max<int64_t>(1, channels * std::min(positions, kPlaces));
    at::parallel_for(0, examples * tiles, ceil_div(kMinimumWork, work),
                     [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t example = task / tiles, first = task % tiles * kPlaces;
        weigh(from + example * channels * positions + first,
              weight + example * channels * (each ? positions : 1) + (each ? first : 0), channels,
              positions, std::min(kPlaces, positions - first), each, rectify,
              map.data() + example * positions + first);
      }
    });
    resize(map.data(), examples, three(values.sizes().slice(2)), three(size),
           out.mutable_data_ptr<scalar_t>());
  });
  return out;
}

}  // namespace
}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("cam", &saliency_fast::cam);
}
