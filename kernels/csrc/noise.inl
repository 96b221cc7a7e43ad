// The noise standard over a vector type: Philox4x32-10 and the formula that turns its words into normals.
// Each isa_*.cpp defines `struct Isa` in an anonymous namespace, then includes this file and step.inl.
//
// Isa offers: kLanes floats per vector F, kLanes 32-bit integers per vector I (also seen as kLanes / 2 64-bit lanes), and the
// operations used below. Every one of them rounds once, to nearest even, so that all instruction sets give the same bits:
// contraction of a * b + c is switched off by the compiler flags and written as fma where it is meant.

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The counter is (element / 4, step, stream, 0).
//
// A 32-bit word lives in the low half of a 64-bit lane; the upper half is garbage that no later operation reads, since the
// multiplication takes low halves only. That saves the masking and packing of products.

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kCounters = Isa::kLanes / 2;         // counters per vector of 64-bit lanes
constexpr int kGroup = 4 * kCounters;              // normals per group: two vectors of floats
constexpr int kGroups = 2;                         // groups computed side by side, to hide the latency of the multiplications

// Words (0, 2) and (1, 3) of a group's counters, interleaved: one vector of radius words and one of angle words.
struct Words {
  I radius, angle;
};

struct Philox {
  // With step and stream fixed, half of the first two rounds does not depend on the element and is done once, here.
  I k0[10], k1[10];  // round keys, with the constants of rounds 0 to 2 folded in
  I final_key;       // (k0, k1) of the last round, interleaved
  I m0, m1;
  I product;         // M0 * counter of each lane
  I product_step;    // M0 * kCounters

  Philox(int64_t seed, int64_t first_counter, uint32_t step, uint32_t stream) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
    uint32_t keys0[10], keys1[10];
    for (int round = 0; round < 10; ++round) {
      keys0[round] = key0 + round * kPhiloxW0;
      keys1[round] = key1 + round * kPhiloxW1;
    }
    const uint64_t p1 = uint64_t{kPhiloxM1} * stream;                       // round 0: M1 * c2
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ step ^ keys0[0];  //          new c0, the same for every element
    const uint64_t p0 = uint64_t{kPhiloxM0} * c0;                           // round 1: M0 * c0
    keys0[1] ^= static_cast<uint32_t>(p1);                                  //          c1 of round 0
    keys1[1] ^= static_cast<uint32_t>(p0 >> 32);
    keys1[2] ^= static_cast<uint32_t>(p0);                                  // round 2: c3 of round 1
    for (int round = 0; round < 10; ++round) {
      k0[round] = Isa::set64(keys0[round]);
      k1[round] = Isa::set64(keys1[round]);
    }
    final_key = Isa::set64(uint64_t{keys1[9]} << 32 | keys0[9]);
    m0 = Isa::set64(kPhiloxM0);
    m1 = Isa::set64(kPhiloxM1);
    // Lane order: the interleaving of box_muller puts even lanes first, so that counters come out in sequence.
    alignas(64) uint64_t lanes[kCounters];
    for (int lane = 0; lane < kCounters; ++lane) {
      const int place = lane / 2 + (lane % 2) * (kCounters / 2);
      lanes[lane] = uint64_t{kPhiloxM0} * static_cast<uint32_t>(first_counter + place);
    }
    product = Isa::load_i(lanes);
    product_step = Isa::set64(uint64_t{kPhiloxM0} * kCounters);
  }
};

struct PhiloxState {
  I c0, c1, c2, c3;
};

// Rounds 0 and 1, for the next group of counters.
DDIM_INLINE PhiloxState philox_start(Philox& p) {
  const I c2 = Isa::xor_(Isa::high_to_low(p.product), p.k1[0]);
  const I c3 = p.product;
  p.product = Isa::add64(p.product, p.product_step);
  const I p1 = Isa::mul32(p.m1, c2);
  return {Isa::xor_(Isa::high_to_low(p1), p.k0[1]), p1, Isa::xor_(c3, p.k1[1]), p1 /* folded into k1[2]: not read */};
}

