// winograd: 3x3 convolutions by F(4x4, 3x3), in blocks of tiles whose transforms stay in the
// second-level cache. Each input is read once and a quarter, each output written once.
#include <ATen/core/Tensor.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/einsum.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "cpu/launch.h"
#include "cpu/registers.h"

namespace saliency_fast {
namespace {

// Channels come in whole registers of every instruction set.
constexpr int64_t kChannels = 16;

// A convolution: x [batch, height, width, in] to y [batch, rows, columns, out], and its tiles.
struct Shape {
  int64_t batch, in, height, width, out, rows, columns, top, left;
  int64_t down() const { return ceil_div(rows, 4); }
  int64_t across() const { return ceil_div(columns, 4); }
  int64_t tiles() const { return batch * down() * across(); }
};

void check_weight(const at::Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3,
                    "winograd: weight must be [D, C, 3, 3]: got ", weight.sizes());
  TORCH_CHECK_VALUE(weight.size(0) > 0 && weight.size(1) > 0 && weight.size(0) % kChannels == 0 &&
                        weight.size(1) % kChannels == 0,
                    "winograd: channels must be multiples of ", kChannels, ": got ",
                    weight.sizes());
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kFloat,
                    "winograd: weight must be float32: got ", weight.scalar_type());
}

Shape checked(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
              at::IntArrayRef padding) {
  check_weight(weight);
  TORCH_CHECK_VALUE(x.dim() == 4 && x.size(1) == weight.size(1),
                    "winograd: x must be [N, C, H, W] and weight [D, C, 3, 3]: got ", x.sizes(),
                    " and ", weight.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && (!bias || bias->scalar_type() == at::kFloat),
                    "winograd: x, weight and bias must be float32: got ", x.scalar_type());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0)),
                    "winograd: bias must be [", weight.size(0), "]: got ", bias->sizes());
  TORCH_CHECK_VALUE(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0,
                    "winograd: padding must be two numbers, not negative: got ", padding);
  const int64_t rows = x.size(2) + 2 * padding[0] - 2, columns = x.size(3) + 2 * padding[1] - 2;
  TORCH_CHECK_VALUE(rows > 0 && columns > 0, "winograd: images must have 3x3 pixels with padding ",
                    padding, ": got ", x.sizes());
  return {x.size(0), x.size(1), x.size(2),  x.size(3), weight.size(0),
          rows,      columns,   padding[0], padding[1]};
}

#ifdef SALIENCY_FAST_REGISTERS
// Tiles of a block: a multiple of the rows of every micro-kernel.
constexpr int64_t kTiles = 24;
// Registers of channels in the widest micro-kernel.
constexpr int64_t kWidest = 4;
// Points 0, +-sqrt(1/2), +-sqrt(2) and infinity: with 0, +-1 and +-2 errors are 2 to 3 times larger.
constexpr float kRoot = 1.41421356237309505f, kHalfRoot = 0.70710678118654752f;

// Where 4x4 outputs lie, and how many of them the image has; pitches in floats.
struct Tile {
  float* out;
  int64_t rows, columns, row_pitch, pitch;
};
using Pixels = std::array<const float*, 36>;

// One instruction set's versions.
struct Kernels {
  int64_t lanes;
  void (*input)(const Pixels&, const Pixels&, int64_t, int64_t, float*);
  void (*weight)(const float*, int64_t, float*);
  void (*output)(const float*, int64_t, const Tile*, int64_t, const float*, float);
  std::array<void (*)(const float*, const float*, int64_t, int64_t, float*), kWidest> multiply;
};

#define SALIENCY_FAST_LOOPS "cpu/winograd_tiles.h"
#include "cpu/instruction_sets.h"

// U of all weights [out, in, 3, 3]: for each part of the outputs [36, in, its width].
void transform_weights(const Kernels& run, int64_t out, int64_t in, const float* weight,
                       float* u) {
  const std::vector<int64_t> starts = parts_of(out, run.lanes, kWidest);
  const int64_t parts = static_cast<int64_t>(starts.size()) - 1;
  at::parallel_for(0, parts * in, 64, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / in, k = task % in, start = starts[part];
      const int64_t wide = starts[part + 1] - start;
      for (int64_t c = 0; c < wide; c += run.lanes) {
        float own[9 * kChannels];
        for (int64_t l = 0; l < run.lanes; ++l) {
          const float* const from = weight + ((start + c + l) * in + k) * 9;
          for (int64_t i = 0; i < 9; ++i) own[i * run.lanes + l] = from[i];
        }
        run.weight(own, in * wide, u + start * 36 * in + k * wide + c);
      }
    }
  });
}

// The inputs and outputs of one tile; pixels beyond the edges are `none`.
void place_tile(const Shape& s, int64_t number, const float* x, const float* none, float* y,
                Pixels& pixels, Tile& tile) {
  const int64_t n = number / (s.down() * s.across());
  const int64_t top = number / s.across() % s.down() * 4, left = number % s.across() * 4;
  for (int64_t i = 0; i < 6; ++i) {
    const int64_t h = top + i - s.top;
    const float* const row = x + (n * s.height + h) * s.width * s.in;
    for (int64_t j = 0; j < 6; ++j) {
      const int64_t w = left + j - s.left;
      const bool inside = h >= 0 && h < s.height && w >= 0 && w < s.width;
      pixels[6 * i + j] = inside ? row + w * s.in : none;
    }
  }
  tile = {y + ((n * s.rows + top) * s.columns + left) * s.out, std::min<int64_t>(4, s.rows - top),
          std::min<int64_t>(4, s.columns - left), s.columns * s.out, s.out};
}

