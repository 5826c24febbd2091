// relu_mask, relu_mask_, relu_mask_backward, pack_mask: every tensor is read or written once, in
// memory order, in tiles that share no byte of the mask.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>

#include "cpu/halves.h"
#include "cpu/launch.h"
#include "cpu/mask_loops.h"

namespace saliency_fast {
namespace {

// Elements of a tile, whose flags are a buffer of so many bytes; a multiple of 8.
constexpr int64_t kFlags = 2048;
// Planes shorter than this are not worth a loop of their own.
constexpr int64_t kPlane = 32;

// A tile's numbers in the type of the arithmetic: those in memory, or a buffer for halves, because
// a loop over numbers of three widths spends its time on moving them between registers.
template <typename T>
struct Numbers {
  static constexpr bool half = sizeof(T) == 2;
  using Wide = std::conditional_t<half, float, T>;

  const Wide* read(const T* from, int64_t count) {
    if constexpr (half) {
      widen_all(from, count, buffer);
      return buffer;
    } else {
      return from;
    }
  }

  // Where results go that are meant for `to`; `write` brings them there.
  Wide* place(T* to) {
    if constexpr (half) return buffer;
    else return to;
  }

  void write(int64_t count, T* to) const {
    if constexpr (half) narrow_all(buffer, count, to);
  }

  alignas(64) Wide buffer[half ? kFlags : 1];
};

template <typename T>
using Wide = typename Numbers<T>::Wide;

int64_t mask_bytes(int64_t elements) { return ceil_div(elements, 8); }

// Calls f(first element, end element) over tiles that share no byte of the mask.
template <typename F>
void for_flags(int64_t elements, const F& f) {
  at::parallel_for(0, ceil_div(elements, kFlags), kMinimumWork / kFlags,
                   [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      f(tile * kFlags, std::min(elements, (tile + 1) * kFlags));
    }
  });
}

// Where the channels of elements lie: planes of `inner` elements, one channel after the other.
struct Planes {
  int64_t channels, inner, elements;

