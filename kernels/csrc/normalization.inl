// Group normalization of channels-last pictures, and SiLU. Every sum is made in one written order,
// whatever the instruction set and however slabs are divided among threads.

// x / (1 + exp(-x)) = max(x, 0) - m exp(-m) / (1 + exp(-m)) with m = |x|, which neither overflows nor
// cancels. exp(-m) = 2^-k exp(-r) with r = m - k log(2) in +-log(2) / 2 (Cody and Waite): log(2) in
// two parts, of which the first has few bits, and exp(-r) = 1 + r p(r) with a polynomial p, whose 1 is
// added last. 2^-k is multiplied by 2^64, since m exp(-m) still has all its bits where 2^-k would be
// subnormal. tools/silu_polynomial.py makes the coefficients.
constexpr float kExpOfMinus[] = {-0x1.000000p+0f, 0x1.fffffcp-2f, -0x1.555492p-3f, 0x1.5558b4p-5f, -0x1.12399ep-7f, 0x1.6a492cp-10f};
constexpr float kLog2OfE = 0x1.715476p+0f, kLog2High = 0x1.63p-1f, kLog2Low = -0x1.bd0106p-13f;
constexpr float kSiluEnd = 128;  // beyond it, m exp(-m) is 0
// Added to a small number, it leaves the nearest integer, less 64, in the lowest bits.
constexpr float kRoundAndScale = 0x1.8p23f - 64;

DDIM_INLINE F silu(F x) {
  const F one = Isa::set(1.0f), magnitude = Isa::floats(Isa::and_(Isa::bits(x), Isa::set32(0x7fffffff)));
  const F m = Isa::min(magnitude, Isa::set(kSiluEnd));  // of NaN: any number
  const F rounded = Isa::fma(m, Isa::set(kLog2OfE), Isa::set(kRoundAndScale));
  const F k = Isa::sub(rounded, Isa::set(kRoundAndScale));
  const F r = Isa::fma(k, Isa::set(-kLog2Low), Isa::fma(k, Isa::set(-kLog2High), m));
  const F rest = Isa::mul(horner(kExpOfMinus, r), r);  // exp(-r) - 1
  const F power = Isa::floats(Isa::sub32(Isa::bits(one), Isa::shift_left(Isa::bits(rounded), 23)));  // 2^(64 - k)
  const F above = Isa::mul(Isa::fma(m, rest, m), power), below = Isa::fma(Isa::mul(power, Isa::set(0x1p-64f)), Isa::add(rest, one), one);
  // Zero first: of two zeros, and of a NaN, max takes the second.
  return Isa::fma(Isa::div(above, below), Isa::set(-0x1p-64f), Isa::max(Isa::set(0.0f), x));
}

void silu(const float* input, float* output, int64_t n) {
  int64_t i = 0;
  for (; i + Isa::kLanes <= n; i += Isa::kLanes) Isa::store(output + i, silu(Isa::load(input + i)));
  if (i == n) return;
  float last[Isa::kLanes] = {};
  std::memcpy(last, input + i, (n - i) * sizeof(float));
  Isa::store(last, silu(Isa::load(last)));
  std::memcpy(output + i, last, (n - i) * sizeof(float));
}

// Pixels are summed in runs of this many, in float32; the sums of runs are added in float64.
constexpr int64_t kRun = 32;
constexpr int kLineVectors = kNormalizedGrain / Isa::kLanes;  // of kNormalizedGrain channels
// Slabs are normalized together as far as they stay in the second-level cache from pass to pass.
constexpr int64_t kCachedFloats = (512 << 10) / sizeof(float);

// The sums of a line of channels over a run of pixels: those with even numbers, plus those with odd
// ones.
struct LineSums {
  F even[kLineVectors], odd[kLineVectors];

  DDIM_INLINE LineSums() {
    DDIM_EACH(kLineVectors) even[k] = odd[k] = Isa::set(0.0f);
  }
  DDIM_INLINE void add_to(double* totals) const {
    float sums[kNormalizedGrain];
    DDIM_EACH(kLineVectors) Isa::store(sums + k * Isa::kLanes, Isa::add(even[k], odd[k]));
    for (int64_t i = 0; i < kNormalizedGrain; ++i) totals[i] += double{sums[i]};
  }
};

// Calls add(line, half, vector, x) for each vector of a run of n pixels of kNormalizedGrain channels.
template <typename Add>
DDIM_INLINE void for_run(const float* x, int64_t stride, int64_t n, Add add) {
  int64_t i = 0;
  for (; i + 2 <= n; i += 2, x += 2 * stride) {
    DDIM_EACH(kLineVectors) add(&LineSums::even, k, Isa::load(x + k * Isa::kLanes));
    DDIM_EACH(kLineVectors) add(&LineSums::odd, k, Isa::load(x + stride + k * Isa::kLanes));
  }
  if (i == n) return;
  DDIM_EACH(kLineVectors) add(&LineSums::even, k, Isa::load(x + k * Isa::kLanes));
}

