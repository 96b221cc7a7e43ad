// What the loops of step.inl leave out, done after them: a history beside noise, a second history,
// inpainting, and the model's next input. All of it works tile by tile in the first-level cache, so
// memory is still passed over once.
//
// What changes x_prev is computed on tiles that are widened to float32 first: one loop serves all
// types, and the result is rounded once.

constexpr int64_t kWideTile = 512;

// bfloat16 is stored in pairs of vectors where Isa deinterleaves it, any other type a vector at a
// time.
template <typename T>
DDIM_INLINE void store_two_vectors(T* out, const float* in) {
  constexpr int w = Isa::kLanes;
  if constexpr (Isa::kDeinterleavesBFloat16 && std::is_same_v<T, BFloat16>) {
    using Deinterleaver = std::conditional_t<std::is_same_v<T, BFloat16>, Isa, void>;
    Deinterleaver::store_deinterleaved(out, Deinterleaver::deinterleave({Isa::load(in), Isa::load(in + w)}));
  } else {
    Isa::store(out, Isa::load(in));
    Isa::store(out + w, Isa::load(in + w));
  }
}

template <typename T>
void widen_as(const T* in, float* out, int64_t n) {
  constexpr int w = Isa::kLanes;
  int64_t i = 0;
  for (; i + w <= n; i += w) Isa::store(out + i, Isa::load(in + i));
  if (i == n) return;
  alignas(64) T rest[w] = {};
  alignas(64) float wide[w];
  std::memcpy(rest, in + i, (n - i) * sizeof(T));
  Isa::store(wide, Isa::load(rest));
  std::memcpy(out + i, wide, (n - i) * sizeof(float));
}

template <typename T>
void narrow_as(const float* in, T* out, int64_t n) {
  constexpr int pair = 2 * Isa::kLanes;
  int64_t i = 0;
  for (; i + pair <= n; i += pair) store_two_vectors(out + i, in + i);
  if (i == n) return;
  alignas(64) float rest[pair] = {};
  alignas(64) T narrow[pair];
  std::memcpy(rest, in + i, (n - i) * sizeof(float));
  store_two_vectors(narrow, rest);
  std::memcpy(out + i, narrow, (n - i) * sizeof(T));
}

void widen(const Tensor& tensor, Range tile, float* out) {
  const int64_t n = tile.end - tile.begin;
  switch (tensor.dtype) {
    case kFloat16: return widen_as(at<const Float16>(tensor, tile), out, n);
    case kBFloat16: return widen_as(at<const BFloat16>(tensor, tile), out, n);
    default: return widen_as(at<const float>(tensor, tile), out, n);
  }
}

void narrow(const float* in, const Tensor& tensor, Range tile) {
  const int64_t n = tile.end - tile.begin;
  switch (tensor.dtype) {
    case kFloat16: return narrow_as(in, at<Float16>(tensor, tile), n);
    case kBFloat16: return narrow_as(in, at<BFloat16>(tensor, tile), n);
    default: return narrow_as(in, at<float>(tensor, tile), n);
  }
}

// The elements of one tensor to another of the same type, as they are.
void copy(const Tensor& from, const Tensor& to, Range tile) {
  const int64_t n = tile.end - tile.begin;
  if (from.dtype == kFloat32) {
    std::memcpy(at<float>(to, tile), at<const float>(from, tile), n * sizeof(float));
  } else {
    std::memcpy(at<uint16_t>(to, tile), at<const uint16_t>(from, tile), n * sizeof(uint16_t));
  }
}

// x_prev += factor * term. A factor of zero means that there is no such term, whatever it holds.
void add(float factor, const float* term, float* x_prev) {
  if (factor == 0) return;
  const F a = Isa::set(factor);
  for (int64_t i = 0; i < kWideTile; i += Isa::kLanes) Isa::store(x_prev + i, Isa::fma(a, Isa::load(term + i), Isa::load(x_prev + i)));
}

// x_prev = mask * known + (1 - mask) * x_prev, where known is the clean image at the noise level of
// x_prev: equation 4 of the DDIM paper.
void blend(const Coefficients& c, const float* mask, const float* known_x0, const float* z, float* x_prev) {
  const F signal = Isa::set(c.known_x0), spread = Isa::set(c.known_noise), one = Isa::set(1.0f);
  for (int64_t i = 0; i < kWideTile; i += Isa::kLanes) {
    F known = Isa::mul(signal, Isa::load(known_x0 + i));
    if (z) known = Isa::fma(spread, Isa::load(z + i), known);
    const F weight = Isa::load(mask + i);
    Isa::store(x_prev + i, Isa::fma(weight, known, Isa::mul(Isa::sub(one, weight), Isa::load(x_prev + i))));
  }
}

