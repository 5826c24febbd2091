// direct: convolutions of images of few channels, their rectifier and the maximum pool behind it in one
// pass. What the pool sees stays in the first two levels of cache; its maxima alone are written.
#include <ATen/core/Tensor.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/launch.h"
#include "cpu/pool.h"
#include "cpu/registers.h"

namespace saliency_fast {
namespace {

// The channels of the result come in whole registers of every instruction set.
constexpr int64_t kChannels = 16;
// Channels of an image, at most: with more, other algorithms waste less.
constexpr int64_t kFew = 4;

// A convolution of x [batch, in, height, width] to [down.out, across.out] places, and its pool, by
// axes whose inputs are those places. Without a pool, its windows are single places.
struct Shape {
  int64_t batch, in, out;
  Axis down, across, pool_down, pool_across;
};

void fit(Axis& axis, at::IntArrayRef kernel, at::IntArrayRef size) {
  axis.out = axis.fitting(false);
  TORCH_CHECK_VALUE(axis.out > 0, "direct: no window of ", kernel, " fits into ", size);
}

Shape checked(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef pool) {
  TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 4 && x.size(1) == weight.size(1),
                    "direct: x must be [N, C, H, W] and weight [D, C, h, w]: got ", x.sizes(),
                    " and ", weight.sizes());
  const int64_t in = x.size(1), out = weight.size(0);
  TORCH_CHECK_VALUE(in > 0 && in <= kFew && out > 0 && out % kChannels == 0,
                    "direct: there must be 1 to ", kFew, " channels, and a multiple of ", kChannels,
                    " results: got weight ", weight.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat &&
                        (!bias || bias->scalar_type() == at::kFloat),
                    "direct: x, weight and bias must be float32: got ", x.scalar_type(), ", ",
                    weight.scalar_type());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == out),
                    "direct: bias must be [", out, "]: got ", bias->sizes());
  TORCH_CHECK_VALUE(stride.size() == 2 && padding.size() == 2 && stride[0] > 0 && stride[1] > 0 &&
                        padding[0] >= 0 && padding[1] >= 0,
                    "direct: stride and padding must be two numbers each, positive and not "
                    "negative: got ",
                    stride, ", ", padding);
  TORCH_CHECK_VALUE(pool.empty() || pool.size() == 6,
                    "direct: pool must be empty, or kernel, stride and padding, two numbers each: "
                    "got ",
                    pool);
  const at::IntArrayRef kernel = weight.sizes().slice(2);
  Shape s{x.size(0), in, out};
  s.down = {x.size(2), 1, kernel[0], stride[0], padding[0]};
  s.across = {x.size(3), 1, kernel[1], stride[1], padding[1]};
  fit(s.down, kernel, x.sizes());
  fit(s.across, kernel, x.sizes());
  const std::array<int64_t, 2> places{s.down.out, s.across.out}, none{1, 1}, edge{0, 0};
  const bool pooled = !pool.empty();
  const at::IntArrayRef window = pooled ? pool.slice(0, 2) : at::IntArrayRef(none);
  const auto axes = checked_axes("direct", places, window, pooled ? pool.slice(2, 2) : none,
                                 pooled ? pool.slice(4, 2) : edge, none);
  s.pool_down = axes[1];
  s.pool_across = axes[2];
  fit(s.pool_down, window, places);
  fit(s.pool_across, window, places);
  return s;
}

#ifdef SALIENCY_FAST_REGISTERS
// Registers of channels in the widest loop.
constexpr int64_t kWidest = 4;
// Floats of an image's padded rows that a thread holds at once, unless a row of windows sees more.
constexpr int64_t kHeld = 16384;

// Rows of an image with their padding: kernel rows, columns and channels of one of them, floats from
// one result's kernel to the next one's, and from row to row.
struct Rows {
  int64_t kernel, taps, step, pitch;
};

// One instruction set's versions.
struct Kernels {
  int64_t lanes;
  std::array<void (*)(const Rows&, const float*, int64_t, const float*, const float*, float, float*,
                      int64_t),
             kWidest>
      results;
  void (*maxima)(const Axis&, const float* const*, int64_t, int64_t, float*);
};

#define SALIENCY_FAST_LOOPS "cpu/direct_rows.h"
#include "cpu/instruction_sets.h"

// The weights of each part of the results: [kernel rows, columns, channels, its width].
std::vector<float> laid_out(const at::Tensor& weight, const std::vector<int64_t>& starts) {
  const at::Tensor from = weight.contiguous();
  const float* const data = from.const_data_ptr<float>();
  const int64_t in = weight.size(1), places = weight.size(2) * weight.size(3);
  std::vector<float> found;
  found.reserve(weight.numel());
  for (size_t part = 0; part + 1 < starts.size(); ++part) {
    for (int64_t place = 0; place < places; ++place) {
      for (int64_t c = 0; c < in; ++c) {
        for (int64_t d = starts[part]; d < starts[part + 1]; ++d) {
          found.push_back(data[(d * in + c) * places + place]);
        }
      }
    }
  }
  return found;
}

