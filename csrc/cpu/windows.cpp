// window_points: a tile of x stays in the cache over all rows; each row is a copy of it and then,
// run by run, of the fill inside of the row's box. Elements are bytes, of any type.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <cstring>

#include "cpu/launch.h"

namespace saliency_fast {
namespace {

constexpr int64_t kMostAxes = 5;
using Places = std::array<int64_t, kMostAxes>;

// The box of a row; trailing axes that it covers are one with the axis before them.
struct Box {
  int64_t axes;
  Places size, start, stop;
  bool empty;
};

Box box_of(at::IntArrayRef sizes, const int64_t* start, const int64_t* stop) {
  Box box{static_cast<int64_t>(sizes.size()), {}, {}, {}, false};
  for (int64_t axis = 0; axis < box.axes; ++axis) {
    box.size[axis] = sizes[axis];
    box.start[axis] = std::clamp<int64_t>(start[axis], 0, sizes[axis]);
    box.stop[axis] = std::clamp<int64_t>(stop[axis], 0, sizes[axis]);
    box.empty |= box.start[axis] >= box.stop[axis];
  }
  for (int64_t last = box.axes - 1; last > 0; --last, --box.axes) {
    if (box.start[last] != 0 || box.stop[last] != box.size[last]) break;
    box.start[last - 1] *= box.size[last];
    box.stop[last - 1] *= box.size[last];
    box.size[last - 1] *= box.size[last];
  }
  return box;
}

// Moves a line's places along the outer axes on to the first in the box; false where none is left.
bool enter(const Box& box, int64_t outer, Places& at) {
  for (int64_t axis = 0; axis < outer; ++axis) {
    if (at[axis] >= box.start[axis] && at[axis] < box.stop[axis]) continue;
    int64_t from = axis;
    if (at[axis] >= box.stop[axis]) {
      while (from > 0 && at[from - 1] + 1 == box.stop[from - 1]) --from;
      if (from == 0) return false;
      ++at[from - 1];
    }
    for (int64_t inner = from; inner < outer; ++inner) at[inner] = box.start[inner];
    return true;
  }
  return true;
}

// Calls f(begin, end) for the runs of the box among the elements [first, last) of a row.
template <typename F>
void for_runs(const Box& box, int64_t first, int64_t last, const F& f) {
  const int64_t outer = box.axes - 1, line = box.size[outer];
  Places at{};
  int64_t left = first / line;
  for (int64_t axis = outer - 1; axis >= 0; --axis) {
    at[axis] = left % box.size[axis];
    left /= box.size[axis];
  }
  bool found = !box.empty && enter(box, outer, at);
  while (found) {
    int64_t offset = 0;
    for (int64_t axis = 0; axis < outer; ++axis) offset = offset * box.size[axis] + at[axis];
    const int64_t begin = std::max(first, offset * line + box.start[outer]);
    const int64_t end = std::min(last, offset * line + box.stop[outer]);
    if (offset * line >= last) return;
    if (begin < end) f(begin, end);
    int64_t axis = outer - 1;
    while (axis >= 0 && ++at[axis] == box.stop[axis]) {
      at[axis] = box.start[axis];
      --axis;
    }
    found = axis >= 0;
  }
}

at::Tensor corners(const at::Tensor& tensor, int64_t rows, int64_t axes, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong, "window_points: ", name,
              " must be int64: got ", tensor.scalar_type());
  TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == axes,
              "window_points: ", name, " must be [", rows, ", ", axes, "]: got ", tensor.sizes());
  return tensor.contiguous();
}

at::Tensor window_points(const at::Tensor& x, const at::Tensor& fill, const at::Tensor& item,
                         const at::Tensor& start, const at::Tensor& stop) {
  const char* op = "window_points";
  const int64_t size = row_size(x, op, "x"), axes = x.dim() - 1, rows = item.numel();
  TORCH_CHECK(axes >= 1 && axes <= kMostAxes, op, ": x must have 1 to ", kMostAxes,
              " axes behind the batch: got ", x.sizes());
  check_fill(fill, x, op);
  const std::vector<int64_t> items = places(item, rows, x.size(0), op, "item");
  const at::Tensor starts = corners(start, rows, axes, "start");
  const at::Tensor stops = corners(stop, rows, axes, "stop");
  std::vector<Box> boxes(rows);
  for (int64_t row = 0; row < rows; ++row) {
    boxes[row] = box_of(x.sizes().slice(1), starts.const_data_ptr<int64_t>() + row * axes,
                        stops.const_data_ptr<int64_t>() + row * axes);
  }
  const at::Tensor ends = x.contiguous(), fills = fill.contiguous();
  at::Tensor out = empty_rows(rows, x, x.scalar_type());
  const int64_t width = static_cast<int64_t>(x.element_size()), filled = fill.size(0);
  const char* const from = static_cast<const char*>(ends.const_data_ptr());
  const char* const other = static_cast<const char*>(fills.const_data_ptr());
  char* const to = static_cast<char*>(out.mutable_data_ptr());
  for_tiles(rows, size, [&](int64_t row, int64_t last_row, int64_t first, int64_t last) {
    for (; row < last_row; ++row) {
      char* const point = to + row * size * width;
      const char* const example = from + items[row] * size * width;
      const char* const inside = other + items[row] % filled * size * width;
      std::memcpy(point + first * width, example + first * width, (last - first) * width);
      for_runs(boxes[row], first, last, [&](int64_t begin, int64_t end) {
        std::memcpy(point + begin * width, inside + begin * width, (end - begin) * width);
      });
    }
  });
  return out;
}

}  // namespace
}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("window_points", &saliency_fast::window_points);
}
