// What every op does before and around its loops: checks, contiguous arguments, and tiles of
// elements shared out between threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace saliency_fast {

// Elements of a tile. One tile of x, baseline and a point lie in the first-level cache.
constexpr int64_t kTile = 4096;
// Threads are started for no less than this many elements.
constexpr int64_t kMinimumWork = 32768;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Elements of one row of a [rows, *] tensor, also where it has no rows.
inline int64_t row_size(const at::Tensor& tensor, const char* op, const char* name) {
  TORCH_CHECK(tensor.dim() >= 1, op, ": ", name, " must be [rows, *]: got a scalar");
  int64_t size = 1;
  for (const int64_t extent : tensor.sizes().slice(1)) size *= extent;
  return size;
}

inline bool is_half(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf || tensor.scalar_type() == at::kBFloat16;
}

// The type an op computes in for tensors of this one: float32 for half types.
inline at::ScalarType computed_in(const at::Tensor& tensor, const char* op, const char* name) {
  const at::ScalarType type = tensor.scalar_type();
  if (is_half(tensor)) return at::kFloat;
  TORCH_CHECK(type == at::kFloat || type == at::kDouble, op, ": ", name,
              " must be float32, float64 or a half type: got ", type);
  return type;
}

inline void check_same_rows(const at::Tensor& tensor, const at::Tensor& like, const char* op,
                            const char* name, const char* like_name) {
  TORCH_CHECK(tensor.dim() == like.dim() && tensor.sizes().slice(1) == like.sizes().slice(1), op,
              ": rows of ", name, " must have the shape of rows of ", like_name, ": got ",
              tensor.sizes(), ", ", like_name, " is ", like.sizes());
}

// A tensor that has one row for all examples, or one for each.
inline void check_one_or_all(const at::Tensor& tensor, const at::Tensor& x, const char* op,
                             const char* name) {
  TORCH_CHECK(tensor.size(0) == 1 || tensor.size(0) == x.size(0), op, ": ", name,
              " must have one row or those of x: got ", tensor.sizes(), ", x is ", x.sizes());
}

// What replaces parts of points: rows like those of x, one or as many, of the same type.
inline void check_fill(const at::Tensor& fill, const at::Tensor& x, const char* op) {
  check_same_rows(fill, x, op, "fill", "x");
  TORCH_CHECK(fill.scalar_type() == x.scalar_type(), op, ": fill must have the type of x, ",
              x.scalar_type(), ": got ", fill.scalar_type());
  check_one_or_all(fill, x, op, "fill");
}

inline void check_total(const at::Tensor& total, const char* op, const char* name) {
  TORCH_CHECK(total.is_contiguous(), op, ": ", name,
              " is changed in place and must be contiguous: got strides ", total.strides(),
              " for shape ", total.sizes());
  TORCH_CHECK(total.scalar_type() == at::kFloat || total.scalar_type() == at::kDouble, op, ": ",
              name, " must be float32 or float64: got ", total.scalar_type());
}

// A column of a launch table as plain numbers.
template <typename T>
std::vector<T> column(const at::Tensor& tensor, int64_t rows, const char* op, const char* name) {
  TORCH_CHECK(tensor.dim() == 1 && tensor.size(0) == rows, op, ": ", name, " must be [", rows,
              "]: got ", tensor.sizes());
  const auto type = c10::CppTypeToScalarType<T>::value;
  const at::Tensor numbers = tensor.to(type).contiguous();
  const T* data = numbers.const_data_ptr<T>();
  return std::vector<T>(data, data + rows);
}

// A column of indices into `bound` things.
inline std::vector<int64_t> places(const at::Tensor& tensor, int64_t rows, int64_t bound,
                                   const char* op, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong, op, ": ", name, " must be int64: got ",
              tensor.scalar_type());
  std::vector<int64_t> found = column<int64_t>(tensor, rows, op, name);
  for (int64_t row = 0; row < rows; ++row) {
    TORCH_CHECK_INDEX(found[row] >= 0 && found[row] < bound, op, ": ", name, " must lie in [0, ",
                      bound, "): got ", found[row], " in row ", row);
  }
  return found;
}

inline at::Tensor empty_output(at::IntArrayRef shape, const at::TensorOptions& options) {
  return at::empty(shape, options, at::MemoryFormat::Contiguous);
}

// An output of `rows` rows, each like a row of `like`.
inline at::Tensor empty_rows(int64_t rows, const at::Tensor& like, at::ScalarType type) {
  std::vector<int64_t> shape = like.sizes().vec();
  shape[0] = rows;
  return empty_output(shape, like.options().dtype(type));
}

// Calls f(first row, end row, first element, end element) over tiles of a [rows, elements] output
// whose elements do not depend on each other.
template <typename F>
void for_tiles(int64_t rows, int64_t elements, const F& f) {
  if (rows == 0 || elements == 0) return;
  const int64_t wanted = 4 * at::get_num_threads();
  const int64_t tiles = ceil_div(elements, kTile);
  const int64_t parts = tiles >= wanted ? 1 : std::min(rows, ceil_div(wanted, tiles));
  const int64_t part = ceil_div(rows, parts);
  const int64_t work = std::max<int64_t>(1, part * std::min(elements, kTile));
  at::parallel_for(0, tiles * parts, ceil_div(kMinimumWork, work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = (task % parts) * part;
      const int64_t element = (task / parts) * kTile;
      if (row < rows) {
        f(row, std::min(rows, row + part), element, std::min(elements, element + kTile));
      }
    }
  });
}

// Calls f(first element, end element) over tiles of elements; f walks all rows itself, in order.
template <typename F>
void for_columns(int64_t rows, int64_t elements, const F& f) {
  if (rows == 0 || elements == 0) return;
  const int64_t fair = ceil_div(elements, 4 * at::get_num_threads());
  const int64_t tile = std::clamp<int64_t>(ceil_div(fair, 64) * 64, 64, kTile);
  const int64_t tiles = ceil_div(elements, tile);
  at::parallel_for(0, tiles, ceil_div(kMinimumWork, rows * tile), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      f(index * tile, std::min(elements, (index + 1) * tile));
    }
  });
}

}  // namespace saliency_fast
