// magnitude_percentile: an exact order statistic by radix selection, two passes over the map.
// overlay: one pass over image and map.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/launch.h"
#include "cpu/simd.h"

namespace saliency_fast {
namespace {

constexpr int kDigit = 12;
constexpr int64_t kBins = int64_t{1} << kDigit;
// Fewer candidates than this are left to std::nth_element.
constexpr int64_t kFew = 4096;

template <typename T>
struct Keys;
template <>
struct Keys<float> {
  using Key = uint32_t;
};
template <>
struct Keys<double> {
  using Key = uint64_t;
};

// Magnitudes order as their bits do; NaN is largest, as in torch.sort.
template <typename T>
SALIENCY_FAST_INLINE typename Keys<T>::Key key_of(T value) {
  typename Keys<T>::Key bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<typename Keys<T>::Key>(bits << 1) >> 1;
}

using Histogram = std::array<int64_t, kBins>;

// Counts the digit at `shift` of `count` keys that read(i) gives. Two tables: equal neighbours
// would wait for each other's increment.
template <typename Read>
void count_digits(int64_t count, int shift, const Read& read, Histogram& histogram) {
  std::array<std::array<uint32_t, kBins>, 2> part{};
  int64_t i = 0;
  for (; i + 1 < count; i += 2) {
    ++part[0][(read(i) >> shift) & (kBins - 1)];
    ++part[1][(read(i + 1) >> shift) & (kBins - 1)];
  }
  for (; i < count; ++i) ++part[0][(read(i) >> shift) & (kBins - 1)];
  for (int64_t bin = 0; bin < kBins; ++bin) {
    histogram[bin] = static_cast<int64_t>(part[0][bin]) + part[1][bin];
  }
}

// The bin that holds the element of number `rank`, which becomes its number within the bin.
int64_t find_bin(const Histogram& histogram, int64_t& rank) {
  int64_t bin = 0;
  while (rank >= histogram[bin]) rank -= histogram[bin++];
  return bin;
}

// The key of number `rank` among `keys`, which agree above the digit at `shift`.
template <typename Key>
Key select(std::vector<Key>& keys, int64_t rank, int shift) {
  Histogram histogram;
  while (static_cast<int64_t>(keys.size()) > kFew && shift > 0) {
    shift = std::max(0, shift - kDigit);
    count_digits(static_cast<int64_t>(keys.size()), shift, [&](int64_t i) { return keys[i]; },
                 histogram);
    const Key wanted = static_cast<Key>(find_bin(histogram, rank));
    const auto kept = std::remove_if(keys.begin(), keys.end(), [&](Key key) {
      return ((key >> shift) & (kBins - 1)) != wanted;
    });
    keys.erase(kept, keys.end());
  }
  std::nth_element(keys.begin(), keys.begin() + rank, keys.end());
  return keys[rank];
}

// Copies to `found` the `expected` keys whose digit is `wanted`. It writes before it knows, which
// is safe because it ends with the last of them.
template <typename T, typename Key>
void collect(const T* values, int64_t count, int64_t wanted, int shift, Key* found,
             int64_t expected) {
  int64_t number = 0;
  for (int64_t i = 0; i < count && number < expected; ++i) {
    const Key key = key_of(values[i]);
    found[number] = key;
    number += static_cast<int64_t>(static_cast<int64_t>(key >> shift) == wanted);
  }
}

// The order statistic of one row. Its chunks run in parallel, unless rows already do.
template <typename T>
T percentile_row(const T* values, int64_t count, int64_t rank) {
  using Key = typename Keys<T>::Key;
  constexpr int kShift = 8 * static_cast<int>(sizeof(T)) - 1 - kDigit;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t most = std::max<int64_t>(1, count / kMinimumWork);
  const int64_t chunks = std::max(std::min(threads, most), ceil_div(count, int64_t{1} << 31));
  const int64_t size = ceil_div(count, chunks);
  std::vector<Histogram> histograms(static_cast<size_t>(chunks));
  const auto each_chunk = [&](const auto& f) {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = std::min(count, chunk * size);
        f(chunk, first, std::min(count, first + size));
      }
    });
  };
  each_chunk([&](int64_t chunk, int64_t first, int64_t end) {
    const auto read = [&](int64_t i) { return key_of(values[first + i]); };
    count_digits(end - first, kShift, read, histograms[chunk]);
  });
  Histogram all{};
  for (const Histogram& histogram : histograms) {
    for (int64_t bin = 0; bin < kBins; ++bin) all[bin] += histogram[bin];
  }
  const int64_t wanted = find_bin(all, rank);
  std::vector<int64_t> places(static_cast<size_t>(chunks + 1));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    places[chunk + 1] = places[chunk] + histograms[chunk][wanted];
  }
  std::vector<Key> candidates(static_cast<size_t>(places[chunks]));
  each_chunk([&](int64_t chunk, int64_t first, int64_t end) {
    collect(values + first, end - first, wanted, kShift, candidates.data() + places[chunk],
            histograms[chunk][wanted]);
  });
  const Key key = select(candidates, rank, kShift);
  T found;
  std::memcpy(&found, &key, sizeof found);
  return found;
}

