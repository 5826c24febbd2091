// accumulate, accumulate_moments, accumulate_random_lines: gradients are read once, in tiles whose
// accumulators stay in the cache over all rows. A tile folds its rows in their order, so a sum
// depends neither on the threads nor on how rows were split into calls.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstring>
#include <string_view>
#include <type_traits>

#include "cpu/halves.h"
#include "cpu/launch.h"
#include "cpu/random_rows.h"
#include "cpu/simd.h"

namespace saliency_fast {
namespace {

enum class Kind { sum, square, absolute };

Kind kind_of(std::string_view name) {
  if (name == "sum") return Kind::sum;
  if (name == "square") return Kind::square;
  if (name == "absolute") return Kind::absolute;
  TORCH_CHECK_VALUE(false, "kind must be one of sum, square, absolute: got '", name, "'");
}

template <Kind kKind, typename T, typename G>
SALIENCY_FAST_INLINE void fold_as(T* total, const G* grads, T weight, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T g = widen(grads[i]);
    const T term = kKind == Kind::sum ? g : kKind == Kind::square ? g * g : std::abs(g);
    total[i] += weight * term;
  }
}

template <typename T, typename G>
SALIENCY_FAST_INLINE void fold_body(T* total, const G* grads, T weight, Kind kind, int64_t count) {
  if (kind == Kind::sum) {
    fold_as<Kind::sum>(total, grads, weight, count);
  } else if (kind == Kind::square) {
    fold_as<Kind::square>(total, grads, weight, count);
  } else {
    fold_as<Kind::absolute>(total, grads, weight, count);
  }
}

template <typename T, typename G>
SALIENCY_FAST_INLINE void moments_body(T* mean, T* spread, const G* grads, T number,
                                       int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const T g = widen(grads[i]);
    const T before = g - mean[i];
    const T after = mean[i] + before / number;
    mean[i] = after;
    spread[i] += before * (g - after);
  }
}

// total += weight * g * (end - start), end = x + sigma * noise; noise is null for none.
template <typename T, typename G>
SALIENCY_FAST_INLINE void line_body(T* total, const G* grads, T weight, const T* start, const T* x,
                                    T sigma, const T* noise, int64_t count) {
  if (noise == nullptr) {
    for (int64_t i = 0; i < count; ++i) total[i] += weight * (widen(grads[i]) * (x[i] - start[i]));
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    total[i] += weight * (widen(grads[i]) * (x[i] + sigma * noise[i] - start[i]));
  }
}

// Clones are made of functions, not of templates: one set per pair of types.
#define SALIENCY_FAST_LEAVES(T, G)                                                              \
  SALIENCY_FAST_CLONES                                                                          \
  void fold(T* total, const G* grads, T weight, Kind kind, int64_t count) {                     \
    fold_body(total, grads, weight, kind, count);                                               \
  }                                                                                             \
  SALIENCY_FAST_CLONES                                                                          \
  void fold_moments(T* mean, T* spread, const G* grads, T number, int64_t count) {              \
    moments_body(mean, spread, grads, number, count);                                           \
  }                                                                                             \
  SALIENCY_FAST_CLONES                                                                          \
  void fold_line(T* total, const G* grads, T weight, const T* start, const T* x, T sigma,       \
                 const T* noise, int64_t count) {                                               \
    line_body(total, grads, weight, start, x, sigma, noise, count);                             \
  }
SALIENCY_FAST_LEAVES(float, float)
SALIENCY_FAST_LEAVES(float, Half)
SALIENCY_FAST_LEAVES(float, Brain)
SALIENCY_FAST_LEAVES(double, double)
#undef SALIENCY_FAST_LEAVES

// Calls f(total's number type, gradients) with the gradients as a pointer of their own type where
// a leaf reads it, else converted to the total's type.
template <typename F>
void with_types(const at::Tensor& total, const at::Tensor& grads, const F& f) {
  const at::Tensor dense = grads.contiguous();
  if (total.scalar_type() == at::kDouble) {
    const at::Tensor same = dense.to(at::kDouble);
    f(double{}, same.const_data_ptr<double>());
  } else if (dense.scalar_type() == at::kHalf) {
    f(float{}, reinterpret_cast<const Half*>(dense.const_data_ptr()));
  } else if (dense.scalar_type() == at::kBFloat16) {
    f(float{}, reinterpret_cast<const Brain*>(dense.const_data_ptr()));
  } else {
    const at::Tensor same = dense.to(at::kFloat);
    f(float{}, same.const_data_ptr<float>());
  }
}

void check_fold(const at::Tensor& total, const at::Tensor& grads, const char* op,
                const char* name) {
  check_total(total, op, name);
  row_size(grads, op, "grads");
  check_same_rows(grads, total, op, "grads", name);
}

