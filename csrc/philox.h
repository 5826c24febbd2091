// Philox4x32-10 (Salmon et al., 2011) and what is drawn from it; saliency_fast/ops/philox.py is
// the definition. Plain branch-free functions, so that a CPU compiler vectorises a loop over them;
// nvcc compiles the same text for the device. C++17.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SALIENCY_FAST_BOTH __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inline: a function left out of line would not take its caller's instruction set.
#define SALIENCY_FAST_BOTH inline __attribute__((always_inline))
#else
#define SALIENCY_FAST_BOTH inline
#endif

namespace saliency_fast {

// Streams: noise of points, draws of random lines, random baselines.
constexpr uint32_t kNoiseStream = 0;
constexpr uint32_t kLineStream = 1;
constexpr uint32_t kBaselineStream = 2;

struct Block {
  uint32_t word[4];
};

// The ten rounds, from counter words and key halves.
SALIENCY_FAST_BOTH Block philox_rounds(uint32_t word0, uint32_t word1, uint32_t word2,
                                       uint32_t word3, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(word0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(word2) * 0xCD9E8D57u;
    word0 = static_cast<uint32_t>(product1 >> 32) ^ word1 ^ key0;
    word1 = static_cast<uint32_t>(product1);
    word2 = static_cast<uint32_t>(product0 >> 32) ^ word3 ^ key1;
    word3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{word0, word1, word2, word3}};
}

// The four words of elements 4 * block to 4 * block + 3.
SALIENCY_FAST_BOTH Block philox(uint64_t seed, uint64_t block, uint32_t sample, uint32_t stream) {
  return philox_rounds(static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), sample,
                       stream, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// A natural number from 1 to 2**24 as mantissa * 2**exponent, mantissa in [sqrt(1/2), sqrt(2)).
struct Split {
  float mantissa;
  int32_t exponent;
};

SALIENCY_FAST_BOTH Split split(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  const uint32_t shifted = bits + (0x3F800000u - 0x3F3504F3u);
  const int32_t exponent = static_cast<int32_t>(shifted >> 23) - 127;
  bits = (shifted & 0x007FFFFFu) + 0x3F3504F3u;
  float mantissa;
  std::memcpy(&mantissa, &bits, sizeof mantissa);
  return {mantissa, exponent};
}

// -2 log((fraction + 1) / 2**24) of a 24-bit fraction. Polynomials: Chebyshev fits; their error
// is below the last digit.
template <typename T>
SALIENCY_FAST_BOTH T minus_two_log(int32_t fraction);

template <>
SALIENCY_FAST_BOTH float minus_two_log<float>(int32_t fraction) {
  const Split number = split(static_cast<float>(fraction + 1));
  const float f = number.mantissa - 1.0f;
  float p = -0.0790274377f;
  p = p * f + 0.126223198f;
  p = p * f - 0.129981838f;
  p = p * f + 0.142144959f;
  p = p * f - 0.166412815f;
  p = p * f + 0.200010451f;
  p = p * f - 0.250003064f;
  p = p * f + 0.333333307f;
  const float square = f * f;
  const float log_mantissa = f + (square * (f * p) - 0.5f * square);
  // 2 log(2) in two parts; the product with the first has no rounding.
  const float halvings = static_cast<float>(24 - number.exponent);
  return halvings * 1.38671875f + (halvings * -4.2438889e-4f - 2.0f * log_mantissa);
}

template <>
SALIENCY_FAST_BOTH double minus_two_log<double>(int32_t fraction) {
  const Split number = split(static_cast<float>(fraction + 1));
  const double f = static_cast<double>(number.mantissa) - 1.0;
  const double s = f / (2.0 + f);  // log(1 + f) = 2 atanh(s)
  const double z = s * s;
  double p = 0.146164496850434059;
  p = p * z + 0.153317216005560413;
  p = p * z + 0.181828891252617221;
  p = p * z + 0.222222111347950799;
  p = p * z + 0.285714286259754849;
  p = p * z + 0.399999999998995045;
  p = p * z + 0.666666666666666969;
  const double log_mantissa = 2.0 * s + s * (z * p);
  const double halvings = static_cast<double>(24 - number.exponent);
  return halvings * 1.3862943611198906188 - 2.0 * log_mantissa;
}

// sin and cos of `turn` turns, turn in [-1/8, 1/8].
template <typename T>
struct Wave {
  T cosine, sine;
};

SALIENCY_FAST_BOTH Wave<float> wave(float turn) {
  const float z = turn * turn;
  float s = -75.4016127f;
  s = s * z + 81.5925429f;
  s = s * z - 41.3416626f;
  s = s * z + 0.283185288f;
  float c = 59.424106f;
  c = c * z - 85.4488201f;
  c = c * z + 64.9393691f;
  c = c * z - 19.7392088f;
  // 2 pi as 6 + 0.283...: 6 * turn has no rounding, so one rounding remains.
  return {1.0f + c * z, 6.0f * turn + turn * s};
}

SALIENCY_FAST_BOTH Wave<double> wave(double turn) {
  const double z = turn * turn;
  double s = 3.78086895930229552;
  s = s * z - 15.0938042099871135;
  s = s * z + 42.058685020160894;
  s = s * z - 76.7058597042745506;
  s = s * z + 81.6052492759480352;
  s = s * z - 41.3417022403996362;
  s = s * z + 6.28318530717958646;
  double c = -1.69903439406606364;
  c = c * z + 7.90320691156967843;
  c = c * z - 26.4262532758547214;
  c = c * z + 60.2446413527020089;
  c = c * z - 85.4568172066438042;
  c = c * z + 64.9393940226682427;
  c = c * z - 19.7392088021787172;
  return {1.0 + c * z, turn * s};
}

SALIENCY_FAST_BOTH float square_root(float x) { return sqrtf(x); }
SALIENCY_FAST_BOTH double square_root(double x) { return sqrt(x); }

// Two standard normals (Box and Muller, 1958) of two words: radius from the first, angle from the
// second. Both are 24-bit fractions, so the reduction to the nearest quarter turn is exact.
template <typename T>
struct Pair {
  T first, second;
};

template <typename T>
SALIENCY_FAST_BOTH Pair<T> normal_pair(uint32_t radius_word, uint32_t angle_word) {
  const T radius = square_root(minus_two_log<T>(static_cast<int32_t>(radius_word >> 8)));
  const int32_t angle = static_cast<int32_t>(angle_word >> 8);
  const int32_t quarter = (angle + (1 << 21)) >> 22;
  const T turn = static_cast<T>(angle - quarter * (1 << 22)) * static_cast<T>(1.0 / (1 << 24));
  const Wave<T> w = wave(turn);
  const bool odd = (quarter & 1) != 0;
  const T cosine = odd ? w.sine : w.cosine;
  const T sine = odd ? w.cosine : w.sine;
  return {((quarter + 1) & 2) != 0 ? -(radius * cosine) : radius * cosine,
          (quarter & 2) != 0 ? -(radius * sine) : radius * sine};
}

// The normals of a block's four elements.
template <typename T>
struct Normals {
  T value[4];
};

template <typename T>
SALIENCY_FAST_BOTH Normals<T> normals(Block block) {
  const Pair<T> low = normal_pair<T>(block.word[0], block.word[1]);
  const Pair<T> high = normal_pair<T>(block.word[2], block.word[3]);
  return {{low.first, low.second, high.first, high.second}};
}

// The uniform number of a word: the middle of one of 2**23 cells, never 0 or 1, exact in float.
template <typename T>
SALIENCY_FAST_BOTH T uniform(uint32_t word) {
  return (static_cast<T>(static_cast<int32_t>(word >> 9)) + static_cast<T>(0.5)) *
         static_cast<T>(1.0 / (1 << 23));
}

// A random line: which baseline it starts from and where on it the point lies.
struct Line {
  int64_t baseline;
  double alpha;
};

SALIENCY_FAST_BOTH Line line_draw(uint64_t seed, uint32_t sample, int64_t baselines) {
  const Block block = philox(seed, 0, sample, kLineStream);
  const uint64_t product = static_cast<uint64_t>(block.word[0]) * static_cast<uint64_t>(baselines);
  return {static_cast<int64_t>(product >> 32), uniform<double>(block.word[1])};
}

}  // namespace saliency_fast
