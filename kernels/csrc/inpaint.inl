// Inpainting: the step, then the known image is blended in. Both work tile by tile in the
// first-level cache, so memory is still passed over once. Every tensor's tile is widened to float32
// first: one loop serves all types, and the result is rounded once.

constexpr int64_t kInpaintTile = 512;

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

// x_prev = mask * known + (1 - mask) * x_prev, where known is the clean image at the noise level of
// x_prev: equation 4 of the DDIM paper.
void blend(const Coefficients& c, const float* mask, const float* known_x0, const float* z, float* x_prev) {
  const F signal = Isa::set(c.known_x0), spread = Isa::set(c.known_noise), one = Isa::set(1.0f);
  for (int64_t i = 0; i < kInpaintTile; i += Isa::kLanes) {
    F known = Isa::mul(signal, Isa::load(known_x0 + i));
    if (z) known = Isa::fma(spread, Isa::load(z + i), known);
    const F weight = Isa::load(mask + i);
    Isa::store(x_prev + i, Isa::fma(weight, known, Isa::mul(Isa::sub(one, weight), Isa::load(x_prev + i))));
  }
}

void inpaint_tile(const Step& step, Range tile) {
  alignas(64) float x[kInpaintTile], m[kInpaintTile], uncond[kInpaintTile], z[kInpaintTile], x_prev[kInpaintTile], x0[kInpaintTile];
  alignas(64) float mask[kInpaintTile] = {}, known_x0[kInpaintTile] = {}, known_z[kInpaintTile] = {};
  const int64_t n = tile.end - tile.begin;
  Step wide = step;
  wide.mask = {};
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
  wide.x0 = step.x0.data ? Tensor{x0, n, kFloat32} : Tensor{};
  choose_guidance<float, float>(wide, {0, 0, n});
  const float* known_noise = step.known_noise.data || step.known_seeds ? known_z : nullptr;
  widen(step.mask, tile, mask);
  widen(step.known_x0, tile, known_x0);
  if (step.known_noise.data) widen(step.known_noise, tile, known_z);
  if (step.known_seeds) normals(step.known_seeds[tile.sample], tile.begin, step.noise_step, kKnownRegion, known_z, n);
  blend(step.c, mask, known_x0, known_noise, x_prev);
  narrow(x_prev, step.x_prev, tile);
  if (step.x0.data) narrow(x0, step.x0, tile);
}

void inpaint(const Step& step, Range range) {
  for (int64_t begin = range.begin; begin < range.end; begin += kInpaintTile)
    inpaint_tile(step, {range.sample, begin, std::min(range.end, begin + kInpaintTile)});
}
