// finish: gradients to attributions, channel maps and completeness sums, each input read once.
// Sums are float64 over tiles of a fixed size, so they do not depend on the threads.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <string_view>
#include <tuple>

#include "cpu/launch.h"
#include "cpu/simd.h"

namespace saliency_fast {
namespace {

enum class Reduction { none, sum, absmax, l2 };

Reduction reduction_of(std::string_view name) {
  if (name == "none") return Reduction::none;
  if (name == "sum") return Reduction::sum;
  if (name == "absmax") return Reduction::absmax;
  if (name == "l2") return Reduction::l2;
  TORCH_CHECK_VALUE(false, "reduction must be one of none, sum, absmax, l2: got '", name, "'");
}

// Places of a tile: its float64 workspace is 16 KB.
constexpr int64_t kPlaces = 1024;
constexpr int64_t kLanes = 16;

// One tile of places of one slot; channels lie `stride` apart. x and baseline may be null.
template <typename T>
struct Tile {
  const T* total;
  const T* x;
  const T* baseline;
  T* out;
  int64_t channels, stride, count;
};

// The order of additions is fixed by the lanes, not by the width of the registers.
SALIENCY_FAST_INLINE double lane_sum(const double* value, int64_t count) {
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) lane[j] += value[i + j];
  }
  for (int64_t j = 0; i + j < count; ++j) lane[j] += value[i + j];
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
  }
  return lane[0];
}

template <typename T>
SALIENCY_FAST_INLINE void multiply(const Tile<T>& tile, int64_t channel, T* value) {
  const int64_t offset = channel * tile.stride;
  const T* const total = tile.total + offset;
  const T* const x = tile.x == nullptr ? nullptr : tile.x + offset;
  const T* const baseline = tile.baseline == nullptr ? nullptr : tile.baseline + offset;
  if (x == nullptr) {
    for (int64_t i = 0; i < tile.count; ++i) value[i] = total[i];
  } else if (baseline == nullptr) {
    for (int64_t i = 0; i < tile.count; ++i) value[i] = total[i] * x[i];
  } else {
    for (int64_t i = 0; i < tile.count; ++i) value[i] = total[i] * (x[i] - baseline[i]);
  }
}

template <typename T>
SALIENCY_FAST_INLINE double finish_none(const Tile<T>& tile) {
  double sum[kPlaces];
  multiply(tile, 0, tile.out);
  for (int64_t i = 0; i < tile.count; ++i) sum[i] = static_cast<double>(tile.out[i]);
  return lane_sum(sum, tile.count);
}

template <typename T, Reduction kReduction>
SALIENCY_FAST_INLINE double finish_channels(const Tile<T>& tile) {
  T value[kPlaces];
  double sum[kPlaces], squares[kPlaces];
  for (int64_t i = 0; i < tile.count; ++i) sum[i] = squares[i] = 0.0;
  if (kReduction == Reduction::absmax) {
    for (int64_t i = 0; i < tile.count; ++i) tile.out[i] = T{0};
  }
  for (int64_t channel = 0; channel < tile.channels; ++channel) {
    multiply(tile, channel, value);
    for (int64_t i = 0; i < tile.count; ++i) sum[i] += static_cast<double>(value[i]);
    if (kReduction == Reduction::l2) {
      for (int64_t i = 0; i < tile.count; ++i) {
        squares[i] += static_cast<double>(value[i]) * static_cast<double>(value[i]);
      }
    } else if (kReduction == Reduction::absmax) {
      for (int64_t i = 0; i < tile.count; ++i) {
        const T size = std::abs(value[i]);
        const T most = tile.out[i];
        tile.out[i] = (size > most) | (size != size) ? size : most;  // NaN stays
      }
    }
  }
  if (kReduction == Reduction::sum) {
    for (int64_t i = 0; i < tile.count; ++i) tile.out[i] = static_cast<T>(sum[i]);
  } else if (kReduction == Reduction::l2) {
    for (int64_t i = 0; i < tile.count; ++i) tile.out[i] = static_cast<T>(std::sqrt(squares[i]));
  }
  return lane_sum(sum, tile.count);
}

template <typename T>
SALIENCY_FAST_INLINE double finish_body(const Tile<T>& tile, Reduction reduction) {
  if (reduction == Reduction::none) return finish_none(tile);
  if (reduction == Reduction::sum) return finish_channels<T, Reduction::sum>(tile);
  if (reduction == Reduction::absmax) return finish_channels<T, Reduction::absmax>(tile);
  return finish_channels<T, Reduction::l2>(tile);
}

SALIENCY_FAST_CLONES
double finish_tile(const Tile<float>& tile, Reduction reduction) {
  return finish_body(tile, reduction);
}

SALIENCY_FAST_CLONES
double finish_tile(const Tile<double>& tile, Reduction reduction) {
  return finish_body(tile, reduction);
}