// Adjacent groups of channels of one sample: `channels` of them at `input`, pixels `n.channels` apart.
// Two passes, corrected (Chan, Golub and LeVeque, "Algorithms for computing the sample variance",
// 1983): deviations are measured from a mean rounded to float32, and their own mean is taken off, so
// that neither a large mean nor the first pass's errors are felt.
inline void normalize_groups(const Normalization& n, int64_t sample, int64_t first, int64_t channels, float* scratch) {
  auto *sums = reinterpret_cast<double*>(scratch), *squares = sums + channels;
  float *mean = scratch + 4 * channels, *factor = mean + channels, *offset = factor + channels;
  const int64_t begin = sample * n.pixels * n.channels + first, size = n.channels / n.groups;
  const float* input = n.input + begin;
  float* output = n.output + begin;
  const double count = static_cast<double>(n.pixels * size);

  std::fill_n(sums, 2 * channels, 0.0);
  for (int64_t p = 0; p < n.pixels; p += kRun) {
    for (int64_t c = 0; c < channels; c += kNormalizedGrain) {
      LineSums values;
      for_run(input + p * n.channels + c, n.channels, std::min(kRun, n.pixels - p),
              [&](auto half, int k, F x) { (values.*half)[k] = Isa::add((values.*half)[k], x); });
      values.add_to(sums + c);
    }
  }
  for (int64_t g = 0; g < channels; g += size) {
    double sum = 0;
    for (int64_t c = g; c < g + size; ++c) sum += sums[c];
    std::fill_n(mean + g, size, static_cast<float>(sum / count));
  }

  std::fill_n(sums, channels, 0.0);
  for (int64_t p = 0; p < n.pixels; p += kRun) {
    for (int64_t c = 0; c < channels; c += kNormalizedGrain) {
      LineSums deviations, of_squares;
      F from[kLineVectors];
      DDIM_EACH(kLineVectors) from[k] = Isa::load(mean + c + k * Isa::kLanes);
      for_run(input + p * n.channels + c, n.channels, std::min(kRun, n.pixels - p), [&](auto half, int k, F x) {
        const F deviation = Isa::sub(x, from[k]);
        (deviations.*half)[k] = Isa::add((deviations.*half)[k], deviation);
        (of_squares.*half)[k] = Isa::fma(deviation, deviation, (of_squares.*half)[k]);
      });
      deviations.add_to(sums + c);
      of_squares.add_to(squares + c);
    }
  }
  for (int64_t g = 0; g < channels; g += size) {
    double sum = 0, square = 0;
    for (int64_t c = g; c < g + size; ++c) sum += sums[c], square += squares[c];
    const double rest = sum / count;
    double variance = square / count - rest * rest;
    if (variance < 0) variance = 0;  // NaN stays
    const double reciprocal = 1 / std::sqrt(variance + n.eps);
    for (int64_t c = g; c < g + size; ++c) {
      const int64_t channel = first + c;
      double by = n.weight ? reciprocal * double{n.weight[channel]} : reciprocal, plus = n.bias ? double{n.bias[channel]} : 0;
      if (n.scale) by *= 1 + double{n.scale[sample * n.scale_stride + channel]}, plus *= 1 + double{n.scale[sample * n.scale_stride + channel]};
      if (n.shift) plus += double{n.shift[sample * n.shift_stride + channel]};
      factor[c] = static_cast<float>(by);
      offset[c] = static_cast<float>(plus - rest * by);
    }
  }

  const auto write = [&](auto then) {
    for (int64_t p = 0; p < n.pixels; p += kRun) {
      for (int64_t c = 0; c < channels; c += kNormalizedGrain) {
        F from[kLineVectors], by[kLineVectors], plus[kLineVectors];
        DDIM_EACH(kLineVectors) {
          const int64_t at = c + k * Isa::kLanes;
          from[k] = Isa::load(mean + at), by[k] = Isa::load(factor + at), plus[k] = Isa::load(offset + at);
        }
        const int64_t end = std::min(n.pixels, p + kRun);
        for (int64_t i = p * n.channels + c; i < end * n.channels; i += n.channels) {
          DDIM_EACH(kLineVectors) {
            const F deviation = Isa::sub(Isa::load(input + i + k * Isa::kLanes), from[k]);
            Isa::store(output + i + k * Isa::kLanes, then(Isa::fma(deviation, by[k], plus[k])));
          }
        }
      }
    }
  };
  if (n.silu) {
    write([](F x) { return silu(x); });
  } else {
    write([](F x) { return x; });
  }
}

void normalize(const Normalization& n, int64_t begin, int64_t end, float* scratch) {
  const int64_t slab = slab_channels(n), per_sample = n.channels / slab;
  const int64_t cached = std::max<int64_t>(1, kCachedFloats / (n.pixels * slab));
  while (begin < end) {
    const int64_t sample = begin / per_sample, first = begin % per_sample;
    const int64_t slabs = std::min({per_sample - first, end - begin, cached});
    normalize_groups(n, sample, first * slab, slabs * slab, scratch);
    begin += slabs;
  }
}
