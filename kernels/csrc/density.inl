// The log-density of a step, the divergence of two, and their gradients, over the same vector type.
// All of it works on tiles in the first-level cache that are widened to float32, and computes means
// by the loops of step.inl: so their bits are those of the step.

// A step's blocks, each with its sum of (x_prev - mean)^2.
void step_and_sum(const Step& step, Range range) {
  for (int64_t block = range.begin; block < range.end; block += kSumBlock) {
    Squares squares;
    const int64_t end = std::min(range.end, block + kSumBlock);
    for (int64_t begin = block; begin < end; begin += kWideTile)
      step_on_tile(step, {range.sample, begin, std::min(end, begin + kWideTile)}, &squares);
    step.block_sums[range.sample * step.blocks + block / kSumBlock] = squares.sum();
  }
}

// A tile of a density: its inputs, its mean and what that is compared with.
struct DensityTile {
  alignas(64) float x[kWideTile], m[kWideTile], uncond[kWideTile], mask[kWideTile], mean[kWideTile], value[kWideTile];
  Step wide;

  DensityTile(const Density& d, Range tile) {
    const int64_t n = tile.end - tile.begin;
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
