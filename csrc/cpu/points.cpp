// line_points, noise_points, random_line_points: x and the baselines are read once per tile and
// stay in the cache over all rows; points are written once, contiguous.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cpu/launch.h"
#include "cpu/random_rows.h"
#include "cpu/simd.h"

namespace saliency_fast {
namespace {

// start + alpha (end - start), where end = x + scale * noise.
template <typename T, bool kLine, bool kNoise>
SALIENCY_FAST_INLINE void point_body(const T* start, T alpha, const T* x, T scale, const T* noise,
                                     int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    const T end = kNoise ? x[i] + scale * noise[i] : x[i];
    out[i] = kLine ? start[i] + alpha * (end - start[i]) : end;
  }
}

// `start` is null for a point that lies on no line, `noise` for one without noise.
template <typename T>
SALIENCY_FAST_INLINE void point(const T* start, T alpha, const T* x, T scale, const T* noise,
                                int64_t count, T* out) {
  if (start != nullptr && noise != nullptr) {
    point_body<T, true, true>(start, alpha, x, scale, noise, count, out);
  } else if (start != nullptr) {
    point_body<T, true, false>(start, alpha, x, scale, noise, count, out);
  } else if (noise != nullptr) {
    point_body<T, false, true>(start, alpha, x, scale, noise, count, out);
  } else {
    point_body<T, false, false>(start, alpha, x, scale, noise, count, out);
  }
}

SALIENCY_FAST_CLONES
void write_point(const float* start, float alpha, const float* x, float scale, const float* noise,
                 int64_t count, float* out) {
  point(start, alpha, x, scale, noise, count, out);
}

SALIENCY_FAST_CLONES
void write_point(const double* start, double alpha, const double* x, double scale,
                 const double* noise, int64_t count, double* out) {
  point(start, alpha, x, scale, noise, count, out);
}

template <typename T>
void line(const at::Tensor& x, const at::Tensor& baseline, const std::vector<int64_t>& item,
          const std::vector<double>& alpha, int64_t size, at::Tensor& out) {
  const T* const ends = x.const_data_ptr<T>();
  const T* const starts = baseline.const_data_ptr<T>();
  T* const points = out.mutable_data_ptr<T>();
  const int64_t baselines = baseline.size(0);
  const int64_t rows = static_cast<int64_t>(item.size());
  for_tiles(rows, size, [&](int64_t row, int64_t last_row, int64_t first, int64_t last) {
    for (; row < last_row; ++row) {
      write_point(starts + (item[row] % baselines) * size + first, static_cast<T>(alpha[row]),
                  ends + item[row] * size + first, T{0}, static_cast<const T*>(nullptr),
                  last - first, points + row * size + first);
    }
  });
}

at::Tensor line_points(const at::Tensor& x, const at::Tensor& baseline, const at::Tensor& item,
                       const at::Tensor& alpha) {
  const char* op = "line_points";
  const int64_t rows = item.numel();
  const int64_t size = row_size(x, op, "x");
  check_same_rows(baseline, x, op, "baseline", "x");
  TORCH_CHECK(baseline.size(0) > 0 || rows == 0, op, ": baseline must have a row: got ",
              baseline.sizes());
  const at::ScalarType type = computed_in(x, op, "x");
  const std::vector<int64_t> items = places(item, rows, x.size(0), op, "item");
  const std::vector<double> alphas = column<double>(alpha, rows, op, "alpha");
  const at::Tensor ends = x.to(type).contiguous();
  const at::Tensor starts = baseline.to(type).contiguous();
  at::Tensor out = empty_rows(rows, x, type);
  AT_DISPATCH_FLOATING_TYPES(
      type, "line_points", [&] { line<scalar_t>(ends, starts, items, alphas, size, out); });
  return out.to(x.scalar_type());
}

// Points of random rows; `baselines` is null for noise_points.
template <typename T>
void random_points(const at::Tensor& x, const T* starts, const std::vector<RandomRow>& table,
                   int64_t first_element, int64_t size, at::Tensor& out) {
  const T* const ends = x.const_data_ptr<T>();
  T* const points = out.mutable_data_ptr<T>();
  const int64_t rows = static_cast<int64_t>(table.size());
  for_tiles(rows, size, [&](int64_t row, int64_t last_row, int64_t first, int64_t last) {
    NormalTile<T> normals(first_element);
    for (; row < last_row; ++row) {
      const RandomRow& made = table[row];
      const T* noise = made.sigma == 0.0 ? nullptr : normals.draw(made, first, last - first);
      const T* start = starts == nullptr ? nullptr : starts + made.start * size + first;
      write_point(start, static_cast<T>(made.alpha), ends + made.item * size + first,
                  static_cast<T>(made.sigma), noise, last - first, points + row * size + first);
    }
  });
}

at::Tensor noise_points(const at::Tensor& x, const at::Tensor& sigma, const at::Tensor& seed,
                        const at::Tensor& item, const at::Tensor& sample, bool antithetic,
                        int64_t first_element) {
  const char* op = "noise_points";
  const int64_t size = row_size(x, op, "x");
  const at::ScalarType type = computed_in(x, op, "x");
  const std::vector<RandomRow> table =
      random_rows(x, sigma, seed, item, sample, antithetic, 0, op);
  const at::Tensor ends = x.to(type).contiguous();
  at::Tensor out = empty_rows(static_cast<int64_t>(table.size()), x, type);
  AT_DISPATCH_FLOATING_TYPES(type, "noise_points", [&] {
    random_points<scalar_t>(ends, nullptr, table, first_element, size, out);
  });
  return out.to(x.scalar_type());
}

at::Tensor random_line_points(const at::Tensor& x, const at::Tensor& baselines,
                              const at::Tensor& sigma, const at::Tensor& seed,
                              const at::Tensor& item, const at::Tensor& sample,
                              int64_t first_element) {
  const char* op = "random_line_points";
  const int64_t size = row_size(x, op, "x");
  check_same_rows(baselines, x, op, "baselines", "x");
  TORCH_CHECK(baselines.size(0) > 0, op, ": baselines must have a row: got ", baselines.sizes());
  const at::ScalarType type = computed_in(x, op, "x");
  const std::vector<RandomRow> table =
      random_rows(x, sigma, seed, item, sample, false, baselines.size(0), op);
  const at::Tensor ends = x.to(type).contiguous();
  const at::Tensor starts = baselines.to(type).contiguous();
  at::Tensor out = empty_rows(static_cast<int64_t>(table.size()), x, type);
  AT_DISPATCH_FLOATING_TYPES(type, "random_line_points", [&] {
    random_points<scalar_t>(ends, starts.const_data_ptr<scalar_t>(), table, first_element, size,
                            out);
  });
  return out.to(x.scalar_type());
}

}  // namespace
}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("line_points", &saliency_fast::line_points);
  m.impl("noise_points", &saliency_fast::noise_points);
  m.impl("random_line_points", &saliency_fast::random_line_points);
}
