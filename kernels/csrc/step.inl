// The whole DDIM update in one pass over memory, over the same vector type as noise.inl, whose
// words it turns into normals on the way.

// Which columns of a clipped row are not zero. A zero column means no term, even where it would
// multiply an infinity. Leaving the term out also saves an operation where the loop is bound by
// arithmetic.
enum class Rest { kNotClipped, kX, kM, kBoth };

// The coefficients of one sample, spread over vectors.
struct Row {
  F fold_x, fold_m, noise, clip_x, clip_m, bound, minus_bound, rest_x, rest_m, x0_x, x0_m, x0_bound, minus_x0_bound, guidance, history;
  bool reads_history;

  Row(const Step& step, int64_t sample) {
    Coefficients c = step.c;
    if (step.thresholds) {
      // Dynamic thresholding (Imagen, arXiv 2205.11487): x0 = clamp(x0, -s, s) / s * x0_bound, with
      // the division folded into the coefficients.
      float scale = std::min(c.x0_bound / step.thresholds[sample], kLargestScale);  // a NaN stays one
      // Storing bfloat16 relies on NaNs whose lower half is zero: those of bfloat16 tensors and the
      // processor's own are such.
      if (std::isnan(scale)) scale = std::numeric_limits<float>::quiet_NaN();
      c.clip_x *= scale;
      c.clip_m *= scale;
      c.x0_x *= scale;
      c.x0_m *= scale;
    }
    fold_x = Isa::set(c.fold_x);
    fold_m = Isa::set(c.fold_m);
    noise = Isa::set(c.noise);
    clip_x = Isa::set(c.clip_x);
    clip_m = Isa::set(c.clip_m);
    bound = Isa::set(c.clip_bound);
    minus_bound = Isa::set(-c.clip_bound);
    rest_x = Isa::set(c.rest_x);
    rest_m = Isa::set(c.rest_m);
    x0_x = Isa::set(c.x0_x);
    x0_m = Isa::set(c.x0_m);
    x0_bound = Isa::set(c.x0_bound);
    minus_x0_bound = Isa::set(-c.x0_bound);
    guidance = Isa::set(step.guidance_scale);
    history = Isa::set(c.history);
    reads_history = c.history != 0;
  }
};

// A word of the noise standard, not yet a normal.
struct Word {
  uint32_t bits;
};

// Instead of the noise's type: there is no noise, but x0 of the previous step is read, if the row
// reads it, and replaced.
struct History;

// Noise is the type of the noise in memory: that of a tensor, or Word if the normals are generated
// here; void for no noise.
template <typename State, typename Output, bool kGuided, Rest kRest, typename Noise, bool kWriteX0>
struct Loop {
  static constexpr bool kHistory = std::is_same_v<Noise, History>;
  static constexpr bool kNoisy = !std::is_void_v<Noise> && !kHistory;
  using NoiseType = std::conditional_t<kNoisy, Noise, float>;
  struct Pointers {
    const State* x_t;
    const Output* m;
    const Output* m_uncond;
    const NoiseType* z;
    State* x_prev;
    State* x0;
    State* history;
  };

  static constexpr bool kGenerated = std::is_same_v<Noise, Word>;
  // Whether a Pair holds even and odd elements: where the state's type is faster so. Then the other
  // tensors are read so, too.
  static constexpr bool kDeinterleaved = Isa::kDeinterleavesBFloat16 && std::is_same_v<State, BFloat16>;
  using Deinterleaver = std::conditional_t<kDeinterleaved, Isa, void>;  // a name that depends on State: not every Isa can deinterleave
  static constexpr int kPair = 2 * Isa::kLanes;
  static_assert(kPair == kGroup);

  // With a history x0 is computed anyway. Whether there is an x0 tensor, too, is asked at run time:
  // one loop for both.
  static DDIM_INLINE bool wants_x0(const Pointers& p) { return !kHistory || p.x0; }

  struct Results {
    F x_prev, x0;
  };

  // x_prev of a vector of elements, and x0 if it is wanted. z: the noise, or x0 of the previous
  // step.
  static DDIM_INLINE Results compute(const Row& r, F x, F m, F uncond, F z) {
    if constexpr (kGuided) m = Isa::fma(r.guidance, Isa::sub(m, uncond), uncond);
    F sum, x0 = m;
    if constexpr (kRest == Rest::kNotClipped) {
      sum = Isa::fma(r.fold_x, x, Isa::mul(r.fold_m, m));
    } else {
      // max and min return their second operand if either is NaN: written so, a NaN passes through.
      const F scaled_x0 = Isa::fma(r.clip_x, x, Isa::mul(r.clip_m, m));
      sum = Isa::min(r.bound, Isa::max(r.minus_bound, scaled_x0));
      if constexpr (kRest != Rest::kM) sum = Isa::fma(r.rest_x, x, sum);
      if constexpr (kRest != Rest::kX) sum = Isa::fma(r.rest_m, m, sum);
    }
    if constexpr (kNoisy) sum = Isa::fma(r.noise, z, sum);
    if constexpr (kHistory) {
      if (r.reads_history) sum = Isa::fma(r.history, z, sum);
    }
    if constexpr (kWriteX0) {
      x0 = Isa::fma(r.x0_x, x, Isa::mul(r.x0_m, m));
      if constexpr (kRest != Rest::kNotClipped) x0 = Isa::min(r.x0_bound, Isa::max(r.minus_x0_bound, x0));
    }
    return {sum, x0};
  }

