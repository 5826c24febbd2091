// The windows of a pool: where each lies, which elements and windows meet, how memory is laid out.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <vector>

#include "cpu/launch.h"

namespace saliency_fast {

// The most places of a window that a byte can number.
constexpr int64_t kPlaces = 256;

struct Range {
  int64_t first, last;

  bool empty() const { return first >= last; }
};

struct Axis {
  int64_t in = 1, out = 1, kernel = 1, stride = 1, padding = 0, dilation = 1;

  int64_t start(int64_t window) const { return window * stride - padding; }
  int64_t reach() const { return dilation * (kernel - 1) + 1; }
  // The places of a window that lie in the input; none where dilation steps over all of it.
  Range places(int64_t window) const {
    const int64_t from = start(window);
    if (from >= 0 && from + reach() <= in) return {0, kernel};
    return {from < 0 ? ceil_div(-from, dilation) : 0,
            from < in ? std::min(kernel, ceil_div(in - from, dilation)) : 0};
  }
  // The windows between whose ends one of the elements [first, last] lies.
  Range windows(int64_t first, int64_t last) const {
    return {std::max<int64_t>(0, ceil_div(first + padding - reach() + 1, stride)),
            std::min(out, (last + padding) / stride + 1)};
  }
  // How many windows PyTorch would make; 0 where none fits.
  int64_t fitting(bool ceil_mode) const {
    const int64_t spare = in + 2 * padding - reach() + (ceil_mode ? stride - 1 : 0);
    if (in < 1 || spare < 0) return 0;
    const int64_t count = spare / stride + 1;
    // A window must begin in the input or in the padding before it.
    return ceil_mode && (count - 1) * stride >= in + padding ? count - 1 : count;
  }
};

// Memory is [outer, d, h, w, inner]: channels are outer where it is contiguous, inner where last.
struct Pool {
  int64_t outer = 1, inner = 1;
  Axis d, h, w;

  int64_t number(int64_t kd, int64_t kh) const { return (kd * h.kernel + kh) * w.kernel; }
  int64_t rows_in() const { return d.in * h.in; }
  int64_t rows_out() const { return d.out * h.out; }
  // Whether no two windows share an element.
  bool apart() const {
    return d.stride >= d.reach() && h.stride >= h.reach() && w.stride >= w.reach();
  }
};

// The pool's axes for an input of these spatial sizes, the last at the end; the number of windows
// is left to the caller.
inline std::array<Axis, 3> checked_axes(const char* op, at::IntArrayRef size,
                                        at::IntArrayRef kernel, at::IntArrayRef stride,
                                        at::IntArrayRef padding, at::IntArrayRef dilation) {
  const size_t count = size.size();
  TORCH_CHECK_VALUE(count >= 1 && count <= 3 && kernel.size() == count && stride.size() == count &&
                        padding.size() == count && dilation.size() == count,
                    op, ": a pool has 1 to 3 axes and a number for each: got ", count,
                    " and kernel ", kernel, ", stride ", stride, ", padding ", padding,
                    ", dilation ", dilation);
  std::array<Axis, 3> axes;
  int64_t places = 1;
  for (size_t i = 0; i < count; ++i) {
    Axis& axis = axes[3 - count + i];
    axis = {size[i], 1, kernel[i], stride[i], padding[i], dilation[i]};
    TORCH_CHECK_VALUE(axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0 && axis.padding >= 0,
                      op, ": kernel, stride and dilation must be positive, padding not negative:",
                      " got kernel ", kernel, ", stride ", stride, ", padding ", padding,
                      ", dilation ", dilation);
    TORCH_CHECK_VALUE(2 * axis.padding <= axis.reach(), op,
                      ": padding must be at most half a window: got ", padding,
                      " for a kernel of ", kernel, ", dilation ", dilation);
    places = std::min(axis.kernel, kPlaces + 1) * places;
    TORCH_CHECK_VALUE(places <= kPlaces, op, ": a window may have ", kPlaces,
                      " elements, the places of a byte: got ", kernel);
  }
  return axes;
}

inline void check_batch(const at::Tensor& tensor, const char* op, const char* name) {
  TORCH_CHECK_VALUE(tensor.dim() >= 3 && tensor.dim() <= 5, op, ": ", name,
                    " must be [N, C, *] with 1 to 3 axes: got ", tensor.sizes());
  computed_in(tensor, op, name);
}

// The shape of the pooled x; fills in each axis's number of windows.
inline std::vector<int64_t> pooled_shape(const char* op, const at::Tensor& x,
                                         at::IntArrayRef kernel, bool ceil_mode,
                                         std::array<Axis, 3>& axes) {
  const at::IntArrayRef size = x.sizes().slice(2);
  std::vector<int64_t> shape = x.sizes().vec();
  for (size_t i = 0; i < size.size(); ++i) {
    Axis& axis = axes[3 - size.size() + i];
    axis.out = shape[2 + i] = axis.fitting(ceil_mode);
    TORCH_CHECK_VALUE(axis.out > 0, op, ": no window of ", kernel, " fits into an input of ", size);
  }
  return shape;
}

// How a pool of the tensor lies in memory: channels last where the tensor does. The last stride
// tells where an axis of one leaves both.
inline at::MemoryFormat layout(const at::Tensor& x) {
  if (x.dim() == 3) return at::MemoryFormat::Contiguous;
  const auto last =
      x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
  const bool is_last = x.size(1) > 1 && x.stride(-1) == x.size(1) && x.is_contiguous(last);
  return is_last ? last : at::MemoryFormat::Contiguous;
}

inline Pool pool_of(const at::Tensor& like, at::MemoryFormat form,
                    const std::array<Axis, 3>& axes) {
  const bool contiguous = form == at::MemoryFormat::Contiguous;
  const int64_t batch = like.size(0), channels = like.size(1);
  return {contiguous ? batch * channels : batch, contiguous ? 1 : channels, axes[0], axes[1],
          axes[2]};
}

}  // namespace saliency_fast