template <int round>
DDIM_INLINE void philox_round(const Philox& p, PhiloxState& s) {
  const I p0 = Isa::mul32(p.m0, s.c0), p1 = Isa::mul32(p.m1, s.c2);
  s.c0 = Isa::xor_(Isa::high_to_low(p1), Isa::xor_(s.c1, p.k0[round]));
  s.c2 = Isa::xor_(Isa::high_to_low(p0), round == 2 ? p.k1[2] : Isa::xor_(s.c3, p.k1[round]));
  s.c1 = p1;
  s.c3 = p0;
}

// Round 9, which leaves its words packed.
DDIM_INLINE Words philox_finish(const Philox& p, const PhiloxState& s) {
  const I p0 = Isa::mul32(p.m0, s.c0), p1 = Isa::mul32(p.m1, s.c2);
  const I high = Isa::low_and_high(Isa::high_to_low(p1), p0);
  const I before = Isa::low_and_high(s.c1, Isa::low_to_high(s.c3));
  return {Isa::xor_(high, Isa::xor_(before, p.final_key)), Isa::low_and_high(p1, Isa::low_to_high(p0))};
}

// The words-to-normals formula of the noise standard; kernels/noise.py is its definition and holds the same constants.
constexpr float kMinusTwoLog[] = {-0x1.fffffep+0f, 0x1.000078p+0f, -0x1.5559e6p-1f, 0x1.ff63acp-2f,
                                  -0x1.978df6p-2f, 0x1.613e32p-2f, -0x1.4c371ep-2f, 0x1.9e32c4p-3f};
constexpr float kSine[] = {0x1.921fb6p+0f, -0x1.4abbfp-1f, 0x1.466f3ep-4f, -0x1.32e974p-8f, 0x1.4701dep-13f};
constexpr float kCosine[] = {0x1.fffffep-1f, -0x1.3bd39ep+0f, 0x1.03bc76p-2f, -0x1.54e836p-6f, 0x1.c117a6p-11f};
constexpr float kMinusTwoLogOf2 = -0x1.62e43p+0f;

template <int n>
DDIM_INLINE F horner(const float (&coefficients)[n], F x) {
  F sum = Isa::set(coefficients[n - 1]);
  _Pragma("GCC unroll 16") for (int i = n - 2; i >= 0; --i) sum = Isa::fma(sum, x, Isa::set(coefficients[i]));
  return sum;
}

// Box-Muller on one group, cut into stages so that it can be woven into the Philox rounds of the next one: the two use different ports.
struct BoxMuller {
  I sign, angle;
  F f, exponent, radius, sine, cosine, y, t;

  template <int stage>
  DDIM_INLINE void run(const Words& words) {
    if constexpr (stage == 0) {
      const I magnitude = Isa::and_(words.radius, Isa::set32(0x7fffffff));
      sign = Isa::xor_(words.radius, magnitude);
      const F u = Isa::fma(Isa::to_float(magnitude), Isa::set(0x1p-31f), Isa::set(0x1p-32f));
      // u = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
      const I bits = Isa::bits(u);
      const I k = Isa::and_(Isa::sub32(bits, Isa::set32(0x3f3504f3)), Isa::set32(static_cast<int32_t>(0xff800000)));
      f = Isa::sub(Isa::floats(Isa::sub32(bits, k)), Isa::set(1.0f));
      exponent = Isa::mul(Isa::to_float(k), Isa::set(kMinusTwoLogOf2 * 0x1p-23f));
    } else if constexpr (stage == 1) {
      t = Isa::mul(Isa::to_float(words.angle), Isa::set(0x1p-31f));
      y = Isa::mul(t, t);
    } else if constexpr (stage == 2) {
      radius = horner(kMinusTwoLog, f);
    } else if constexpr (stage == 3) {
      radius = Isa::sqrt(Isa::fma(radius, f, exponent));
    } else if constexpr (stage == 4) {
      sine = horner(kSine, y);
    } else if constexpr (stage == 5) {
      cosine = horner(kCosine, y);
    } else if constexpr (stage == 6) {
      sine = Isa::mul(sine, t);
      cosine = Isa::floats(Isa::xor_(Isa::bits(cosine), sign));
    }
  }

  DDIM_INLINE void store(float* z) const {
    const F even = Isa::mul(radius, cosine), odd = Isa::mul(radius, sine);
    Isa::store(z, Isa::interleave_low(even, odd));
    Isa::store(z + Isa::kLanes, Isa::interleave_high(even, odd));
  }
};

