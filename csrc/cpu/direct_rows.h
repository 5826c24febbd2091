// Direct convolution of few channels, a row of results at a time, compiled by instruction_sets.h.
// Weights are [kernel rows, taps, width], where taps are the columns and channels of a kernel row.

// kColumns results of one row in kWide registers of channels; `from` is where the first one's
// kernel begins, `step` floats before the next one's.
template <int kColumns, int kWide>
HERE void columns(const Rows& s, int64_t step, const float* from, const float* weight,
                  const float* bias, float least, float* to, int64_t pitch) {
  Floats sum[kColumns][kWide];
  for (int i = 0; i < kColumns; ++i) {
    for (int j = 0; j < kWide; ++j) sum[i][j] = load(bias + j * kLanes);
  }
  for (int64_t h = 0; h < s.kernel; ++h) {
    const float* const row = from + h * s.pitch;
    for (int64_t t = 0; t < s.taps; ++t) {
      // Told where they lie, the compiler keeps factors for the next tap in registers that sums need.
      const float* seen = row + t;
      asm("" : "+r"(seen));
      Floats right[kWide];
      for (int j = 0; j < kWide; ++j) right[j] = load(weight + j * kLanes);
      weight += kWide * kLanes;
      for (int i = 0; i < kColumns; ++i) {
        const Floats left = seen[i * step] - Floats{};
        for (int j = 0; j < kWide; ++j) sum[i][j] = fma(left, right[j], sum[i][j]);
      }
    }
  }
  for (int i = 0; i < kColumns; ++i) {
    for (int j = 0; j < kWide; ++j) {
      store(to + i * pitch + j * kLanes, at_least(least - Floats{}, sum[i][j]));
    }
  }
}

// A row of `count` results; the last full group begins early, so that it ends with the row.
template <int kColumns, int kWide>
HERE void row_of(const Rows& s, int64_t step, const float* from, int64_t count,
                 const float* weight, const float* bias, float least, float* to, int64_t pitch) {
  int64_t i = 0;
  if (count >= kColumns) {
    for (; i < count; i += kColumns) {
      const int64_t first = std::min(i, count - kColumns);
      columns<kColumns, kWide>(s, step, from + first * step, weight, bias, least,
                               to + first * pitch, pitch);
    }
  }
  for (; i < count; ++i) {
    columns<1, kWide>(s, step, from + i * step, weight, bias, least, to + i * pitch, pitch);
  }
}

// The steps of gray and coloured images are constants, of which addresses are made for nothing.
template <int kColumns, int kWide>
LEAF void results(const Rows& s, const float* from, int64_t count, const float* weight,
                  const float* bias, float least, float* to, int64_t pitch) {
  const auto with = [&](int64_t step) __attribute__((target(SALIENCY_FAST_ARCH), always_inline)) {
    row_of<kColumns, kWide>(s, step, from, count, weight, bias, least, to, pitch);
  };
  switch (s.step) {
    case 1:
      return with(1);
    case 2:
      return with(2);
    case 3:
      return with(3);
    case 6:
      return with(6);
    default:
      return with(s.step);
  }
}

// The maxima of a row of windows over `count` rows of results [in, channels].
LEAF void maxima(const Axis& axis, const float* const* rows, int64_t count, int64_t channels,
                 float* to) {
  for (int64_t w = 0; w < axis.out; ++w) {
    const Range seen = axis.places(w);
    const int64_t first = (axis.start(w) + seen.first) * channels;
    const int64_t last = (axis.start(w) + seen.last) * channels;
    for (int64_t c = 0; c < channels; c += kLanes) {
      Floats best = load(rows[0] + first + c);
      for (int64_t h = 0; h < count; ++h) {
        for (int64_t place = first; place < last; place += channels) {
          const Floats value = load(rows[h] + place + c);
          // NaN stays, as in PyTorch.
          best = (value > best) | (value != value) ? value : best;
        }
      }
      store(to + w * channels + c, best);
    }
  }
}

constexpr Kernels kKernels{
    kLanes,
    {results<kSums * 2 / 3, 1>, results<kSums / 3, 2>, results<kSums / 3, 3>, results<kSums / 4, 4>},
    maxima};
