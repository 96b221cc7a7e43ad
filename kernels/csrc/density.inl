// The log-density of a step, the divergence of two, and their gradients, over the same vector type.
// All of it works on tiles in the first-level cache that are widened to float32, and computes means
// by the loops of step.inl: so their bits are those of the step.

// x_prev of a block, from its mean and noise that is generated here, with the squares of what was
// stored: what most steps need, in one loop.
template <typename State>
class NoisyBlock {
 public:
  static void run(Philox& philox, float noise, const float* mean, State* x_prev, int64_t n, Squares& squares) {
    alignas(64) uint32_t words[kSumBlock];
    make_words(philox, words, n);
    int64_t i = 0;
    for (; i + Squares::kStep <= n; i += Squares::kStep) group(noise, words + i, mean + i, x_prev + i, squares);
    if (i == n) return;
    alignas(64) uint32_t last_words[Squares::kStep] = {};
    alignas(64) float last_mean[Squares::kStep] = {};
    alignas(64) State last[Squares::kStep];
    std::memcpy(last_words, words + i, (n - i + kBlock - 1) / kBlock * kBlock * sizeof(uint32_t));
    std::memcpy(last_mean, mean + i, (n - i) * sizeof(float));
    Squares unread;
    group(noise, last_words, last_mean, last, unread);
    std::memcpy(x_prev + i, last, (n - i) * sizeof(State));
    alignas(64) float stored[kWideTile];
    for (int64_t k = 0; k < Squares::kStep; k += Isa::kLanes) Isa::store(stored + k, Isa::load(last + k));
    alignas(64) float padded[kWideTile];
    std::memcpy(padded, last_mean, sizeof last_mean);
    squares.add(stored, padded, nullptr, n - i);
  }

 private:
  static DDIM_INLINE F store_and_load(State* out, F value) {
    Isa::store(out, value);
    if constexpr (std::is_same_v<State, float>) return value;
    return Isa::load(out);
  }

  static DDIM_INLINE void group(float noise, const uint32_t* words, const float* mean, State* x_prev, Squares& squares) {
    constexpr int w = Isa::kLanes;
    const F scale = Isa::set(noise);
    F deviation[4];
    for (int first = 0; first < 4; first += 2 * kGroups) {
      Pair z[kGroups];
      box_muller(words + first * w, z);
      DDIM_EACH(kGroups) {
        const int a = first + 2 * k, b = a + 1;
        const F mean_a = Isa::load(mean + a * w), mean_b = Isa::load(mean + b * w);
        deviation[a] = Isa::sub(store_and_load(x_prev + a * w, Isa::fma(scale, z[k].a, mean_a)), mean_a);
        deviation[b] = Isa::sub(store_and_load(x_prev + b * w, Isa::fma(scale, z[k].b, mean_b)), mean_b);
      }
    }
    squares.add(deviation);
  }
};

// The mean of a block, without noise, and x0 of it where that is wanted.
void predict_block(const Step& step, Range block, float* mean) {
  alignas(64) float x[kWideTile], m[kWideTile], uncond[kWideTile], x0[kWideTile];
  for (int64_t begin = block.begin; begin < block.end; begin += kWideTile) {
    const Range tile{block.sample, begin, std::min(block.end, begin + kWideTile)};
    const int64_t n = tile.end - tile.begin;
    Step wide = widened(step, tile, x, m, uncond);
    wide.x_prev = {mean + begin - block.begin, n, kFloat32};
    if (step.x0.data) wide.x0 = {x0, n, kFloat32};
    choose_guidance<float, float>(wide, {0, 0, n});
    if (step.x0.data) narrow(x0, step.x0, tile);
  }
}

void noisy_block(const Step& step, Range block, Philox& philox, Squares& squares) {
  alignas(64) float mean[kSumBlock];
  const int64_t n = block.end - block.begin;
  predict_block(step, block, mean);
  switch (step.x_prev.dtype) {
    case kFloat16: return NoisyBlock<Float16>::run(philox, step.c.noise, mean, at<Float16>(step.x_prev, block), n, squares);
    case kBFloat16: return NoisyBlock<BFloat16>::run(philox, step.c.noise, mean, at<BFloat16>(step.x_prev, block), n, squares);
    default: return NoisyBlock<float>::run(philox, step.c.noise, mean, at<float>(step.x_prev, block), n, squares);
  }
}

// A step's blocks, each with its sum of (x_prev - mean)^2.
void step_and_sum(const Step& step, Range range) {
  const bool simple = step.seeds && !step.mask.data && !step.history.data && !step.noise.data;
  Philox philox(simple ? step.seeds[range.sample] : 0, range.begin / 4, step.noise_step, step.noise_stream);
  for (int64_t begin = range.begin; begin < range.end; begin += kSumBlock) {
    Squares squares;
    const Range block{range.sample, begin, std::min(range.end, begin + kSumBlock)};
    if (simple) {
      noisy_block(step, block, philox, squares);
    } else {
      for (int64_t tile = block.begin; tile < block.end; tile += kWideTile)
        step_on_tile(step, {range.sample, tile, std::min(block.end, tile + kWideTile)}, &squares);
    }
    step.block_sums[range.sample * step.blocks + begin / kSumBlock] = squares.sum();
  }
}