  static DDIM_INLINE void vector(const Pointers& p, const Row& r, int64_t i, F z) {
    const F m = Isa::load(p.m + i);
    if constexpr (kNoisy && !kGenerated) z = Isa::load(p.z + i);
    if constexpr (kHistory) z = Isa::load(p.history + i);
    const Results results = compute(r, Isa::load(p.x_t + i), m, kGuided ? Isa::load(p.m_uncond + i) : m, z);
    if (kWriteX0 && wants_x0(p)) Isa::store(p.x0 + i, results.x0);
    if constexpr (kHistory) Isa::store(p.history + i, results.x0);
    Isa::store(p.x_prev + i, results.x_prev);
  }

  static DDIM_INLINE void deinterleaved_pair(const Pointers& p, const Row& r, int64_t i, Pair z) {
    const Pair x = Deinterleaver::load_deinterleaved(p.x_t + i), m = Deinterleaver::load_deinterleaved(p.m + i);
    const Pair uncond = kGuided ? Deinterleaver::load_deinterleaved(p.m_uncond + i) : m;
    if constexpr (kGenerated) z = Deinterleaver::deinterleave(z);
    if constexpr (std::is_same_v<Noise, State>) z = Deinterleaver::load_deinterleaved(p.z + i);
    if constexpr (kHistory) z = Deinterleaver::load_deinterleaved(p.history + i);
    const Results a = compute(r, x.a, m.a, uncond.a, z.a), b = compute(r, x.b, m.b, uncond.b, z.b);
    if (kWriteX0 && wants_x0(p)) Deinterleaver::store_deinterleaved(p.x0 + i, {a.x0, b.x0});
    if constexpr (kHistory) Deinterleaver::store_deinterleaved(p.history + i, {a.x0, b.x0});
    Deinterleaver::store_deinterleaved(p.x_prev + i, {a.x_prev, b.x_prev});
  }

  template <int n>
  static DDIM_INLINE void pairs(const Pointers& p, const Row& r, int64_t i) {
    Pair z[n] = {};
    if constexpr (kGenerated && n == 1) {
      z[0] = normals_of_group(&p.z[i].bits);
    } else if constexpr (kGenerated) {
      box_muller(&p.z[i].bits, z);
    }
    DDIM_EACH(n) {
      const int64_t at = i + k * kPair;
      if constexpr (kDeinterleaved) {
        deinterleaved_pair(p, r, at, z[k]);
      } else {
        vector(p, r, at, z[k].a);
        vector(p, r, at + Isa::kLanes, z[k].b);
      }
    }
  }

  static void run(const Pointers& p, const Row& row, int64_t n) {
    const Row r = row;  // a local copy: stores cannot alias it, so it stays in registers
    int64_t i = 0;
    for (; i + kBlock <= n; i += kBlock) pairs<kGroups>(p, r, i);
    for (; i < n; i += kPair) last_pair(p, row, i, std::min<int64_t>(kPair, n - i));
  }

  // The last pair, which may be incomplete, goes through buffers: nothing is read or written beyond
  // the tensors.
  static __attribute__((noinline)) void last_pair(const Pointers& p, const Row& r, int64_t i, int64_t n) {
    alignas(64) State x_t[kPair] = {}, x_prev[kPair], x0[kPair], history[kPair] = {};
    alignas(64) Output m[kPair] = {}, m_uncond[kPair] = {};
    alignas(64) NoiseType z[kPair] = {};
    std::memcpy(x_t, p.x_t + i, n * sizeof(State));
    std::memcpy(m, p.m + i, n * sizeof(Output));
    if constexpr (kGuided) std::memcpy(m_uncond, p.m_uncond + i, n * sizeof(Output));
    // Words come in whole groups, and not in the order of the elements.
    if constexpr (kNoisy) std::memcpy(z, p.z + i, (kGenerated ? kPair : n) * sizeof(NoiseType));
    if constexpr (kHistory) std::memcpy(history, p.history + i, n * sizeof(State));
    pairs<1>({x_t, m, m_uncond, z, x_prev, wants_x0(p) ? x0 : nullptr, history}, r, 0);
    std::memcpy(p.x_prev + i, x_prev, n * sizeof(State));
    if (kWriteX0 && wants_x0(p)) std::memcpy(p.x0 + i, x0, n * sizeof(State));
    if constexpr (kHistory) std::memcpy(p.history + i, history, n * sizeof(State));
  }
};

template <typename T>
inline T* at(const Tensor& tensor, Range range) {
  return tensor.data ? static_cast<T*>(tensor.data) + range.sample * tensor.stride + range.begin : nullptr;
}