template <typename T>
void percentile_rows(const T* values, int64_t rows, int64_t count, int64_t rank, T* out) {
  const int64_t shared = rows >= at::get_num_threads() ? ceil_div(kMinimumWork, count) : rows;
  at::parallel_for(0, rows, shared, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      out[row] = percentile_row(values + row * count, count, rank);
    }
  });
}

at::Tensor magnitude_percentile(const at::Tensor& values, double percentile) {
  const char* op = "magnitude_percentile";
  const int64_t count = row_size(values, op, "values");
  const int64_t rows = values.size(0);
  TORCH_CHECK(percentile >= 0.0 && percentile <= 100.0, op,
              ": percentile must lie in [0, 100]: got ", percentile);
  TORCH_CHECK(count > 0 || rows == 0, op, ": rows of values must not be empty: got ",
              values.sizes());
  const at::ScalarType type = computed_in(values, op, "values");
  at::Tensor out = at::empty({rows}, values.options().dtype(type));
  if (rows == 0) return out.to(values.scalar_type());
  const double place = std::ceil(percentile / 100.0 * static_cast<double>(count - 1));
  const int64_t rank = std::min(count - 1, static_cast<int64_t>(place));
  const at::Tensor dense = values.to(type).contiguous();
  AT_DISPATCH_FLOATING_TYPES(type, "magnitude_percentile", [&] {
    percentile_rows(dense.const_data_ptr<scalar_t>(), rows, count, rank,
                    out.mutable_data_ptr<scalar_t>());
  });
  return out.to(values.scalar_type());
}

// Pixels that a tile of the overlay treats at once.
constexpr int64_t kPixels = 1024;

// Shade and opacity of each pixel. A pixel that is not a number stays as the image has it.
template <typename T>
SALIENCY_FAST_INLINE void shade_body(const T* values, T scale, bool is_signed, float opacity,
                                     int64_t count, int32_t* shade, float* blend) {
  for (int64_t i = 0; i < count; ++i) {
    T value = values[i] / scale;
    value = value == value ? value : T{0};
    value = value < T{-1} ? T{-1} : value;
    value = value > T{1} ? T{1} : value;
    const float ratio = static_cast<float>(value);
    const float size = std::abs(ratio);
    const float place = is_signed ? 0.5f + 0.5f * ratio : size;
    shade[i] = static_cast<int32_t>(place * 255.0f + 0.5f);  // not negative: truncation is floor
    blend[i] = opacity * size;
  }
}

SALIENCY_FAST_CLONES
void shades(const float* values, float scale, bool is_signed, float opacity, int64_t count,
            int32_t* shade, float* blend) {
  shade_body(values, scale, is_signed, opacity, count, shade, blend);
}

SALIENCY_FAST_CLONES
void shades(const double* values, double scale, bool is_signed, float opacity, int64_t count,
            int32_t* shade, float* blend) {
  shade_body(values, scale, is_signed, opacity, count, shade, blend);
}

SALIENCY_FAST_CLONES
void mix(const uint8_t* image, const uint8_t* color, const float* blend, int64_t bytes,
         uint8_t* out) {
  for (int64_t i = 0; i < bytes; ++i) {
    const float mixed =
        static_cast<float>(image[i]) * (1.0f - blend[i]) + static_cast<float>(color[i]) * blend[i];
    out[i] = static_cast<uint8_t>(static_cast<int32_t>(mixed + 0.5f));
  }
}