  bool tabulated() const { return inner < kPlane; }
  int64_t period() const { return channels * inner; }
};

Planes planes_of(const at::Tensor& x, at::MemoryFormat layout) {
  Planes planes{x.dim() < 2 ? 1 : x.size(1), 1, x.numel()};
  if (layout == at::MemoryFormat::Contiguous && x.dim() > 2) {
    for (const int64_t extent : x.sizes().slice(2)) planes.inner *= extent;
  }
  return planes;
}

// A parameter of channels, widened: a number per channel, or where planes are short a number per
// element of any tile that begins in the first period.
template <typename T>
std::vector<Wide<T>> spread(const std::optional<at::Tensor>& parameter, const Planes& planes) {
  if (!parameter.has_value()) return {};
  const at::Tensor dense = parameter->contiguous();
  const T* const data = static_cast<const T*>(dense.const_data_ptr());
  std::vector<Wide<T>> found;
  if (!planes.tabulated()) {
    for (int64_t i = 0; i < planes.channels; ++i) found.push_back(widen(data[i]));
    return found;
  }
  const int64_t period = planes.period();
  const int64_t size = std::min(planes.elements, period + kFlags);
  found.reserve(static_cast<size_t>(std::max(size, period)));
  for (int64_t i = 0; i < planes.channels; ++i) {
    found.insert(found.end(), static_cast<size_t>(planes.inner), widen(data[i]));
  }
  for (int64_t i = period; i < size; ++i) found.push_back(found[i - period]);
  return found;
}

// Calls f(begin, stop, place in the spread parameter, how) over the runs of a tile; begin and stop
// count from its first element.
template <typename F>
void for_runs(int64_t first, int64_t end, const Planes& planes, bool affine, const F& f) {
  if (!affine) return f(0, end - first, 0, Affine::none);
  if (planes.tabulated()) return f(0, end - first, first % planes.period(), Affine::each);
  for (int64_t begin = first, plane = first / planes.inner; begin < end; ++plane) {
    const int64_t stop = std::min(end, (plane + 1) * planes.inner);
    f(begin - first, stop - first, plane % planes.channels, Affine::one);
    begin = stop;
  }
}

template <typename T>
void rectify_all(const at::Tensor& x, const std::optional<at::Tensor>& scale,
                 const std::optional<at::Tensor>& shift, const at::Tensor& residual, double slope,
                 double upper, const Planes& planes, const at::Tensor& y, const at::Tensor& mask) {
  const T* const from = static_cast<const T*>(x.const_data_ptr());
  const T* const added =
      residual.defined() ? static_cast<const T*>(residual.const_data_ptr()) : nullptr;
  T* const to = static_cast<T*>(y.mutable_data_ptr());
  uint8_t* const bits = mask.mutable_data_ptr<uint8_t>();
  const auto scales = spread<T>(scale, planes), shifts = spread<T>(shift, planes);
  const Bend bend = slope != 0 ? Bend::slope : std::isinf(upper) ? Bend::plain : Bend::bound;
  const auto value = static_cast<Wide<T>>(slope != 0 ? slope : upper);
  for_flags(planes.elements, [&](int64_t first, int64_t end) {
    alignas(64) uint8_t flags[kFlags];
    Numbers<T> main, other;
    const int64_t count = end - first;
    const Wide<T>* const in = main.read(from + first, count);
    const Wide<T>* const plus = added == nullptr ? nullptr : other.read(added + first, count);
    Wide<T>* const out = main.place(to + first);
    for_runs(first, end, planes, scale.has_value(),
             [&](int64_t begin, int64_t stop, int64_t place, Affine how) {
      rectify(Forward<Wide<T>>{in + begin, plus == nullptr ? nullptr : plus + begin, out + begin,
                               flags + begin, stop - begin, bend, value},
              scales.data() + place, shifts.data() + place, how);
    });
    main.write(count, to + first);
    std::fill(flags + count, flags + 8 * mask_bytes(count), uint8_t{0});
    pack(flags, mask_bytes(count), bits + first / 8);
  });
}

enum class Rule { standard, guided, deconv };

Rule rule_of(std::string_view name) {
  if (name == "standard") return Rule::standard;
  if (name == "guided") return Rule::guided;
  if (name == "deconv") return Rule::deconv;
  TORCH_CHECK_VALUE(false, "rule must be one of standard, guided, deconv: got '", name, "'");
}

template <typename T>
void gradient_all(const at::Tensor& grad, const at::Tensor& mask,
                  const std::optional<at::Tensor>& scale, double slope, Rule rule,
                  const Planes& planes, const at::Tensor& scaled, const at::Tensor& plain) {
  const T* const from = static_cast<const T*>(grad.const_data_ptr());
  const uint8_t* const bits = mask.const_data_ptr<uint8_t>();
  T* const to = static_cast<T*>(scaled.mutable_data_ptr());
  T* const unscaled = plain.numel() == 0 ? nullptr : static_cast<T*>(plain.mutable_data_ptr());
  const auto scales = spread<T>(scale, planes);
  const bool standard = rule == Rule::standard;
  const Wide<T> leak = standard ? static_cast<Wide<T>>(slope) : 0;
  const Wide<T> floor = standard ? std::numeric_limits<Wide<T>>::quiet_NaN() : 0;
  for_flags(planes.elements, [&](int64_t first, int64_t end) {
    alignas(64) uint8_t flags[kFlags];
    const int64_t count = end - first;
    if (rule == Rule::deconv) {
      std::memset(flags, 1, sizeof flags);
    } else {
      unpack(bits + first / 8, mask_bytes(count), flags);
    }
    Numbers<T> main, other;
    const Wide<T>* const in = main.read(from + first, count);
    Wide<T>* const out = main.place(to + first);
    Wide<T>* const second = unscaled == nullptr ? nullptr : other.place(unscaled + first);
    for_runs(first, end, planes, scale.has_value(),
             [&](int64_t begin, int64_t stop, int64_t place, Affine how) {
      gradient(Backward<Wide<T>>{in + begin, flags + begin, out + begin,
                                 second == nullptr ? nullptr : second + begin, stop - begin, leak,
                                 floor},
               scales.data() + place, how);
    });
    main.write(count, to + first);
    if (second != nullptr) other.write(count, unscaled + first);
  });
}

// The layout of a tensor of so many dimensions with its channels last, if there is one.
std::optional<at::MemoryFormat> channels_last_of(int64_t dimensions) {
  if (dimensions == 4) return at::MemoryFormat::ChannelsLast;
  if (dimensions == 5) return at::MemoryFormat::ChannelsLast3d;
  return std::nullopt;
}

// The layout in which x is dense, if it is.
std::optional<at::MemoryFormat> layout_of(const at::Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  const auto last = channels_last_of(x.dim());
  return last.has_value() && x.is_contiguous(*last) ? last : std::nullopt;
}

void check_rectifier(const char* op, double slope, double upper) {
  TORCH_CHECK_VALUE(std::isfinite(slope) && upper > 0, op,
                    ": slope must be finite and upper greater than 0: got slope ", slope,
                    ", upper ", upper);
  TORCH_CHECK_VALUE(slope == 0 || std::isinf(upper), op,
                    ": slope must be 0 where upper is finite: got slope ", slope, ", upper ", upper,
                    "; one bit cannot tell the two sides apart");
}

void check_part(const char* op, const char* name, const at::Tensor& part, at::IntArrayRef shape,
                const at::Tensor& x) {
  TORCH_CHECK(part.sizes() == shape && part.scalar_type() == x.scalar_type(), op, ": ", name,
              " must be ", shape, " ", x.scalar_type(), ": got ", part.sizes(), " ",
              part.scalar_type());
}

void check_scale(const char* op, const at::Tensor& x, const char* name,
                 const std::optional<at::Tensor>& scale) {
  computed_in(x, op, name);
  const int64_t least = scale.has_value() ? 2 : 1;
  TORCH_CHECK(x.dim() >= least, op, ": ", name, " must have ", least,
              " dimensions or more: got ", x.sizes());
  if (scale.has_value()) check_part(op, "scale", *scale, x.sizes().slice(1, 1), x);
}

// Calls f with a number of the tensor's type, halves as their bits.
template <typename F>
void with_type(const at::Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case at::kDouble: return f(double{});
    case at::kHalf: return f(Half{});
    case at::kBFloat16: return f(Brain{});
    default: return f(float{});
  }
}

