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
void add(float factor, const float* term, float* x_prev, int64_t n) {
  if (factor == 0) return;
  const F a = Isa::set(factor);
  for (int64_t i = 0; i < n; i += Isa::kLanes) Isa::store(x_prev + i, Isa::fma(a, Isa::load(term + i), Isa::load(x_prev + i)));
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

#include "squares.inl"

// The noise and the image of the known region, blended into a tile of x_prev.
void inpaint(const Step& step, Range tile, const float* mask, float* x_prev) {
  alignas(64) float known_x0[kWideTile] = {}, known_z[kWideTile] = {};
  const int64_t n = tile.end - tile.begin;
  const float* known_noise = step.known_noise.data || step.known_seeds ? known_z : nullptr;
  widen(step.known_x0, tile, known_x0);
  if (step.known_noise.data) widen(step.known_noise, tile, known_z);
  if (step.known_seeds) normals(step.known_seeds[tile.sample], tile.begin, step.noise_step, kKnownRegion, known_z, n);
  blend(step.c, mask, known_x0, known_noise, x_prev);
}

// The last x0, one or two, added to a tile of x_prev. The first moves to where the second was.
void add_histories(const Step& step, Range tile, float* x_prev) {
  alignas(64) float last[kWideTile] = {};
  widen(step.history, tile, last);
  add(step.c.history, last, x_prev, tile.end - tile.begin);
  if (!step.history_2.data) return;
  widen(step.history_2, tile, last);
  add(step.c.history_2, last, x_prev, tile.end - tile.begin);
  copy(step.history, step.history_2, tile);
}

// A tile in float32: in the buffer, or where it is, if it is a whole one of that type.
Tensor widened(const Tensor& tensor, Range tile, float* buffer) {
  if (!tensor.data) return {};
  const int64_t n = tile.end - tile.begin;
  if (tensor.dtype == kFloat32 && n == kWideTile) return {at<float>(tensor, tile), n, kFloat32};
  widen(tensor, tile, buffer);
  return {buffer, n, kFloat32};
}

// The step on a tile with all that its loops read but the noise, and nothing that they write.
Step widened(const Step& step, Range tile, float* x, float* m, float* uncond) {
  Step wide{};
  wide.n_samples = 1;
  wide.n_elements = tile.end - tile.begin;
  wide.x_t = widened(step.x_t, tile, x);
  wide.model_output = widened(step.model_output, tile, m);
  wide.model_output_uncond = widened(step.model_output_uncond, tile, uncond);
  wide.guidance_scale = step.guidance_scale;
  wide.clipped = step.clipped;
  if (step.thresholds) wide.thresholds = step.thresholds + tile.sample;
  wide.c = step.c;
  return wide;
}

// `squares`, where given, receives what the tile adds to the step's log-density.
void step_on_tile(const Step& step, Range tile, Squares* squares) {
  alignas(64) float x[kWideTile], m[kWideTile], uncond[kWideTile], z[kWideTile], x_prev[kWideTile], x0[kWideTile];
  alignas(64) float mask[kWideTile], mean[kWideTile];
  const int64_t n = tile.end - tile.begin;
  Step wide = widened(step, tile, x, m, uncond);
  wide.noise = widened(step.noise, tile, z);
  if (step.seeds) {
    normals(step.seeds[tile.sample], tile.begin, step.noise_step, step.noise_stream, z, n);
    wide.noise = {z, n, kFloat32};
  }
  wide.x_prev = {x_prev, n, kFloat32};
  wide.x0 = step.x0.data || step.history.data ? Tensor{x0, n, kFloat32} : Tensor{};
  const Tensor noise = wide.noise;
  const bool noise_is_last = noise.data && (step.history.data || squares);  // after the histories, or what is known before it
  if (noise_is_last) wide.noise = {};
  choose_guidance<float, float>(wide, {0, 0, n});
  if (step.history.data) add_histories(step, tile, x_prev);
  if (squares) std::copy(x_prev, x_prev + n, mean);
  if (noise_is_last) {
    if (noise.data == z) std::fill(z + n, z + kWideTile, 0.0f);
    add(step.c.noise, static_cast<const float*>(noise.data), x_prev, n);
  }
  if (step.mask.data) {
    widen(step.mask, tile, mask);
    std::fill(mask + n, mask + kWideTile, 0.0f);
    inpaint(step, tile, mask, x_prev);
  }
  narrow(x_prev, step.x_prev, tile);
  if (step.x0.data) narrow(x0, step.x0, tile);
  if (step.history.data) narrow(x0, step.history, tile);
  if (!squares) return;
  widen(step.x_prev, tile, x_prev);  // as it is stored
  squares->add(x_prev, mean, step.mask.data ? mask : nullptr, n);
}

void step_by_tiles(const Step& step, Range range) {
  for (int64_t begin = range.begin; begin < range.end; begin += kWideTile)
    step_on_tile(step, {range.sample, begin, std::min(range.end, begin + kWideTile)}, nullptr);
}

// The model's next input, from x_prev as it is in memory: the bits of a pass of its own.

constexpr int64_t kInputTile = 2048;
static_assert(kInputTile % kSumBlock == 0);

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
void scale_to(float scale, const State* from, const Tensor& to, Range tile) {
  const int64_t n = tile.end - tile.begin;
  switch (to.dtype) {
    case kFloat16: return scale_as(scale, from, at<Float16>(to, tile), n);
    case kBFloat16: return scale_as(scale, from, at<BFloat16>(to, tile), n);
    default: return scale_as(scale, from, at<float>(to, tile), n);
  }
}

template <typename State>
void scale_input(const Step& step, Range tile) {
  scale_to(step.c.input_scale, at<const State>(step.x_prev, tile), step.model_input_out, tile);
}

void step(const Step& step, Range range);

void step_and_model_input(const Step& with_input, Range range) {
  Step without = with_input;
  without.model_input_out = {};
  for (int64_t begin = range.begin; begin < range.end; begin += kInputTile) {
    const Range tile{range.sample, begin, std::min(range.end, begin + kInputTile)};
    step(without, tile);
    switch (with_input.x_prev.dtype) {
      case kFloat16: scale_input<Float16>(with_input, tile); break;
      case kBFloat16: scale_input<BFloat16>(with_input, tile); break;
      default: scale_input<float>(with_input, tile);
    }
  }
}
