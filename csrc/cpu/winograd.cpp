// winograd: 3x3 convolutions by F(4x4, 3x3), in blocks of tiles whose transforms stay in the
// second-level cache. Each input is read once and a quarter, each output written once.
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <vector>

#include "cpu/launch.h"

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#include <immintrin.h>
#define SALIENCY_FAST_WINOGRAD
#endif

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

Shape checked(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
              at::IntArrayRef padding) {
  TORCH_CHECK_VALUE(x.dim() == 4 && weight.dim() == 4 && weight.size(2) == 3 &&
                        weight.size(3) == 3 && x.size(1) == weight.size(1),
                    "winograd: x must be [N, C, H, W] and weight [D, C, 3, 3]: got ", x.sizes(),
                    " and ", weight.sizes());
  TORCH_CHECK_VALUE(x.size(1) > 0 && weight.size(0) > 0 && x.size(1) % kChannels == 0 &&
                        weight.size(0) % kChannels == 0,
                    "winograd: channels must be multiples of ", kChannels, ": got ",
                    weight.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat &&
                        (!bias || bias->scalar_type() == at::kFloat),
                    "winograd: x, weight and bias must be float32: got ", x.scalar_type(), ", ",
                    weight.scalar_type());
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

#ifdef SALIENCY_FAST_WINOGRAD
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
  void (*output)(const float*, int64_t, const Tile*, int64_t, const float*);
  std::array<void (*)(const float*, const float*, int64_t, int64_t, float*), kWidest> multiply;
};

namespace avx512 {
constexpr int64_t kLanes = 16;
#define SALIENCY_FAST_ARCH "arch=x86-64-v4"
#define SALIENCY_FAST_FMA(a, b, c) (Floats) _mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c))
#include "cpu/winograd_tiles.h"
constexpr Kernels kKernels{
    kLanes,
    input_tile,
    weight_tile,
    output_tiles,
    {multiply_all<24, 1>, multiply_all<12, 2>, multiply_all<8, 3>, multiply_all<6, 4>}};
#undef SALIENCY_FAST_ARCH
#undef SALIENCY_FAST_FMA
}  // namespace avx512

namespace avx2 {
constexpr int64_t kLanes = 8;
#define SALIENCY_FAST_ARCH "arch=x86-64-v3"
#define SALIENCY_FAST_FMA(a, b, c) (Floats) _mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c))
#include "cpu/winograd_tiles.h"
constexpr Kernels kKernels{
    kLanes,
    input_tile,
    weight_tile,
    output_tiles,
    {multiply_all<12, 1>, multiply_all<6, 2>, multiply_all<4, 3>, multiply_all<3, 4>}};
#undef SALIENCY_FAST_ARCH
#undef SALIENCY_FAST_FMA
}  // namespace avx2

// The channels of the result in parts of up to kWidest registers, as even as can be.
std::vector<int64_t> parts_of(int64_t channels, int64_t lanes) {
  const int64_t registers = channels / lanes, parts = ceil_div(registers, kWidest);
  std::vector<int64_t> starts;
  for (int64_t i = 0; i <= parts; ++i) starts.push_back(registers * i / parts * lanes);
  return starts;
}

// U of all weights [out, in, 3, 3]: for each part of the outputs [36, in, its width].
void transform_weights(const Kernels& run, const std::vector<int64_t>& starts, int64_t in,
                       const float* weight, float* u) {
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

void convolve(const Kernels& run, const Shape& s, const std::vector<int64_t>& starts,
              const float* x, const float* u, const float* bias, float* y) {
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
        run.output(m, wide, own.data(), count, bias + start);
        for (int64_t t = 0; t < count; ++t) own[t].out += wide;
      }
    }
  });
}

at::Tensor transformed(const Shape& s, const at::Tensor& x, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias) {
  // As PyTorch's own kernels, by ATEN_CPU_CAPABILITY too.
  static const bool wide =
      __builtin_cpu_supports("x86-64-v4") && at::get_cpu_capability() == "AVX512";
  const Kernels& run = wide ? avx512::kKernels : avx2::kKernels;
  at::Tensor y =
      at::empty({s.batch, s.out, s.rows, s.columns}, x.options(), at::MemoryFormat::ChannelsLast);
  if (s.batch == 0) return y;
  const at::Tensor from = x.contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor kernel = weight.contiguous();
  const at::Tensor shift = bias ? bias->contiguous() : at::zeros({s.out}, x.options());
  const at::Tensor u = at::empty({36 * s.in * s.out}, x.options());
  const std::vector<int64_t> starts = parts_of(s.out, run.lanes);
  transform_weights(run, starts, s.in, kernel.const_data_ptr<float>(), u.mutable_data_ptr<float>());
  convolve(run, s, starts, from.const_data_ptr<float>(), u.const_data_ptr<float>(),
           shift.const_data_ptr<float>(), y.mutable_data_ptr<float>());
  return y;
}

#endif

at::Tensor winograd(const at::Tensor& x, const at::Tensor& weight,
                    const std::optional<at::Tensor>& bias, at::IntArrayRef padding) {
  const Shape s = checked(x, weight, bias, padding);
#ifdef SALIENCY_FAST_WINOGRAD
  if (__builtin_cpu_supports("x86-64-v3")) return transformed(s, x, weight, bias);
#endif
  return at::conv2d(x, weight, bias, /*stride=*/1, padding).contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) { m.impl("winograd", &winograd); }

}  // namespace saliency_fast