void accumulate(at::Tensor& total, const at::Tensor& grads, const at::Tensor& slot,
                const at::Tensor& weight, std::string_view kind) {
  const char* op = "accumulate";
  check_fold(total, grads, op, "total");
  const Kind term = kind_of(kind);
  const int64_t rows = grads.size(0);
  const int64_t size = row_size(grads, op, "grads");
  const std::vector<int64_t> slots = places(slot, rows, total.size(0), op, "slot");
  const std::vector<double> weights = column<double>(weight, rows, op, "weight");
  with_types(total, grads, [&](auto zero, const auto* gradients) {
    using T = decltype(zero);
    T* const totals = total.mutable_data_ptr<T>();
    for_columns(rows, size, [&](int64_t first, int64_t last) {
      for (int64_t row = 0; row < rows; ++row) {
        fold(totals + slots[row] * size + first, gradients + row * size + first,
             static_cast<T>(weights[row]), term, last - first);
      }
    });
  });
}

void accumulate_moments(at::Tensor& mean, at::Tensor& spread, at::Tensor& count,
                        const at::Tensor& grads, const at::Tensor& slot) {
  const char* op = "accumulate_moments";
  check_fold(mean, grads, op, "mean");
  check_total(spread, op, "spread");
  TORCH_CHECK(spread.sizes() == mean.sizes() && spread.scalar_type() == mean.scalar_type(), op,
              ": spread must be like mean: got ", spread.scalar_type(), " ", spread.sizes(),
              ", mean is ", mean.scalar_type(), " ", mean.sizes());
  TORCH_CHECK(count.scalar_type() == at::kDouble && count.is_contiguous() && count.dim() == 1 &&
                  count.size(0) == mean.size(0),
              op, ": count must be float64 [", mean.size(0), "], contiguous: got ",
              count.scalar_type(), " ", count.sizes());
  const int64_t rows = grads.size(0);
  const int64_t size = row_size(grads, op, "grads");
  const std::vector<int64_t> slots = places(slot, rows, mean.size(0), op, "slot");
  double* const counts = count.mutable_data_ptr<double>();
  std::vector<double> numbers(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) numbers[row] = counts[slots[row]] += 1.0;
  with_types(mean, grads, [&](auto zero, const auto* gradients) {
    using T = decltype(zero);
    T* const means = mean.mutable_data_ptr<T>();
    T* const spreads = spread.mutable_data_ptr<T>();
    for_columns(rows, size, [&](int64_t first, int64_t last) {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t place = slots[row] * size + first;
        fold_moments(means + place, spreads + place, gradients + row * size + first,
                     static_cast<T>(numbers[row]), last - first);
      }
    });
  });
}

void accumulate_random_lines(at::Tensor& total, const at::Tensor& grads, const at::Tensor& slot,
                             const at::Tensor& weight, const at::Tensor& x,
                             const at::Tensor& baselines, const at::Tensor& sigma,
                             const at::Tensor& seed, const at::Tensor& item,
                             const at::Tensor& sample, int64_t first_element) {
  const char* op = "accumulate_random_lines";
  check_fold(total, grads, op, "total");
  check_same_rows(x, total, op, "x", "total");
  check_same_rows(baselines, total, op, "baselines", "total");
  TORCH_CHECK(baselines.size(0) > 0, op, ": baselines must have a row: got ", baselines.sizes());
  const int64_t rows = grads.size(0);
  const int64_t size = row_size(grads, op, "grads");
  TORCH_CHECK(item.numel() == rows, op, ": item must be [", rows, "]: got ", item.sizes());
  const std::vector<int64_t> slots = places(slot, rows, total.size(0), op, "slot");
  const std::vector<double> weights = column<double>(weight, rows, op, "weight");
  const std::vector<RandomRow> table =
      random_rows(x, sigma, seed, item, sample, false, baselines.size(0), op);
  const at::Tensor all_ends = x.to(total.scalar_type()).contiguous();
  const at::Tensor all_starts = baselines.to(total.scalar_type()).contiguous();
  with_types(total, grads, [&](auto zero, const auto* gradients) {
    using T = decltype(zero);
    T* const totals = total.mutable_data_ptr<T>();
    const T* const ends = all_ends.const_data_ptr<T>();
    const T* const starts = all_starts.const_data_ptr<T>();
    for_columns(rows, size, [&](int64_t first, int64_t last) {
      NormalTile<T> normals(first_element);
      for (int64_t row = 0; row < rows; ++row) {
        const RandomRow& made = table[row];
        const T* noise = made.sigma == 0.0 ? nullptr : normals.draw(made, first, last - first);
        fold_line(totals + slots[row] * size + first, gradients + row * size + first,
                  static_cast<T>(weights[row]), starts + made.start * size + first,
                  ends + made.item * size + first, static_cast<T>(made.sigma), noise,
                  last - first);
      }
    });
  });
}

}  // namespace
}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("accumulate", &saliency_fast::accumulate);
  m.impl("accumulate_moments", &saliency_fast::accumulate_moments);
  m.impl("accumulate_random_lines", &saliency_fast::accumulate_random_lines);
}
