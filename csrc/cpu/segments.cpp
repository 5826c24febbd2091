// segment_points, mask_points: what a row keeps is read once for all channels that share it, from
// the cache; x and fill stay there over all rows, and points are written once, contiguous.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cpu/launch.h"
#include "cpu/simd.h"

namespace saliency_fast {
namespace {

// Positions whose segments are looked up at a time: 8 KB of the stack.
constexpr int64_t kLooked = 1024;

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

template <typename Word>
SALIENCY_FAST_INLINE void choose_body(const Word* kept, const Word* x, const Word* fill,
                                      int64_t count, Word* out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<Word>(fill[i] ^ ((fill[i] ^ x[i]) & kept[i]));
  }
}

SALIENCY_FAST_CLONES
void choose(const uint8_t* kept, const uint8_t* x, const uint8_t* fill, int64_t count,
            uint8_t* out) {
  choose_body(kept, x, fill, count, out);
}

SALIENCY_FAST_CLONES
void choose(const uint16_t* kept, const uint16_t* x, const uint16_t* fill, int64_t count,
            uint16_t* out) {
  choose_body(kept, x, fill, count, out);
}

SALIENCY_FAST_CLONES
void choose(const uint32_t* kept, const uint32_t* x, const uint32_t* fill, int64_t count,
            uint32_t* out) {
  choose_body(kept, x, fill, count, out);
}

SALIENCY_FAST_CLONES
void choose(const uint64_t* kept, const uint64_t* x, const uint64_t* fill, int64_t count,
            uint64_t* out) {
  choose_body(kept, x, fill, count, out);
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

// A launch: rows, the examples and coalitions or masks they name, and how an example is cut.
struct Rows {
  std::vector<int64_t> item, place;
  int64_t size, positions, repeats, fills;

  int64_t count() const { return static_cast<int64_t>(item.size()); }
};

Rows rows_of(const at::Tensor& x, const at::Tensor& fill, const at::Tensor& named,
             const at::Tensor& table, const at::Tensor& item, const at::Tensor& place,
             const char* op, const char* name) {
  const int64_t rows = item.numel(), size = row_size(x, op, "x");
  check_fill(fill, x, op);
  TORCH_CHECK(named.dim() == 2 && named.size(1) > 0 && size % named.size(1) == 0, op, ": ", name,
              " must be [rows, P], an example of ", size, " elements a multiple of P: got ",
              named.sizes());
  const int64_t positions = named.size(1);
  return {places(item, rows, x.size(0), op, "item"),
          places(place, rows, table.size(0), op, "place"),
          size, positions, size / positions, fill.size(0)};
}

template <typename Word>
void write_segments(const Rows& rows, const Word* x, const Word* fill, const int64_t* segment,
                    int64_t segmented, const bool* present, int64_t features, Word* out) {
  for_tiles(rows.count(), rows.positions,
            [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    Word kept[kLooked];
    for (int64_t at = first; at < last; at += kLooked) {
      const int64_t count = std::min(kLooked, last - at);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t item = rows.item[row];
        look_up(present + rows.place[row] * features,
                segment + item % segmented * rows.positions + at, count, kept);
        const Word* const from = x + item * rows.size + at;
        const Word* const other = fill + item % rows.fills * rows.size + at;
        Word* const to = out + row * rows.size + at;
        for (int64_t part = 0; part < rows.size; part += rows.positions) {
          choose(kept, from + part, other + part, count, to + part);
        }
      }
    }
  });
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
  const Rows rows = rows_of(x, fill, segment, present, item, place, op, "segment");
  TORCH_CHECK(segment.size(0) == 1 || segment.size(0) == x.size(0), op,
              ": segment must have one row or those of x: got ", segment.sizes(), ", x is ",
              x.sizes());
  const at::Tensor ends = x.contiguous(), fills = fill.contiguous();
  const at::Tensor numbers = segment.contiguous(), coalitions = present.contiguous();
  const int64_t* const named = numbers.const_data_ptr<int64_t>();
  const int64_t features = present.size(1);
  if (!all_below(named, numbers.numel(), static_cast<uint64_t>(features))) {
    const int64_t* wrong = std::find_if(named, named + numbers.numel(), [&](int64_t one) {
      return one < 0 || one >= features;
    });
    TORCH_CHECK_INDEX(false, op, ": segment must lie in [0, ", features, "): got ", *wrong);
  }
  at::Tensor out = empty_rows(rows.count(), x, x.scalar_type());
  const auto write = [&]<typename Word>(Word) {
    write_segments(rows, static_cast<const Word*>(ends.const_data_ptr()),
                   static_cast<const Word*>(fills.const_data_ptr()), named, segment.size(0),
                   coalitions.const_data_ptr<bool>(), features,
                   static_cast<Word*>(out.mutable_data_ptr()));
  };
  switch (x.element_size()) {
    case 1: write(uint8_t{}); break;
    case 2: write(uint16_t{}); break;
    case 4: write(uint32_t{}); break;
    case 8: write(uint64_t{}); break;
    default: TORCH_CHECK(false, op, ": x must have elements of 1 to 8 bytes: got ",
                         x.scalar_type());
  }
  return out;
}

template <typename T>
void write_masks(const Rows& rows, const T* x, const T* fill, const T* mask, T* out) {
  for_tiles(rows.count(), rows.positions,
            [&](int64_t row, int64_t end, int64_t first, int64_t last) {
    for (; row < end; ++row) {
      const T* const from = x + rows.item[row] * rows.size;
      const T* const other = fill + rows.item[row] % rows.fills * rows.size;
      for (int64_t at = first; at < rows.size; at += rows.positions) {
        blend(mask + rows.place[row] * rows.positions + first, from + at, other + at,
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
  const Rows rows = rows_of(x, fill, mask, mask, item, place, op, "mask");
  const at::Tensor ends = x.to(type).contiguous(), fills = fill.to(type).contiguous();
  const at::Tensor masks = mask.to(type).contiguous();
  at::Tensor out = empty_rows(rows.count(), x, type);
  AT_DISPATCH_FLOATING_TYPES(type, "mask_points", [&] {
    write_masks(rows, ends.const_data_ptr<scalar_t>(), fills.const_data_ptr<scalar_t>(),
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