template <typename T>
void overlay_tile(const uint8_t* image, const T* values, T scale, const uint32_t* colors,
                  bool is_signed, float opacity, int64_t count, uint8_t* out) {
  int32_t shade[kPixels];
  float blend[kPixels], blend_of_byte[3 * kPixels];
  uint8_t color[3 * kPixels + 1];
  shades(values, scale, is_signed, opacity, count, shade, blend);
  for (int64_t i = 0; i < count; ++i) {
    // Four bytes at once; the next pixel overwrites the fourth.
    std::memcpy(color + 3 * i, colors + shade[i], sizeof(uint32_t));
    for (int64_t j = 0; j < 3; ++j) blend_of_byte[3 * i + j] = blend[i];
  }
  mix(image, color, blend_of_byte, 3 * count, out);
}

void check_overlay(const at::Tensor& image, const at::Tensor& values, const at::Tensor& scale,
                   const at::Tensor& colors, double opacity) {
  const char* op = "overlay";
  TORCH_CHECK(image.dim() == 3 && image.size(2) == 3 && image.scalar_type() == at::kByte, op,
              ": image must be uint8 [B, P, 3]: got ", image.scalar_type(), " ", image.sizes());
  TORCH_CHECK(values.dim() == 2 && values.size(0) == image.size(0) &&
                  values.size(1) == image.size(1),
              op, ": values must be [", image.size(0), ", ", image.size(1), "]: got ",
              values.sizes());
  TORCH_CHECK(scale.dim() == 1 && scale.size(0) == image.size(0), op, ": scale must be [",
              image.size(0), "]: got ", scale.sizes());
  TORCH_CHECK(colors.dim() == 2 && colors.size(0) == 256 && colors.size(1) == 3 &&
                  colors.scalar_type() == at::kByte,
              op, ": colors must be uint8 [256, 3]: got ", colors.scalar_type(), " ",
              colors.sizes());
  TORCH_CHECK(opacity >= 0.0 && opacity <= 1.0, op, ": opacity must lie in [0, 1]: got ", opacity);
}

at::Tensor overlay(const at::Tensor& image, const at::Tensor& values, const at::Tensor& scale,
                   const at::Tensor& colors, bool is_signed, double opacity) {
  check_overlay(image, values, scale, colors, opacity);
  const at::ScalarType type = computed_in(values, "overlay", "values");
  const at::Tensor pictures = image.contiguous();
  const at::Tensor maps = values.to(type).contiguous();
  const at::Tensor scales = scale.to(type).contiguous();
  const at::Tensor palette = colors.contiguous();
  std::array<uint32_t, 256> packed{};
  for (int64_t i = 0; i < 256; ++i) {
    std::memcpy(&packed[i], palette.const_data_ptr<uint8_t>() + 3 * i, 3);
  }
  at::Tensor out = empty_output(image.sizes(), image.options());
  const int64_t pixels = image.size(1);
  const int64_t tiles = ceil_div(pixels, kPixels);
  AT_DISPATCH_FLOATING_TYPES(type, "overlay", [&] {
    const uint8_t* const read = pictures.const_data_ptr<uint8_t>();
    const scalar_t* const map = maps.const_data_ptr<scalar_t>();
    const scalar_t* const size = scales.const_data_ptr<scalar_t>();
    uint8_t* const written = out.mutable_data_ptr<uint8_t>();
    at::parallel_for(0, image.size(0) * tiles, 16, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t frame = task / tiles;
        const int64_t first = frame * pixels + (task % tiles) * kPixels;
        const int64_t count = std::min(kPixels, (frame + 1) * pixels - first);
        const scalar_t least = std::numeric_limits<scalar_t>::min();
        overlay_tile(read + 3 * first, map + first, std::max(size[frame], least), packed.data(),
                     is_signed, static_cast<float>(opacity), count, written + 3 * first);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace saliency_fast

TORCH_LIBRARY_IMPL(saliency_fast, CPU, m) {
  m.impl("magnitude_percentile", &saliency_fast::magnitude_percentile);
  m.impl("overlay", &saliency_fast::overlay);
}
