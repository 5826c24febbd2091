// Winograd's F(4x4, 3x3) on a block of tiles, compiled by instruction_sets.h. Transforms are V [36, kTiles, in], U [36, in, width] and M [36, kTiles, width].

// B^T d along one axis, from one of the six to the next `step` registers.
HERE void input_axis(const Floats* d, Floats* out, int step, int out_step) {
  const Floats d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step], d4 = d[4 * step],
               d5 = d[5 * step];
  const Floats even = fma(-2.0f, d2, d4), odd = fma(kHalfRoot, d3, -kRoot * d1);
  const Floats even2 = fma(-0.5f, d2, d4), odd2 = fma(kRoot, d3, -kHalfRoot * d1);
  out[0] = d0 + fma(-2.5f, d2, d4);
  out[out_step] = even + odd;
  out[2 * out_step] = even - odd;
  out[3 * out_step] = even2 + odd2;
  out[4 * out_step] = even2 - odd2;
  out[5 * out_step] = d1 + fma(-2.5f, d3, d5);
}

// A^T m along one axis.
HERE void output_axis(const Floats* m, Floats* out, int64_t step, int64_t out_step) {
  const Floats sum = m[step] + m[2 * step], apart = m[step] - m[2 * step];
  const Floats sum2 = m[3 * step] + m[4 * step], apart2 = m[3 * step] - m[4 * step];
  out[0] = m[0] + sum + sum2;
  out[out_step] = fma(kHalfRoot, apart, kRoot * apart2);
  out[2 * out_step] = fma(0.5f, sum, 2.0f * sum2);
  out[3 * out_step] = fma(0.5f * kHalfRoot, apart, fma(2.0f * kRoot, apart2, m[5 * step]));
}

// V of one tile, whose inputs' channels lie at `pixels`; those of the next one are fetched.
LEAF void input_tile(const Pixels& pixels, const Pixels& next, int64_t channels, int64_t pitch,
                     float* v) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    for (int i = 2; i < 6; ++i) {
      for (int j = 2; j < 6; ++j) __builtin_prefetch(next[6 * i + j] + c);
    }
    Floats half[36];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      Floats d[6];
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) d[j] = load(pixels[6 * j + i] + c);
      input_axis(d, half + i, 1, 6);
    }
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) {
      Floats d[6];
      input_axis(half + 6 * i, d, 1, 1);
#pragma GCC unroll 6
      for (int j = 0; j < 6; ++j) store(v + (6 * i + j) * pitch + c, d[j]);
    }
  }
}

// G g along one axis.
HERE void weight_axis(const Floats* g, Floats* out, int64_t step, int64_t out_step) {
  const Floats even = g[0] + 0.5f * g[2 * step], odd = kHalfRoot * g[step];
  const Floats even2 = g[0] + 2.0f * g[2 * step], odd2 = kRoot * g[step];
  out[0] = g[0];
  out[out_step] = (even + odd) * (-1.0f / 1.5f);
  out[2 * out_step] = (even - odd) * (-1.0f / 1.5f);
  out[3 * out_step] = (even2 + odd2) * (1.0f / 6.0f);
  out[4 * out_step] = (even2 - odd2) * (1.0f / 6.0f);
  out[5 * out_step] = g[2 * step];
}

// U of one input and kLanes outputs, whose weights are g [9, kLanes].
LEAF void weight_tile(const float* g, int64_t pitch, float* u) {
  Floats from[9], half[18], found[36];
  for (int i = 0; i < 9; ++i) from[i] = load(g + i * kLanes);
  for (int i = 0; i < 3; ++i) weight_axis(from + i, half + i, 3, 3);
  for (int i = 0; i < 6; ++i) weight_axis(half + 3 * i, found + 6 * i, 1, 1);
  for (int i = 0; i < 36; ++i) store(u + i * pitch, found[i]);
}

// The outputs of one tile in kLanes channels.
HERE void output_tile(const float* m, int64_t pitch, Floats bias, Floats least, const Tile& tile,
                      int64_t c) {
  Floats half[24];
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
    Floats row[6];
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) row[j] = load(m + (6 * j + i) * pitch);
    output_axis(row, half + i, 1, 6);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Floats y[4];
    output_axis(half + 6 * i, y, 1, 1);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) y[j] = at_least(least, y[j] + bias);
    if (i >= tile.rows) return;
    float* const to = tile.out + i * tile.row_pitch + c;
    store(to, y[0]);
    if (tile.columns > 1) store(to + tile.pitch, y[1]);
    if (tile.columns > 2) store(to + 2 * tile.pitch, y[2]);
    if (tile.columns > 3) store(to + 3 * tile.pitch, y[3]);
  }
}

// The outputs of `count` tiles in `width` channels.
LEAF void output_tiles(const float* m, int64_t width, const Tile* tiles, int64_t count,
                       const float* bias, float least) {
  for (int64_t t = 0; t < count; ++t) {
    const Tile tile = tiles[t];
    for (int64_t c = 0; c < width; c += kLanes) {
      output_tile(m + t * width + c, kTiles * width, load(bias + c), least - Floats{}, tile,
                  c);
    }
  }
}

// M = V U for kRows tiles and kWide registers of channels.
template <int kRows, int kWide>
HERE void multiply(const float* v, const float* u, int64_t depth, float* m) {
  Floats sum[kRows][kWide] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats right[kWide];
    for (int j = 0; j < kWide; ++j) right[j] = load(u + (k * kWide + j) * kLanes);
    for (int i = 0; i < kRows; ++i) {
      const Floats left = v[i * depth + k] - Floats{};
      for (int j = 0; j < kWide; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kWide; ++j) store(m + (i * kWide + j) * kLanes, sum[i][j]);
  }
}

template <int kRows, int kWide>
LEAF void multiply_all(const float* v, const float* u, int64_t depth, int64_t count, float* m) {
  constexpr int64_t kPitch = kWide * kLanes;
  for (int i = 0; i < 36; ++i) {
    for (int64_t row = 0; row < count; row += kRows) {
      multiply<kRows, kWide>(v + (i * kTiles + row) * depth, u + i * depth * kPitch, depth,
                             m + (i * kTiles + row) * kPitch);
    }
  }
}

constexpr Kernels kKernels{kLanes,
                           input_tile,
                           weight_tile,
                           output_tiles,
                           {multiply_all<kSums, 1>, multiply_all<kSums / 2, 2>,
                            multiply_all<kSums / 3, 3>, multiply_all<kSums / 4, 4>}};
