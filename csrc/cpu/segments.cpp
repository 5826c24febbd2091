// segment_points, mask_points: x and fill stay in the cache over all rows, with segments and masks,
// and points are written once, contiguous.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cpu/choose.h"

namespace saliency_fast {
namespace {

// Whether no segment lies outside of [0, features).
SALIENCY_FAST_CLONES
bool all_below(const int64_t* segment, int64_t count, uint64_t features) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= static_cast<uint64_t>(segment[i]) >= features;
  return outside == 0;
}

// All bits of a word where its position's segment is present.
template <typename Word>
SALIENCY_FAST_INLINE void look_up(const bool* present, const int64_t* segment, int64_t count,
                                  Word* kept) {
  for (int64_t i = 0; i < count; ++i) {
    kept[i] = static_cast<Word>(Word{0} - static_cast<Word>(present[segment[i]]));
  }
}

template <typename T>
SALIENCY_FAST_INLINE void blend_body(const T* mask, const T* x, const T* fill, int64_t count,
                                     T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = fill[i] + mask[i] * (x[i] - fill[i]);
}

SALIENCY_FAST_CLONES
void blend(const float* mask, const float* x, const float* fill, int64_t count, float* out) {
  blend_body(mask, x, fill, count, out);
}

SALIENCY_FAST_CLONES
void blend(const double* mask, const double* x, const double* fill, int64_t count, double* out) {
  blend_body(mask, x, fill, count, out);
}

at::Tensor segment_points(const at::Tensor& x, const at::Tensor& fill, const at::Tensor& segment,
                          const at::Tensor& present, const at::Tensor& item,
                          const at::Tensor& place) {
  const char* op = "segment_points";
  TORCH_CHECK(segment.scalar_type() == at::kLong, op, ": segment must be int64: got ",
              segment.scalar_type());
  TORCH_CHECK(present.scalar_type() == at::kBool && present.dim() == 2, op,
              ": present must be bool [coalitions, features]: got ", present.scalar_type(), " ",
              present.sizes());
  const Rows rows = rows_of(x, fill, segment, item, op, "segment");
  const std::vector<int64_t> coalition = places(place, rows.count(), present.size(0), op, "place");
  check_one_or_all(segment, x, op, "segment");
  const at::Tensor numbers = segment.contiguous(), coalitions = present.contiguous();
  const int64_t* const named = numbers.const_data_ptr<int64_t>();
  const int64_t features = present.size(1);
  if (!all_below(named, numbers.numel(), static_cast<uint64_t>(features))) {
    const int64_t* wrong = std::find_if(named, named + numbers.numel(), [&](int64_t one) {
      return one < 0 || one >= features;
    });
    TORCH_CHECK_INDEX(false, op, ": segment must lie in [0, ", features, "): got ", *wrong);
  }
  const bool* const kept_by = coalitions.const_data_ptr<bool>();
  const int64_t segmented = segment.size(0);
  return chosen_points(rows, x, fill, op, [&](int64_t row, int64_t at, int64_t many, auto* kept) {
    look_up(kept_by + coalition[row] * features,
            named + rows.item[row] % segmented * rows.positions + at, many, kept);
  });
}

template <typename T>
void write_masks(const Rows& rows, const std::vector<int64_t>& place, const T* x, const T* fill,
                 const T* mask, T* out) {
  for_tiles(rows.count(), rows.positions,
            [&](int64_t row, int64_t end, int64_t first, int64_t last) {
    for (; row < end; ++row) {
      const T* const from = x + rows.item[row] * rows.size;
      const T* const other = fill + rows.item[row] % rows.fills * rows.size;
      for (int64_t at = first; at < rows.size; at += rows.positions) {
        blend(mask + place[row] * rows.positions + first, from + at, other + at,
              last - first, out + row * rows.size + at);
      }
    }
  });
}

at::Tensor mask_points(const at::Tensor& x, const at::Tensor& fill, const at::Tensor& mask,
                       const at::Tensor& item, const at::Tensor& place) {
  const char* op = "mask_points";
  const at::ScalarType type = computed_in(x, op, "x");
  TORCH_CHECK(mask.is_floating_point(), op, ": mask must be floating: got ", mask.scalar_type());
  const Rows rows = rows_of(x, fill, mask, item, op, "mask");
  const std::vector<int64_t> named = places(place, rows.count(), mask.size(0), op, "place");
  const at::Tensor ends = x.to(type).contiguous(), fills = fill.to(type).contiguous();
  const at::Tensor masks = mask.to(type).contiguous();
  at::Tensor out = empty_rows(rows.count(), x, type);
  AT_DISPATCH_FLOATING_TYPES(type, "mask_points", [&] {
    write_masks(rows, named, ends.const_data_ptr<scalar_t>(), fills.const_data_ptr<scalar_t>(),
                masks.const_data_ptr<scalar_t>(), out.mutable_data_ptr<scalar_t>());
  });
  return out.to(x.scalar_type());
}

}  // namespace
}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("segment_points", &saliency_fast::segment_points);
  m.impl("mask_points", &saliency_fast::mask_points);
}