// A tile of a density: its inputs, its mean and what that is compared with.
struct DensityTile {
  alignas(64) float x[kWideTile], m[kWideTile], uncond[kWideTile], mask[kWideTile], mean[kWideTile], value[kWideTile];
  Step wide;

  DensityTile(const Density& d, Range tile) {
    if (d.reference.data) {
      Step other = d.step;
      other.model_output = d.reference;
      other.model_output_uncond = d.reference_uncond;
      predict(other, tile, value);
    } else {
      widen(d.step.x_prev, tile, value);
    }
    predict(d.step, tile, mean);
    if (d.step.mask.data) widen(d.step.mask, tile, mask);
  }

 private:
  void predict(const Step& step, Range tile, float* out) {
    const int64_t n = tile.end - tile.begin;
    wide = widened(step, tile, x, m, uncond);
    wide.x_prev = {out, n, kFloat32};
    choose_guidance<float, float>(wide, {0, 0, n});
  }
};

void density(const Density& d, Range range) {
  for (int64_t block = range.begin; block < range.end; block += kSumBlock) {
    Squares squares;
    const int64_t end = std::min(range.end, block + kSumBlock);
    for (int64_t begin = block; begin < end; begin += kWideTile) {
      const Range tile{range.sample, begin, std::min(end, begin + kWideTile)};
      DensityTile t(d, tile);
      squares.add(t.value, t.mean, d.step.mask.data ? t.mask : nullptr, tile.end - tile.begin);
    }
    d.step.block_sums[range.sample * d.step.blocks + block / kSumBlock] = squares.sum();
  }
}

// The gradients of a tile, in float32: factor * (value - mean) * d mean / d tensor.
template <bool kGuided, bool kClipped>
void gradients_on_tile(const Density& d, float factor, DensityTile& t, int64_t n, float* of_m, float* of_uncond, float* of_x) {
  const Coefficients& c = d.step.c;
  const auto* x = static_cast<const float*>(t.wide.x_t.data);
  const auto* m = static_cast<const float*>(t.wide.model_output.data);
  const auto* uncond = static_cast<const float*>(t.wide.model_output_uncond.data);
  const F scale = Isa::set(factor), guidance = Isa::set(d.step.guidance_scale), rest = Isa::set(1.0f - d.step.guidance_scale);
  const F bound = Isa::set(c.clip_bound);
  for (int64_t i = 0; i < n; i += Isa::kLanes) {
    F of_mean = Isa::mul(scale, Isa::sub(Isa::load(t.value + i), Isa::load(t.mean + i)));
    if (d.step.mask.data) of_mean = where_within(Isa::load(t.mask + i), Isa::set(0.0f), of_mean);
    F slope_x = Isa::set(c.fold_x), slope_m = Isa::set(c.fold_m);
    if constexpr (kClipped) {
      F guided = Isa::load(m + i);
      if constexpr (kGuided) guided = Isa::fma(guidance, Isa::sub(guided, Isa::load(uncond + i)), Isa::load(uncond + i));
      const F x0 = Isa::fma(Isa::set(c.clip_x), Isa::load(x + i), Isa::mul(Isa::set(c.clip_m), guided));
      slope_x = Isa::add(Isa::set(c.rest_x), where_within(x0, bound, Isa::set(c.clip_x)));
      slope_m = Isa::add(Isa::set(c.rest_m), where_within(x0, bound, Isa::set(c.clip_m)));
    }
    const F by_m = Isa::mul(of_mean, slope_m);
    Isa::store(of_m + i, kGuided ? Isa::mul(by_m, guidance) : by_m);
    if constexpr (kGuided) Isa::store(of_uncond + i, Isa::mul(by_m, rest));
    Isa::store(of_x + i, Isa::mul(of_mean, slope_x));
  }
}

void density_backward(const Density& d, Range range) {
  alignas(64) float of_m[kWideTile], of_uncond[kWideTile], of_x[kWideTile];
  const bool guided = d.step.model_output_uncond.data;
  const auto gradients = guided ? (d.step.clipped ? gradients_on_tile<true, true> : gradients_on_tile<true, false>)
                                : (d.step.clipped ? gradients_on_tile<false, true> : gradients_on_tile<false, false>);
  for (int64_t begin = range.begin; begin < range.end; begin += kWideTile) {
    const Range tile{range.sample, begin, std::min(range.end, begin + kWideTile)};
    DensityTile t(d, tile);
    gradients(d, d.factors[range.sample], t, tile.end - tile.begin, of_m, of_uncond, of_x);
    // Of any NaN, which narrow() does not take.
    if (d.of_model_output.data) scale_to(1.0f, of_m, d.of_model_output, tile);
    if (d.of_uncond.data) scale_to(1.0f, of_uncond, d.of_uncond, tile);
    if (d.of_x_t.data) scale_to(1.0f, of_x, d.of_x_t, tile);
  }
}