// Rows [first, last) of one image, with zeros where they lie outside: [rows, padded columns, in].
void padded(const Shape& s, const at::Tensor& x, int64_t image, int64_t first, int64_t last,
            int64_t pitch, float* to) {
  const float* const from = x.const_data_ptr<float>() + image * x.stride(0);
  std::fill_n(to, (last - first) * pitch, 0.0f);
  for (int64_t h = std::max<int64_t>(first, 0); h < std::min(last, s.down.in); ++h) {
    float* const row = to + (h - first) * pitch + s.across.padding * s.in;
    for (int64_t c = 0; c < s.in; ++c) {
      const float* const line = from + c * x.stride(1) + h * x.stride(2);
      for (int64_t w = 0; w < s.across.in; ++w) row[w * s.in + c] = line[w * x.stride(3)];
    }
  }
}

void convolve(const Kernels& run, const Shape& s, const at::Tensor& x, const at::Tensor& weight,
              const float* bias, float least, float* y) {
  const std::vector<int64_t> starts = parts_of(s.out, run.lanes, kWidest);
  const std::vector<float> weights = laid_out(weight, starts);
  const int64_t pitch = (s.across.in + 2 * s.across.padding) * s.in;
  const Rows rows{s.down.kernel, s.across.kernel * s.in, s.across.stride * s.in, pitch};
  const bool pooled = s.pool_down.kernel * s.pool_across.kernel > 1 || s.pool_down.stride > 1 ||
                      s.pool_across.stride > 1;
  // A ring of as many rows of results as a window has.
  const int64_t line = s.across.out * s.out, ring = s.pool_down.kernel;
  const auto needed = [&](int64_t results) {
    return (results - 1) * s.down.stride + s.down.kernel;
  };
  int64_t band = 1;
  const auto seen = [&](int64_t windows) { return (windows - 1) * s.pool_down.stride + ring; };
  while (band < s.pool_down.out && needed(seen(band + 1)) * pitch <= kHeld) ++band;
  const int64_t bands = ceil_div(s.pool_down.out, band), input = needed(seen(band)) * pitch;
  const int64_t held = input + (pooled ? ring * line : 0);
  const at::Tensor scratch = at::empty({at::get_num_threads(), held}, at::kFloat);
  float* const memory = scratch.mutable_data_ptr<float>();
  at::parallel_for(0, s.batch * bands, 1, [&](int64_t begin, int64_t end) {
    float* const own = memory + at::get_thread_num() * held;
    std::vector<const float*> window(ring);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / bands, top = task % bands * band;
      const int64_t bottom = std::min(top + band, s.pool_down.out);
      // Rows of results that the band's windows see, and rows of the image that those see.
      int64_t done = std::max<int64_t>(0, s.pool_down.start(top));
      const int64_t stop = std::min(s.down.out, s.pool_down.start(bottom - 1) + ring);
      const int64_t first = s.down.start(done);
      padded(s, x, image, first, first + needed(stop - done), pitch, own);
      for (int64_t row = top; row < bottom; ++row) {
        float* const to = y + (image * s.pool_down.out + row) * s.pool_across.out * s.out;
        const int64_t start = std::max<int64_t>(0, s.pool_down.start(row));
        const int64_t over = std::min(s.down.out, s.pool_down.start(row) + ring);
        for (done = std::max(done, start); done < over; ++done) {
          const float* const from = own + (s.down.start(done) - first) * pitch;
          float* const result = pooled ? own + input + done % ring * line : to;
          const float* own_weights = weights.data();
          for (size_t part = 0; part + 1 < starts.size(); ++part) {
            const int64_t wide = starts[part + 1] - starts[part];
            run.results[wide / run.lanes - 1](rows, from, s.across.out, own_weights,
                                              bias + starts[part], least, result + starts[part],
                                              s.out);
            own_weights += rows.kernel * rows.taps * wide;
          }
        }
        if (!pooled) continue;
        for (int64_t h = start; h < over; ++h) window[h - start] = own + input + h % ring * line;
        run.maxima(s.pool_across, window.data(), over - start, s.out, to);
      }
    }
  });
}

at::Tensor convolved(const Shape& s, const at::Tensor& x, const at::Tensor& weight,
                     const std::optional<at::Tensor>& bias, bool relu) {
  at::Tensor y = at::empty({s.batch, s.out, s.pool_down.out, s.pool_across.out}, x.options(),
                           at::MemoryFormat::ChannelsLast);
  if (s.batch == 0) return y;
  const at::Tensor shift = bias ? bias->contiguous() : at::zeros({s.out}, x.options());
  const float least = relu ? 0.0f : -std::numeric_limits<float>::infinity();
  convolve(has_avx512() ? avx512::kKernels : avx2::kKernels, s, x, weight,
           shift.const_data_ptr<float>(), least, y.mutable_data_ptr<float>());
  return y;
}

#endif

at::Tensor direct(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, at::IntArrayRef stride,
                  at::IntArrayRef padding, bool relu, at::IntArrayRef pool) {
  const Shape s = checked(x, weight, bias, stride, padding, pool);
#ifdef SALIENCY_FAST_REGISTERS
  if (has_avx2()) return convolved(s, x, weight, bias, relu);
#endif
  at::Tensor y = at::conv2d(x, weight, bias, stride, padding);
  if (relu) y.relu_();
  if (!pool.empty()) {
    y = at::max_pool2d(y, pool.slice(0, 2), pool.slice(2, 2), pool.slice(4, 2));
  }
  return y.contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) { m.impl("direct", &direct); }

}  // namespace saliency_fast