// The type in memory of noise that is generated here. With normals in registers, every loop
// contains a Box-Muller: that pays for wide vectors only.
using Generated = std::conditional_t<Isa::kNormalsInRegisters, Word, float>;

inline void generate(Philox& philox, Word* words, int64_t n) { make_words(philox, &words[0].bits, n); }
inline void generate(Philox& philox, float* z, int64_t n) { make_normals(philox, z, n); }

// Noise is generated tile by tile in the first-level cache.
template <typename L>
void run_tiles(const Step& step, Range range, typename L::Pointers p, const Row& row) {
  alignas(64) Generated tile[kTile];
  p.z = tile;
  Philox philox(step.seeds[range.sample], range.begin / 4, step.noise_step, step.noise_stream);
  const int64_t n = range.end - range.begin;
  for (int64_t begin = 0; begin < n; begin += kTile) {
    const int64_t count = std::min(kTile, n - begin);
    generate(philox, tile, count);
    L::run(p, row, count);
    p.x_t += count;
    p.m += count;
    if (p.m_uncond) p.m_uncond += count;
    if (p.x0) p.x0 += count;
    p.x_prev += count;
  }
}

template <typename State, typename Output, bool kGuided, Rest kRest, typename Noise, bool kWriteX0>
void run_range(const Step& step, Range range) {
  using L = Loop<State, Output, kGuided, kRest, Noise, kWriteX0>;
  const Row row(step, range.sample);
  typename L::Pointers p{at<const State>(step.x_t, range), at<const Output>(step.model_output, range),
                         at<const Output>(step.model_output_uncond, range), nullptr,
                         at<State>(step.x_prev, range), at<State>(step.x0, range), at<State>(step.history, range)};
  if constexpr (L::kGenerated) {
    run_tiles<L>(step, range, p, row);
  } else {
    if constexpr (L::kNoisy) p.z = at<const Noise>(step.noise, range);
    if constexpr (std::is_same_v<Noise, Generated>) {
      if (!p.z) return run_tiles<L>(step, range, p, row);
    }
    L::run(p, row, range.end - range.begin);
  }
}

// From run-time options to the one loop that has them compiled in, one option after another.
template <typename State, typename Output, bool kGuided, Rest kRest, typename Noise>
void choose_x0(const Step& step, Range range) {
  step.x0.data ? run_range<State, Output, kGuided, kRest, Noise, true>(step, range)
               : run_range<State, Output, kGuided, kRest, Noise, false>(step, range);
}

template <typename State, typename Output, bool kGuided, Rest kRest>
void choose_noise(const Step& step, Range range) {
  if (step.noise.data) return choose_x0<State, Output, kGuided, kRest, State>(step, range);
  if (step.seeds) return choose_x0<State, Output, kGuided, kRest, Generated>(step, range);
  if (step.history.data) return run_range<State, Output, kGuided, kRest, History, true>(step, range);
  return choose_x0<State, Output, kGuided, kRest, void>(step, range);
}

template <typename State, typename Output, bool kGuided>
void choose_rest(const Step& step, Range range) {
  if (!step.clipped) return choose_noise<State, Output, kGuided, Rest::kNotClipped>(step, range);
  if (step.c.rest_m == 0) return choose_noise<State, Output, kGuided, Rest::kX>(step, range);
  if (step.c.rest_x == 0) return choose_noise<State, Output, kGuided, Rest::kM>(step, range);
  return choose_noise<State, Output, kGuided, Rest::kBoth>(step, range);
}

template <typename State, typename Output>
void choose_guidance(const Step& step, Range range) {
  step.model_output_uncond.data ? choose_rest<State, Output, true>(step, range) : choose_rest<State, Output, false>(step, range);
}

#include "tiles.inl"
#include "density.inl"

// The state and the model's output have the same type, or the state is float32 and the model's
// output is half precision.
void step(const Step& step, Range range) {
  if (step.model_input_out.data) return step_and_model_input(step, range);
  if (step.block_sums) return step_and_sum(step, range);
  const bool noisy = step.noise.data || step.seeds;
  if (step.mask.data || step.history_2.data || (step.history.data && noisy)) return step_by_tiles(step, range);
  switch (step.x_t.dtype) {
    case kFloat16: return choose_guidance<Float16, Float16>(step, range);
    case kBFloat16: return choose_guidance<BFloat16, BFloat16>(step, range);
    default: break;
  }
  switch (step.model_output.dtype) {
    case kFloat16: return choose_guidance<float, Float16>(step, range);
    case kBFloat16: return choose_guidance<float, BFloat16>(step, range);
    default: return choose_guidance<float, float>(step, range);
  }
}

void triad(float* a, const float* b, const float* c, float scale, int64_t n) {
  constexpr int w = Isa::kLanes;
  const F s = Isa::set(scale);
  int64_t i = 0;
  for (; i + 4 * w <= n; i += 4 * w)
    for (int k = 0; k < 4; ++k) Isa::store(a + i + k * w, Isa::fma(Isa::load(b + i + k * w), s, Isa::load(c + i + k * w)));
  for (; i < n; ++i) a[i] = std::fma(b[i], scale, c[i]);
}
