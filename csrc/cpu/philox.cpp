// random_bits, and the normals that the other CPU ops draw.
#include "philox.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "cpu/launch.h"
#include "cpu/philox_words.h"
#include "cpu/random_rows.h"
#include "cpu/simd.h"

namespace saliency_fast {
namespace {

template <typename T>
SALIENCY_FAST_INLINE void group_normals_body(const uint32_t (*word)[kGroup], T* out) {
  T value[4][kGroup];
  for (int64_t half = 0; half < 4; half += 2) {
    for (int64_t i = 0; i < kGroup; ++i) {
      const Pair<T> pair = normal_pair<T>(word[half][i], word[half + 1][i]);
      value[half][i] = pair.first;
      value[half + 1][i] = pair.second;
    }
  }
  for (int64_t i = 0; i < kGroup; ++i) {
    for (int64_t j = 0; j < 4; ++j) out[4 * i + j] = value[j][i];
  }
}

SALIENCY_FAST_CLONES
void group_normals(const uint32_t (*word)[kGroup], float* out) { group_normals_body(word, out); }

SALIENCY_FAST_CLONES
void group_normals(const uint32_t (*word)[kGroup], double* out) { group_normals_body(word, out); }

SALIENCY_FAST_CLONES
void group_bits(const uint32_t (*word)[kGroup], int64_t* out) {
  for (int64_t i = 0; i < kGroup; ++i) {
    for (int64_t j = 0; j < 4; ++j) out[4 * i + j] = word[j][i];
  }
}

template <typename T>
void fill(uint64_t seed, uint64_t block, uint32_t sample, int64_t blocks, T* out) {
  alignas(64) uint32_t word[4][kGroup];
  alignas(64) T rest[4 * kGroup];
  for (int64_t first = 0; first < blocks; first += kGroup) {
    group_words(counter_of(seed, block + static_cast<uint64_t>(first), sample, kNoiseStream), word);
    const int64_t left = blocks - first;
    group_normals(word, left >= kGroup ? out + 4 * first : rest);
    if (left < kGroup) std::copy(rest, rest + 4 * left, out + 4 * first);
  }
}

at::Tensor random_bits(const at::Tensor& seed, const at::Tensor& sample, int64_t count,
                       int64_t first_element, int64_t stream) {
  const char* op = "random_bits";
  const int64_t rows = seed.numel();
  const std::vector<int64_t> seeds = column<int64_t>(seed, rows, op, "seed");
  const std::vector<int64_t> samples = column<int64_t>(sample, rows, op, "sample");
  TORCH_CHECK(count >= 0 && first_element >= 0, op,
              ": count and first_element must not be negative: got ", count, " and ",
              first_element);
  at::Tensor out = empty_output({rows, count}, seed.options().dtype(at::kLong));
  int64_t* const words = out.mutable_data_ptr<int64_t>();
  for_tiles(rows, count, [&](int64_t row, int64_t last_row, int64_t first, int64_t last) {
    alignas(64) uint32_t word[4][kGroup];
    alignas(64) int64_t bits[4 * kGroup];
    const int64_t from = first_element + first;
    const int64_t until = first_element + last;
    for (; row < last_row; ++row) {
      for (int64_t block = from / 4; block * 4 < until; block += kGroup) {
        group_words(counter_of(static_cast<uint64_t>(seeds[row]), static_cast<uint64_t>(block),
                               static_cast<uint32_t>(samples[row]), static_cast<uint32_t>(stream)),
                    word);
        group_bits(word, bits);
        const int64_t begin = std::max(from, 4 * block);
        const int64_t end = std::min(until, 4 * (block + kGroup));
        std::copy(bits + begin - 4 * block, bits + end - 4 * block,
                  words + row * count + begin - first_element);
      }
    }
  });
  return out;
}

}  // namespace

void fill_normals(uint64_t seed, uint64_t block, uint32_t sample, int64_t blocks, float* out) {
  fill(seed, block, sample, blocks, out);
}

void fill_normals(uint64_t seed, uint64_t block, uint32_t sample, int64_t blocks, double* out) {
  fill(seed, block, sample, blocks, out);
}

std::vector<RandomRow> random_rows(const at::Tensor& x, const at::Tensor& sigma,
                                   const at::Tensor& seed, const at::Tensor& item,
                                   const at::Tensor& sample, bool antithetic, int64_t baselines,
                                   const char* op) {
  const int64_t rows = item.numel();
  const std::vector<double> sigmas = column<double>(sigma, x.size(0), op, "sigma");
  const std::vector<int64_t> seeds = column<int64_t>(seed, x.size(0), op, "seed");
  const std::vector<int64_t> items = places(item, rows, x.size(0), op, "item");
  const std::vector<int64_t> samples = column<int64_t>(sample, rows, op, "sample");
  std::vector<RandomRow> table(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t number = samples[row];
    RandomRow& made = table[row];
    made.item = items[row];
    made.seed = static_cast<uint64_t>(seeds[made.item]);
    made.sample = static_cast<uint32_t>(antithetic ? number >> 1 : number);
    made.sigma = antithetic && (number & 1) != 0 ? -sigmas[made.item] : sigmas[made.item];
    made.start = 0;
    made.alpha = 0.0;
    if (baselines > 0) {
      const Line line = line_draw(made.seed, made.sample, baselines);
      made.start = line.baseline;
      made.alpha = line.alpha;
    }
  }
  return table;
}

}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("random_bits", &saliency_fast::random_bits);
}
