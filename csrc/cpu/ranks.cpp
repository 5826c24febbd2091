// rank_points: the ranks of a row's positions are compared once for all channels that share them.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <limits>

#include "cpu/choose.h"

namespace saliency_fast {
namespace {

// All bits of a word where its position's rank is `limit` or beyond.
template <typename Word>
SALIENCY_FAST_INLINE void compare_body(const int32_t* rank, int32_t limit, int64_t count,
                                       Word* kept) {
  for (int64_t i = 0; i < count; ++i) {
    kept[i] = static_cast<Word>(Word{0} - static_cast<Word>(rank[i] >= limit));
  }
}

SALIENCY_FAST_CLONES
void compare(const int32_t* rank, int32_t limit, int64_t count, uint8_t* kept) {
  compare_body(rank, limit, count, kept);
}

SALIENCY_FAST_CLONES
void compare(const int32_t* rank, int32_t limit, int64_t count, uint16_t* kept) {
  compare_body(rank, limit, count, kept);
}

SALIENCY_FAST_CLONES
void compare(const int32_t* rank, int32_t limit, int64_t count, uint32_t* kept) {
  compare_body(rank, limit, count, kept);
}

SALIENCY_FAST_CLONES
void compare(const int32_t* rank, int32_t limit, int64_t count, uint64_t* kept) {
  compare_body(rank, limit, count, kept);
}

at::Tensor rank_points(const at::Tensor& x, const at::Tensor& fill, const at::Tensor& rank,
                       const at::Tensor& item, const at::Tensor& count) {
  const char* op = "rank_points";
  constexpr int64_t kLeast = std::numeric_limits<int32_t>::min();
  constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(rank.scalar_type() == at::kInt, op, ": rank must be int32: got ",
              rank.scalar_type());
  TORCH_CHECK(count.scalar_type() == at::kLong, op, ": count must be int64: got ",
              count.scalar_type());
  const Rows rows = rows_of(x, fill, rank, item, op, "rank");
  check_one_or_all(rank, x, op, "rank");
  const std::vector<int64_t> counts = column<int64_t>(count, rows.count(), op, "count");
  const at::Tensor ranks = rank.contiguous();
  const int32_t* const named = ranks.const_data_ptr<int32_t>();
  const int64_t ranked = rank.size(0);
  return chosen_points(rows, x, fill, op, [&](int64_t row, int64_t at, int64_t many, auto* kept) {
    if (counts[row] > kLargest) {  // a bound that no rank reaches, and 32 bits do not hold
      std::fill_n(kept, many, 0);
    } else {
      compare(named + rows.item[row] % ranked * rows.positions + at,
              static_cast<int32_t>(std::max(counts[row], kLeast)), many, kept);
    }
  });
}

}  // namespace
}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("rank_points", &saliency_fast::rank_points);
}