// Writes whole blocks of kGroups groups: `blocks` * kGroups * kGroup normals. Philox of one block runs beside Box-Muller of the block before.
inline void normal_blocks(Philox& p, float* z, int64_t blocks) {
  Words words[kGroups];
  PhiloxState state[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    state[g] = philox_start(p);
    philox_round<2>(p, state[g]);
    philox_round<3>(p, state[g]);
    philox_round<4>(p, state[g]);
    philox_round<5>(p, state[g]);
    philox_round<6>(p, state[g]);
    philox_round<7>(p, state[g]);
    philox_round<8>(p, state[g]);
    words[g] = philox_finish(p, state[g]);
  }
  for (int64_t block = 1; block < blocks; ++block) {
    BoxMuller normal[kGroups];
#define DDIM_GROUPS(action) \
  _Pragma("GCC unroll 4") for (int g = 0; g < kGroups; ++g) action;
    DDIM_GROUPS(state[g] = philox_start(p))
    DDIM_GROUPS(normal[g].template run<0>(words[g]))
    DDIM_GROUPS(philox_round<2>(p, state[g]))
    DDIM_GROUPS(normal[g].template run<1>(words[g]))
    DDIM_GROUPS(philox_round<3>(p, state[g]))
    DDIM_GROUPS(normal[g].template run<2>(words[g]))
    DDIM_GROUPS(philox_round<4>(p, state[g]))
    DDIM_GROUPS(normal[g].template run<3>(words[g]))
    DDIM_GROUPS(philox_round<5>(p, state[g]))
    DDIM_GROUPS(normal[g].template run<4>(words[g]))
    DDIM_GROUPS(philox_round<6>(p, state[g]))
    DDIM_GROUPS(normal[g].template run<5>(words[g]))
    DDIM_GROUPS(philox_round<7>(p, state[g]))
    DDIM_GROUPS(normal[g].template run<6>(words[g]))
    DDIM_GROUPS(philox_round<8>(p, state[g]))
    DDIM_GROUPS(normal[g].store(z + g * kGroup))
    DDIM_GROUPS(words[g] = philox_finish(p, state[g]))
    z += kGroups * kGroup;
  }
  for (int g = 0; g < kGroups; ++g) {
    BoxMuller normal;
    normal.template run<0>(words[g]);
    normal.template run<1>(words[g]);
    normal.template run<2>(words[g]);
    normal.template run<3>(words[g]);
    normal.template run<4>(words[g]);
    normal.template run<5>(words[g]);
    normal.template run<6>(words[g]);
    normal.store(z + g * kGroup);
  }
#undef DDIM_GROUPS
}

constexpr int64_t kBlock = kGroups * kGroup;

void normals(int64_t seed, int64_t first_element, uint32_t step, uint32_t stream, float* z, int64_t n) {
  Philox p(seed, first_element / 4, step, stream);
  const int64_t whole = n / kBlock;
  if (whole > 0) normal_blocks(p, z, whole);
  if (const int64_t rest = n - whole * kBlock; rest > 0) {
    alignas(64) float block[kBlock];
    normal_blocks(p, block, 1);
    std::memcpy(z + whole * kBlock, block, rest * sizeof(float));
  }
}

void words(int64_t seed, int64_t first_counter, uint32_t step, uint32_t stream, uint32_t* out, int64_t n) {
  Philox p(seed, first_counter, step, stream);
  for (int64_t counter = 0; counter < n; counter += kCounters) {
    PhiloxState s = philox_start(p);
    philox_round<2>(p, s);
    philox_round<3>(p, s);
    philox_round<4>(p, s);
    philox_round<5>(p, s);
    philox_round<6>(p, s);
    philox_round<7>(p, s);
    philox_round<8>(p, s);
    const Words group = philox_finish(p, s);
    alignas(64) uint32_t radius[Isa::kLanes], angle[Isa::kLanes];
    Isa::store_i(radius, group.radius);
    Isa::store_i(angle, group.angle);
    for (int lane = 0; lane < kCounters; ++lane) {
      const int64_t place = counter + lane / 2 + (lane % 2) * (kCounters / 2);
      if (place >= n) continue;
      out[4 * place + 0] = radius[2 * lane];
      out[4 * place + 1] = angle[2 * lane];
      out[4 * place + 2] = radius[2 * lane + 1];
      out[4 * place + 3] = angle[2 * lane + 1];
    }
  }
}

