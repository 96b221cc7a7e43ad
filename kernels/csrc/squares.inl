// The squares of a block's deviations from the mean, summed in the order of docs/LOG_PROB.md.

// value where |x| <= bound, and 0 elsewhere, where x is NaN, too.
DDIM_INLINE F where_within(F x, F bound, F value) {
  const F magnitude = Isa::floats(Isa::and_(Isa::bits(x), Isa::set32(0x7fffffff)));
  return Isa::where_at_most(magnitude, bound, value);
}

// The sum of the squares of a block. Four consecutive elements give a quad, (x0 + x2) + (x1 + x3),
// and the 512 quads are added by halves. What a block lacks counts as zeros, which change no sum: so
// fewer quads will do.
class Squares {
 public:
  static constexpr int64_t kStep = 4 * Isa::kLanes;

  // Adds four vectors of elements that count.
  DDIM_INLINE void add(const F (&deviation)[4]) {
    F square[4];
    DDIM_EACH(4) square[k] = Isa::mul(deviation[k], deviation[k]);
    add_squares(square);
    count_ += static_cast<float>(kStep);
  }

  // Adds n elements, a whole tile but at the end of a block. What follows them in the buffers, of
  // kWideTile each, is overwritten. Elements whose mask is not 0 do not count.
  void add(float* values, float* means, float* mask, int64_t n) {
    constexpr int w = Isa::kLanes;
    const int64_t end = (n + kStep - 1) / kStep * kStep;
    std::fill(values + n, values + end, 0.0f);
    std::fill(means + n, means + end, 0.0f);
    if (mask) std::fill(mask + n, mask + end, 1.0f);
    F counted = Isa::set(0.0f);
    for (int64_t i = 0; i < end; i += kStep) {
      F square[4];
      DDIM_EACH(4) {
        F deviation = Isa::sub(Isa::load(values + i + k * w), Isa::load(means + i + k * w));
        if (mask) {
          const F weight = Isa::load(mask + i + k * w), zero = Isa::set(0.0f);
          deviation = where_within(weight, zero, deviation);
          counted = Isa::add(counted, where_within(weight, zero, Isa::set(1.0f)));
        }
        square[k] = Isa::mul(deviation, deviation);
      }
      add_squares(square);
    }
    if (!mask) {
      count_ += static_cast<float>(n);
      return;
    }
    alignas(64) float counts[w];
    Isa::store(counts, counted);
    for (float c : counts) count_ += c;  // whole numbers: exact
  }

  BlockSum sum() {
    constexpr int w = Isa::kLanes;
    int64_t size = w;
    while (size < used_) size *= 2;
    std::fill(quads_ + used_, quads_ + size, 0.0f);
    for (int64_t half = size / 2; half >= w; half /= 2)
      for (int64_t i = 0; i < half; i += w) Isa::store(quads_ + i, Isa::add(Isa::load(quads_ + i), Isa::load(quads_ + i + half)));
    // Of the four vectors that make a vector of quads, each 128-bit lane gives one quad: lane j of
    // vector k holds quad k * lanes + j.
    float last[w];
    for (int l = 0; l < w; ++l) last[l % 4 * (w / 4) + l / 4] = quads_[l];
    for (int half = w / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) last[i] += last[i + half];
    return {last[0], count_};
  }

 private:
  static_assert(kWideTile % kStep == 0 && kSumBlock % kWideTile == 0);

  // Within each 128-bit lane (a0 + a2, b0 + b2, a1 + a3, b1 + b3).
  static DDIM_INLINE F halves(F a, F b) { return Isa::add(Isa::interleave_low(a, b), Isa::interleave_high(a, b)); }

  DDIM_INLINE void add_squares(const F (&square)[4]) {
    Isa::store(quads_ + used_, halves(halves(square[0], square[2]), halves(square[1], square[3])));
    used_ += Isa::kLanes;
  }

  alignas(64) float quads_[kSumBlock / 4];
  int64_t used_ = 0;
  float count_ = 0;
};