struct Layout {
  int64_t slots, channels, places;
  int64_t slots_per_example;
  int64_t baseline_step;  // 0 where all examples share one baseline
};

template <typename T>
void run(const at::Tensor& total, const T* x, const T* baseline, const Layout& layout,
         Reduction reduction, at::Tensor& values, at::Tensor& sums) {
  const T* const totals = total.const_data_ptr<T>();
  T* const out = values.mutable_data_ptr<T>();
  const int64_t size = layout.channels * layout.places;
  const int64_t tiles = ceil_div(layout.places, kPlaces);
  std::vector<double> parts(static_cast<size_t>(layout.slots * tiles));
  const int64_t work = std::max<int64_t>(1, layout.channels * std::min(layout.places, kPlaces));
  at::parallel_for(0, layout.slots * tiles, ceil_div(kMinimumWork, work),
                   [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t slot = task / tiles;
      const int64_t first = (task % tiles) * kPlaces;
      const int64_t example = slot / layout.slots_per_example;
      parts[task] = finish_tile(
          Tile<T>{totals + slot * size + first,
                  x == nullptr ? nullptr : x + example * size + first,
                  baseline == nullptr ? nullptr
                                      : baseline + example * layout.baseline_step + first,
                  out + slot * layout.places + first, layout.channels, layout.places,
                  std::min(kPlaces, layout.places - first)},
          reduction);
    }
  });
  double* const found = sums.mutable_data_ptr<double>();
  for (int64_t slot = 0; slot < layout.slots; ++slot) {
    found[slot] = 0.0;
    for (int64_t tile = 0; tile < tiles; ++tile) found[slot] += parts[slot * tiles + tile];
  }
}

void check_arguments(const at::Tensor& total, const std::optional<at::Tensor>& x,
                     const std::optional<at::Tensor>& baseline, Reduction reduction) {
  const char* op = "finish";
  row_size(total, op, "total");
  TORCH_CHECK(total.scalar_type() == at::kFloat || total.scalar_type() == at::kDouble, op,
              ": total must be float32 or float64: got ", total.scalar_type());
  TORCH_CHECK(reduction == Reduction::none || (total.dim() >= 2 && total.size(1) > 0), op,
              ": total must be [slots, channels, *] to reduce channels: got ", total.sizes());
  if (!x.has_value()) return;
  check_same_rows(*x, total, op, "x", "total");
  TORCH_CHECK(x->size(0) > 0 ? total.size(0) % x->size(0) == 0 : total.size(0) == 0, op,
              ": slots of total must be a multiple of the examples of x: got ", total.size(0),
              " and ", x->size(0));
  if (!baseline.has_value()) return;
  check_same_rows(*baseline, total, op, "baseline", "total");
  TORCH_CHECK(baseline->size(0) == 1 || baseline->size(0) == x->size(0), op,
              ": baseline must have one row or those of x: got ", baseline->size(0), " and ",
              x->size(0));
}

std::tuple<at::Tensor, at::Tensor> finish(const at::Tensor& total,
                                          const std::optional<at::Tensor>& x,
                                          const std::optional<at::Tensor>& baseline,
                                          std::string_view name) {
  const Reduction reduction = reduction_of(name);
  check_arguments(total, x, baseline, reduction);
  const at::ScalarType type = total.scalar_type();
  const at::Tensor totals = total.contiguous();
  at::Tensor ends, starts;
  if (x.has_value()) ends = x->to(type).contiguous();
  if (x.has_value() && baseline.has_value()) starts = baseline->to(type).contiguous();
  const int64_t size = row_size(total, "finish", "total");
  const int64_t slots = total.size(0);
  const int64_t channels = reduction == Reduction::none ? 1 : total.size(1);
  std::vector<int64_t> shape = total.sizes().vec();
  if (reduction != Reduction::none) shape.erase(shape.begin() + 1);
  at::Tensor values = empty_output(shape, total.options());
  at::Tensor sums = at::empty({slots}, total.options().dtype(at::kDouble));
  const int64_t examples = ends.defined() ? std::max<int64_t>(1, ends.size(0)) : 1;
  const bool shared = starts.defined() && starts.size(0) == 1;
  const Layout layout{slots, channels, size / channels, std::max<int64_t>(1, slots / examples),
                      shared ? 0 : size};
  AT_DISPATCH_FLOATING_TYPES(type, "finish", [&] {
    run<scalar_t>(totals, ends.defined() ? ends.const_data_ptr<scalar_t>() : nullptr,
                  starts.defined() ? starts.const_data_ptr<scalar_t>() : nullptr, layout,
                  reduction, values, sums);
  });
  return {values, sums};
}

}  // namespace
}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("finish", &saliency_fast::finish);
}