// The noise and the image of the known region, blended into a tile of x_prev.
void inpaint(const Step& step, Range tile, float* x_prev) {
  alignas(64) float mask[kWideTile] = {}, known_x0[kWideTile] = {}, known_z[kWideTile] = {};
  const int64_t n = tile.end - tile.begin;
  const float* known_noise = step.known_noise.data || step.known_seeds ? known_z : nullptr;
  widen(step.mask, tile, mask);
  widen(step.known_x0, tile, known_x0);
  if (step.known_noise.data) widen(step.known_noise, tile, known_z);
  if (step.known_seeds) normals(step.known_seeds[tile.sample], tile.begin, step.noise_step, kKnownRegion, known_z, n);
  blend(step.c, mask, known_x0, known_noise, x_prev);
}

// The last x0, one or two, added to a tile of x_prev. The first moves to where the second was.
void add_histories(const Step& step, Range tile, float* x_prev) {
  alignas(64) float last[kWideTile] = {};
  widen(step.history, tile, last);
  add(step.c.history, last, x_prev);
  if (!step.history_2.data) return;
  widen(step.history_2, tile, last);
  add(step.c.history_2, last, x_prev);
  copy(step.history, step.history_2, tile);
}

void step_on_tile(const Step& step, Range tile) {
  alignas(64) float x[kWideTile], m[kWideTile], uncond[kWideTile], z[kWideTile], x_prev[kWideTile], x0[kWideTile];
  const int64_t n = tile.end - tile.begin;
  Step wide = step;
  wide.mask = wide.history = wide.history_2 = {};
  wide.seeds = nullptr;
  if (step.thresholds) wide.thresholds = step.thresholds + tile.sample;
  const auto read = [&](const Tensor& tensor, float* buffer, Tensor* out) {
    *out = {};
    if (!tensor.data) return;
    widen(tensor, tile, buffer);
    *out = {buffer, n, kFloat32};
  };
  read(step.x_t, x, &wide.x_t);
  read(step.model_output, m, &wide.model_output);
  read(step.model_output_uncond, uncond, &wide.model_output_uncond);
  read(step.noise, z, &wide.noise);
  if (step.seeds) {
    normals(step.seeds[tile.sample], tile.begin, step.noise_step, step.noise_stream, z, n);
    wide.noise = {z, n, kFloat32};
  }
  wide.x_prev = {x_prev, n, kFloat32};
  wide.x0 = step.x0.data || step.history.data ? Tensor{x0, n, kFloat32} : Tensor{};
  const bool noise_is_last = step.history.data && wide.noise.data;  // the histories are added before the noise
  if (noise_is_last) wide.noise = {};
  choose_guidance<float, float>(wide, {0, 0, n});
  if (step.history.data) add_histories(step, tile, x_prev);
  if (noise_is_last) {
    std::fill(z + n, z + kWideTile, 0.0f);
    add(step.c.noise, z, x_prev);
  }
  if (step.mask.data) inpaint(step, tile, x_prev);
  narrow(x_prev, step.x_prev, tile);
  if (step.x0.data) narrow(x0, step.x0, tile);
  if (step.history.data) narrow(x0, step.history, tile);
}

void step_by_tiles(const Step& step, Range range) {
  for (int64_t begin = range.begin; begin < range.end; begin += kWideTile)
    step_on_tile(step, {range.sample, begin, std::min(range.end, begin + kWideTile)});
}

// The model's next input, from x_prev as it is in memory: the bits of a pass of its own.

constexpr int64_t kInputTile = 2048;

template <typename State, typename Input>
void scale_as(float scale, const State* x_prev, Input* model_input, int64_t n) {
  constexpr int w = Isa::kLanes;
  const F a = Isa::set(scale);
  int64_t i = 0;
  for (; i + w <= n; i += w) Isa::store(model_input + i, Isa::mul(a, Isa::load(x_prev + i)));
  if (i == n) return;
  alignas(64) State rest[w] = {};
  alignas(64) Input scaled[w];
  std::memcpy(rest, x_prev + i, (n - i) * sizeof(State));
  Isa::store(scaled, Isa::mul(a, Isa::load(rest)));
  std::memcpy(model_input + i, scaled, (n - i) * sizeof(Input));
}

template <typename State>
void scale_from(const Step& step, Range tile) {
  const Tensor& to = step.model_input_out;
  const auto* x_prev = at<const State>(step.x_prev, tile);
  const int64_t n = tile.end - tile.begin;
  switch (to.dtype) {
    case kFloat16: return scale_as(step.c.input_scale, x_prev, at<Float16>(to, tile), n);
    case kBFloat16: return scale_as(step.c.input_scale, x_prev, at<BFloat16>(to, tile), n);
    default: return scale_as(step.c.input_scale, x_prev, at<float>(to, tile), n);
  }
}

void step(const Step& step, Range range);

void step_and_model_input(const Step& with_input, Range range) {
  Step without = with_input;
  without.model_input_out = {};
  for (int64_t begin = range.begin; begin < range.end; begin += kInputTile) {
    const Range tile{range.sample, begin, std::min(range.end, begin + kInputTile)};
    step(without, tile);
    switch (with_input.x_prev.dtype) {
      case kFloat16: scale_from<Float16>(with_input, tile); break;
      case kBFloat16: scale_from<BFloat16>(with_input, tile); break;
      default: scale_from<float>(with_input, tile);
    }
  }
}
