// The random columns of a launch table, and the normals of a tile of a row.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/launch.h"

namespace saliency_fast {

// Standard normals of `blocks` blocks from `block` on: four numbers each.
void fill_normals(uint64_t seed, uint64_t block, uint32_t sample, int64_t blocks, float* out);
void fill_normals(uint64_t seed, uint64_t block, uint32_t sample, int64_t blocks, double* out);

struct RandomRow {
  int64_t item;
  int64_t start;  // row of the baselines
  double alpha;   // place on the line
  double sigma;   // with the sign of an antithetic sample
  uint64_t seed;
  uint32_t sample;
};

// Rows of noise_points (baselines = 0) or of random_line_points.
std::vector<RandomRow> random_rows(const at::Tensor& x, const at::Tensor& sigma,
                                   const at::Tensor& seed, const at::Tensor& item,
                                   const at::Tensor& sample, bool antithetic, int64_t baselines,
                                   const char* op);

// Normals of one tile, kept while the next row asks for the same draw (an antithetic pair does).
template <typename T>
class NormalTile {
 public:
  explicit NormalTile(int64_t first_element) : first_element_(first_element) {}

  // Normals of elements [begin, begin + count) of a row; count is at most kTile.
  const T* draw(const RandomRow& row, int64_t begin, int64_t count) {
    const uint64_t element = static_cast<uint64_t>(first_element_ + begin);
    const int64_t skip = static_cast<int64_t>(element % 4);
    const bool kept = filled_ && row.seed == seed_ && row.sample == sample_ && begin == begin_;
    if (!kept) {
      fill_normals(row.seed, element / 4, row.sample, ceil_div(skip + count, 4), values_);
      seed_ = row.seed;
      sample_ = row.sample;
      begin_ = begin;
      filled_ = true;
    }
    return values_ + skip;
  }

 private:
  alignas(64) T values_[kTile + 8];
  int64_t first_element_;
  int64_t begin_ = 0;
  uint64_t seed_ = 0;
  uint32_t sample_ = 0;
  bool filled_ = false;
};

}  // namespace saliency_fast