void convolve(const Kernels& run, const Shape& s, const float* x, const float* u,
              const float* bias, float least, float* y) {
  const std::vector<int64_t> starts = parts_of(s.out, run.lanes, kWidest);
  const int64_t tiles = s.tiles(), v_size = 36 * kTiles * s.in;
  const int64_t m_size = 36 * kTiles * kWidest * run.lanes;
  const int64_t held = v_size + m_size;
  const at::Tensor scratch = at::empty({at::get_num_threads(), held}, at::kFloat);
  const at::Tensor zeros = at::zeros({s.in}, at::kFloat);
  const float* const none = zeros.const_data_ptr<float>();
  float* const memory = scratch.mutable_data_ptr<float>();
  at::parallel_for(0, ceil_div(tiles, kTiles), 1, [&](int64_t begin, int64_t end) {
    float* const v = memory + at::get_thread_num() * held;
    float* const m = v + v_size;
    std::array<Pixels, kTiles> pixels;
    std::array<Tile, kTiles> own;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t count = std::min(kTiles, tiles - block * kTiles);
      for (int64_t t = 0; t < count; ++t) {
        place_tile(s, block * kTiles + t, x, none, y, pixels[t], own[t]);
      }
      for (int64_t t = 0; t < count; ++t) {
        run.input(pixels[t], pixels[std::min(t + 1, count - 1)], s.in, kTiles * s.in, v + t * s.in);
      }
      for (size_t part = 0; part + 1 < starts.size(); ++part) {
        const int64_t start = starts[part], wide = starts[part + 1] - start;
        run.multiply[wide / run.lanes - 1](v, u + start * 36 * s.in, s.in, count, m);
        run.output(m, wide, own.data(), count, bias + start, least);
        for (int64_t t = 0; t < count; ++t) own[t].out += wide;
      }
    }
  });
}

const Kernels& kernels() { return has_avx512() ? avx512::kKernels : avx2::kKernels; }

at::Tensor transformed(const at::Tensor& weight) {
  const int64_t out = weight.size(0), in = weight.size(1);
  const at::Tensor from = weight.contiguous(), u = at::empty({36, in, out}, weight.options());
  transform_weights(kernels(), out, in, from.const_data_ptr<float>(), u.mutable_data_ptr<float>());
  return u;
}

at::Tensor convolved(const Shape& s, const at::Tensor& x, const at::Tensor& u,
                     const std::optional<at::Tensor>& bias, bool relu) {
  at::Tensor y =
      at::empty({s.batch, s.out, s.rows, s.columns}, x.options(), at::MemoryFormat::ChannelsLast);
  if (s.batch == 0) return y;
  const at::Tensor from = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor shift = bias ? bias->contiguous() : at::zeros({s.out}, x.options());
  const float least = relu ? 0.0f : -std::numeric_limits<float>::infinity();
  convolve(kernels(), s, from.const_data_ptr<float>(), u.const_data_ptr<float>(),
           shift.const_data_ptr<float>(), least, y.mutable_data_ptr<float>());
  return y;
}

#endif

bool runs() {
#ifdef SALIENCY_FAST_REGISTERS
  return has_avx2();
#else
  return false;
#endif
}

at::Tensor winograd_weights(const at::Tensor& weight) {
  check_weight(weight);
#ifdef SALIENCY_FAST_REGISTERS
  if (runs()) return transformed(weight);
#endif
  // Nobody takes them here: the same numbers, in their own order.
  const double half = std::sqrt(0.5), two = std::sqrt(2.0);
  std::vector<double> rows{1, 0, 0};
  for (const double point : {half, -half, two, -two}) {
    const double factor = point * point < 1 ? -1 / 1.5 : 1.0 / 6;
    for (const double power : {1.0, point, point * point}) rows.push_back(factor * power);
  }
  for (const double last : {0.0, 0.0, 1.0}) rows.push_back(last);
  const at::Tensor g = at::tensor(rows, at::kDouble).view({6, 3});
  return at::einsum("ah,bw,ochw->abco", {g, g, weight.to(at::kDouble)}).flatten(0, 1).to(at::kFloat);
}

at::Tensor winograd(const at::Tensor& x, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, at::IntArrayRef padding, bool relu,
                    const std::optional<at::Tensor>& ready) {
  const Shape s = checked(x, weight, bias, padding);
#ifdef SALIENCY_FAST_REGISTERS
  if (runs()) {
    TORCH_CHECK_VALUE(!ready || (ready->numel() == 36 * s.in * s.out && ready->is_contiguous() &&
                                 ready->scalar_type() == at::kFloat),
                      "winograd: ready must be winograd_weights(weight): got ", ready->sizes());
    return convolved(s, x, ready ? *ready : transformed(weight), bias, relu);
  }
#endif
  at::Tensor y = at::conv2d(x, weight, bias, /*stride=*/1, padding);
  if (relu) y.relu_();
  return y.contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("winograd", &winograd);
  m.impl("winograd_weights", &winograd_weights);
}

}  // namespace saliency_fast