// Writes y, which has the layout of x and may be x, and returns the mask.
at::Tensor rectified(const char* op, const at::Tensor& x, const std::optional<at::Tensor>& scale,
                     const std::optional<at::Tensor>& shift,
                     const std::optional<at::Tensor>& residual, double slope, double upper,
                     at::MemoryFormat layout, const at::Tensor& y) {
  check_rectifier(op, slope, upper);
  check_scale(op, x, "x", scale);
  TORCH_CHECK(scale.has_value() == shift.has_value(), op,
              ": scale and shift come together: got one of them; pass both or neither");
  if (shift.has_value()) check_part(op, "shift", *shift, scale->sizes(), x);
  at::Tensor added;
  if (residual.has_value()) {
    check_part(op, "residual", *residual, x.sizes(), x);
    added = residual->contiguous(layout);
  }
  const at::Tensor mask = at::empty({mask_bytes(x.numel())}, x.options().dtype(at::kByte));
  with_type(x, [&](auto number) {
    rectify_all<decltype(number)>(x, scale, shift, added, slope, upper, planes_of(x, layout), y,
                                  mask);
  });
  return mask;
}

std::tuple<at::Tensor, at::Tensor> relu_mask(const at::Tensor& x,
                                             const std::optional<at::Tensor>& scale,
                                             const std::optional<at::Tensor>& shift,
                                             const std::optional<at::Tensor>& residual,
                                             double slope, double upper) {
  const auto layout = layout_of(x);
  const at::Tensor dense = layout ? x : x.contiguous();
  at::Tensor y = at::empty_like(dense);
  at::Tensor mask = rectified("relu_mask", dense, scale, shift, residual, slope, upper,
                              layout.value_or(at::MemoryFormat::Contiguous), y);
  return {y, mask};
}

