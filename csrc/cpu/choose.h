// Points that take some elements of an example and the others from a fill: what a row keeps is
// found once for all channels that share it, x and fill stay in the cache over all rows, and
// points are written once, contiguous. Elements are words of their width, of any type.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/launch.h"
#include "cpu/simd.h"

namespace saliency_fast {

// Positions of which is found at a time whether they are kept: at most 8 KB of the stack.
constexpr int64_t kLooked = 1024;

// A launch: the examples of its rows, and how one is cut: its last `positions` elements are
// numbered, and what stands before them repeats the numbers.
struct Rows {
  std::vector<int64_t> item;
  int64_t size, positions, fills;

  int64_t count() const { return static_cast<int64_t>(item.size()); }
};

inline Rows rows_of(const at::Tensor& x, const at::Tensor& fill, const at::Tensor& named,
                    const at::Tensor& item, const char* op, const char* name) {
  const int64_t size = row_size(x, op, "x");
  check_fill(fill, x, op);
  TORCH_CHECK(named.dim() == 2 && named.size(1) > 0 && size % named.size(1) == 0, op, ": ", name,
              " must be [rows, P], an example of ", size, " elements a multiple of P: got ",
              named.sizes());
  return {places(item, item.numel(), x.size(0), op, "item"), size, named.size(1), fill.size(0)};
}

namespace {

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

template <typename Word, typename F>
void write_chosen(const Rows& rows, const Word* x, const Word* fill, Word* out, const F& keep) {
  for_tiles(rows.count(), rows.positions,
            [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    Word kept[kLooked];
    for (int64_t at = first; at < last; at += kLooked) {
      const int64_t count = std::min(kLooked, last - at);
      for (int64_t row = begin; row < end; ++row) {
        const int64_t item = rows.item[row];
        keep(row, at, count, kept);
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

// The points of `rows`. keep(row, first position, count, words) sets all bits of the words whose
// positions are x's, and none of the fill's.
template <typename F>
at::Tensor chosen_points(const Rows& rows, const at::Tensor& x, const at::Tensor& fill,
                         const char* op, const F& keep) {
  const at::Tensor ends = x.contiguous(), fills = fill.contiguous();
  at::Tensor out = empty_rows(rows.count(), x, x.scalar_type());
  const auto write = [&]<typename Word>(Word) {
    write_chosen(rows, static_cast<const Word*>(ends.const_data_ptr()),
                 static_cast<const Word*>(fills.const_data_ptr()),
                 static_cast<Word*>(out.mutable_data_ptr()), keep);
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

}  // namespace
}  // namespace saliency_fast