at::Tensor relu_mask_(at::Tensor& x, const std::optional<at::Tensor>& scale,
                      const std::optional<at::Tensor>& shift,
                      const std::optional<at::Tensor>& residual, double slope, double upper) {
  const auto layout = layout_of(x);
  TORCH_CHECK_VALUE(layout.has_value(),
                    "relu_mask_: x is changed in place and must be contiguous or channels_last:"
                    " got strides ", x.strides(), " for shape ", x.sizes(), "; call relu_mask");
  return rectified("relu_mask_", x, scale, shift, residual, slope, upper, *layout, x);
}

std::tuple<at::Tensor, at::Tensor> relu_mask_backward(const at::Tensor& grad,
                                                      const at::Tensor& mask,
                                                      const std::optional<at::Tensor>& scale,
                                                      double slope, std::string_view name,
                                                      bool both, bool channels_last) {
  const char* op = "relu_mask_backward";
  const Rule rule = rule_of(name);
  check_rectifier(op, slope, std::numeric_limits<double>::infinity());
  check_scale(op, grad, "grad", scale);
  const int64_t bytes = mask_bytes(grad.numel());
  TORCH_CHECK(mask.scalar_type() == at::kByte && mask.dim() == 1 && mask.numel() == bytes, op,
              ": mask must be uint8 [", bytes, "]: got ", mask.scalar_type(), " ", mask.sizes());
  const auto named =
      channels_last ? channels_last_of(grad.dim()) : std::optional(at::MemoryFormat::Contiguous);
  TORCH_CHECK_VALUE(named.has_value(), op,
                    ": channels_last needs 4 or 5 dimensions: got ", grad.sizes());
  const at::MemoryFormat layout = *named;
  const at::Tensor dense = grad.contiguous(layout);
  at::Tensor scaled = at::empty(grad.sizes(), grad.options(), layout);
  at::Tensor plain = both && scale.has_value() ? at::empty(grad.sizes(), grad.options(), layout)
                                               : at::empty({0}, grad.options());
  with_type(grad, [&](auto number) {
    gradient_all<decltype(number)>(dense, mask.contiguous(), scale, slope, rule,
                                   planes_of(grad, layout), scaled, plain);
  });
  return {scaled, plain};
}

at::Tensor pack_mask(const at::Tensor& given) {
  const at::ScalarType type = given.scalar_type();
  TORCH_CHECK(type == at::kBool || at::isFloatingType(type),
              "pack_mask: flags must be bool or floating point: got ", type);
  // Numbers are packed on GPUs; here they take a pass of their own.
  const at::Tensor flags = type == at::kBool ? given : given.ne(0);
  const at::Tensor dense = layout_of(flags) ? flags : flags.contiguous();
  const int64_t elements = dense.numel();
  at::Tensor mask = at::empty({mask_bytes(elements)}, flags.options().dtype(at::kByte));
  const uint8_t* const from = static_cast<const uint8_t*>(dense.const_data_ptr());
  uint8_t* const bits = mask.mutable_data_ptr<uint8_t>();
  for_flags(elements, [&](int64_t first, int64_t end) {
    const int64_t whole = (end - first) / 8;
    pack(from + first, whole, bits + first / 8);
    if (first + 8 * whole < end) {
      uint8_t last[8] = {};
      std::memcpy(last, from + first + 8 * whole, static_cast<size_t>(end - first - 8 * whole));
      pack(last, 1, bits + first / 8 + whole);
    }
  });
  return mask;
}

}  // namespace
}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("relu_mask", &saliency_fast::relu_mask);
  m.impl("relu_mask_", &saliency_fast::relu_mask_);
  m.impl("relu_mask_backward", &saliency_fast::relu_mask_backward);
  m.impl("pack_mask", &saliency_fast::pack_mask);
}
