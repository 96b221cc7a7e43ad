// The noise standard over a vector type: Philox4x32-10 and the formula that turns its words into
// normals. Each isa_*.cpp defines `struct Isa` in an anonymous namespace, then includes this file
// and step.inl.
//
// Isa offers: kLanes floats per vector F, kLanes 32-bit integers per vector I (also seen as kLanes
// / 2 64-bit lanes), and the operations used below. Every one of them rounds once, to nearest even,
// so that all instruction sets give the same bits: contraction of a * b + c is switched off by the
// compiler flags and written as fma where it is meant. The layout of the loops changes no bits:
// kGroups (see below), and in step.inl kNormalsInRegisters and kDeinterleavesBFloat16. Beside Isa
// stands Pair, of two vectors F.

// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The
// counter is (element / 4, step, stream, 0).
//
// A 32-bit word lives in the low half of a 64-bit lane; the upper half is garbage that no later
// operation reads, since the multiplication takes low halves only. That saves the masking and
// packing of products.

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kCounters = Isa::kLanes / 2;  // counters per vector of 64-bit lanes
constexpr int kGroup = 4 * kCounters;       // normals per group: a Pair
constexpr int kGroups = Isa::kGroups;       // groups computed side by side, to hide latencies
constexpr int64_t kBlock = kGroups * kGroup;

// Counters are placed in the lanes so that the interleaving at the end of box_muller, which puts
// even lanes first, leaves them in sequence.
constexpr int counter_in(int lane) { return lane / 2 + lane % 2 * (kCounters / 2); }
constexpr int lane_of(int counter) { return counter % (kCounters / 2) * 2 + counter / (kCounters / 2); }

// A product's high word is used in its own round and its low word in the next one, as c0 or c2 of
// its result: one xor with (low, high) keys serves both. So each round has one key vector, for the
// product of M1 in odd rounds and that of M0 in even ones.
struct Philox {
  // With step and stream fixed, half of the first two rounds does not depend on the element: it is
  // in the keys of rounds 0 to 2.
  I key[10];
  I m0, m1;
  I product;       // M0 * counter of each lane
  I product_step;  // M0 * kCounters

  Philox(int64_t seed, int64_t first_counter, uint32_t step, uint32_t stream) {
    uint32_t keys[2][11] = {};  // of c0 and c2, in every round
    for (int round = 0; round < 10; ++round) {
      keys[0][round] = static_cast<uint32_t>(seed) + round * kPhiloxW0;
      keys[1][round] = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32) + round * kPhiloxW1;
    }
    const uint64_t p1 = uint64_t{kPhiloxM1} * stream;                       // round 0: M1 * c2
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ step ^ keys[0][0];  //          new c0, the same for every element
    const uint64_t p0 = uint64_t{kPhiloxM0} * c0;                           // round 1: M0 * c0
    keys[0][1] ^= static_cast<uint32_t>(p1);                                //          c1 of round 0
    keys[1][1] ^= static_cast<uint32_t>(p0 >> 32);
    keys[1][2] ^= static_cast<uint32_t>(p0);                                // round 2: c3 of round 1
    keys[0][10] = 0;                                                        // the low word of the last product is a result
    for (int round = 0; round < 10; ++round) {
      const uint32_t* own = keys[round % 2 == 0];
      key[round] = Isa::set64(uint64_t{own[round]} << 32 | own[round + 1]);
    }
    m0 = Isa::set64(kPhiloxM0);
    m1 = Isa::set64(kPhiloxM1);
    alignas(64) uint64_t lanes[kCounters];
    for (int lane = 0; lane < kCounters; ++lane)
      lanes[lane] = uint64_t{kPhiloxM0} * static_cast<uint32_t>(first_counter + counter_in(lane));
    product = Isa::load_i(lanes);
    product_step = Isa::set64(uint64_t{kPhiloxM0} * kCounters);
  }
};

struct PhiloxState {
  I c0, c1, c2, c3;
};

// Rounds 0 and 1, for the next group of counters.
DDIM_INLINE PhiloxState philox_start(Philox& p) {
  const I p0 = Isa::xor_(p.product, p.key[0]);
  p.product = Isa::add64(p.product, p.product_step);
  const I p1 = Isa::xor_(Isa::mul32(p.m1, Isa::high_to_low(p0)), p.key[1]);
  return {Isa::high_to_low(p1), p1, p0, p0 /* not read: round 2 has it in its key */};
}

template <int round>
DDIM_INLINE void philox_round(const Philox& p, PhiloxState& s) {
  I p0 = Isa::mul32(p.m0, s.c0), p1 = Isa::mul32(p.m1, s.c2);
  I& keyed = round % 2 == 0 ? p0 : p1;
  keyed = Isa::xor_(keyed, p.key[round]);
  s.c0 = Isa::xor_(Isa::high_to_low(p1), s.c1);
  s.c2 = round == 2 ? Isa::high_to_low(p0) : Isa::xor_(Isa::high_to_low(p0), s.c3);
  s.c1 = p1;
  s.c3 = p0;
}

// Round 9, which packs its words: first a vector of words (0, 2) of all counters, for radii, then
// one of words (1, 3), for angles.
DDIM_INLINE void philox_finish(const Philox& p, const PhiloxState& s, uint32_t* words) {
  const I p0 = Isa::mul32(p.m0, s.c0), p1 = Isa::xor_(Isa::mul32(p.m1, s.c2), p.key[9]);
  const I high = Isa::low_and_high(Isa::high_to_low(p1), p0);
  const I before = Isa::low_and_high(s.c1, Isa::low_to_high(s.c3));
  Isa::store_i(words, Isa::xor_(high, before));
  Isa::store_i(words + Isa::kLanes, Isa::low_and_high(p1, Isa::low_to_high(p0)));
}

// The words-to-normals formula of the noise standard; kernels/noise.py is its definition and holds
// the same constants.
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

// Box-Muller on n groups side by side, a stage at a time: a polynomial is one long chain, and
// processors look only so far ahead.
template <int n>
DDIM_INLINE void box_muller(const uint32_t* words, Pair (&z)[n]) {
  I sign[n];
  F f[n], exponent[n], radius[n], t[n], y[n], sine[n], cosine[n];
  DDIM_EACH(n) {
    const I word = Isa::load_i(words + k * kGroup), magnitude = Isa::and_(word, Isa::set32(0x7fffffff));
    sign[k] = Isa::xor_(word, magnitude);
    const F u = Isa::fma(Isa::to_float(magnitude), Isa::set(0x1p-31f), Isa::set(0x1p-32f));
    // u = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2))
    const I bits = Isa::bits(u);
    const I e = Isa::and_(Isa::sub32(bits, Isa::set32(0x3f3504f3)), Isa::set32(static_cast<int32_t>(0xff800000)));
    f[k] = Isa::sub(Isa::floats(Isa::sub32(bits, e)), Isa::set(1.0f));
    exponent[k] = Isa::mul(Isa::to_float(e), Isa::set(kMinusTwoLogOf2 * 0x1p-23f));
  }
  DDIM_EACH(n) {
    t[k] = Isa::mul(Isa::to_float(Isa::load_i(words + k * kGroup + Isa::kLanes)), Isa::set(0x1p-31f));
    y[k] = Isa::mul(t[k], t[k]);
  }
  DDIM_EACH(n) radius[k] = Isa::sqrt(Isa::fma(horner(kMinusTwoLog, f[k]), f[k], exponent[k]));
  DDIM_EACH(n) sine[k] = Isa::mul(horner(kSine, y[k]), t[k]);
  DDIM_EACH(n) cosine[k] = Isa::floats(Isa::xor_(Isa::bits(horner(kCosine, y[k])), sign[k]));
  DDIM_EACH(n) {
    const F even = Isa::mul(radius[k], cosine[k]), odd = Isa::mul(radius[k], sine[k]);
    z[k] = {Isa::interleave_low(even, odd), Isa::interleave_high(even, odd)};
  }
}

// Out of line, for remainders.
__attribute__((noinline)) Pair normals_of_group(const uint32_t* words) {
  Pair pair[1];
  box_muller(words, pair);
  return pair[0];
}

DDIM_INLINE void store_pair(float* z, Pair pair) {
  Isa::store(z, pair.a);
  Isa::store(z + Isa::kLanes, pair.b);
}

// The words of n elements, n rounded up to whole blocks, in the order in which box_muller reads
// them. p is then at the next element.
__attribute__((noinline)) void make_words(Philox& p, uint32_t* words, int64_t n) {
  Philox q = p;  // a local copy: stores cannot alias it
  for (; n > 0; n -= kBlock, words += kBlock) {
    PhiloxState s[kGroups];
    DDIM_EACH(kGroups) s[k] = philox_start(q);
    DDIM_EACH(kGroups) philox_round<2>(q, s[k]);
    DDIM_EACH(kGroups) philox_round<3>(q, s[k]);
    DDIM_EACH(kGroups) philox_round<4>(q, s[k]);
    DDIM_EACH(kGroups) philox_round<5>(q, s[k]);
    DDIM_EACH(kGroups) philox_round<6>(q, s[k]);
    DDIM_EACH(kGroups) philox_round<7>(q, s[k]);
    DDIM_EACH(kGroups) philox_round<8>(q, s[k]);
    DDIM_EACH(kGroups) philox_finish(q, s[k], words + k * kGroup);
  }
  p.product = q.product;
}

// Words go through memory, in tiles that stay in the first-level cache. One loop for both Philox
// and Box-Muller was slower: sixteen registers are too few.
constexpr int64_t kTile = 2048;

// The normals of n elements, at most a tile. p is then at the next element.
inline void make_normals(Philox& p, float* z, int64_t n) {
  alignas(64) uint32_t words[kTile];
  make_words(p, words, n);
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    Pair pairs[kGroups];
    box_muller(words + i, pairs);
    DDIM_EACH(kGroups) store_pair(z + i + k * kGroup, pairs[k]);
  }
  for (; i < n; i += kGroup) {
    float last[kGroup];
    store_pair(last, normals_of_group(words + i));
    std::memcpy(z + i, last, std::min<int64_t>(kGroup, n - i) * sizeof(float));
  }
}

void normals(int64_t seed, int64_t first_element, uint32_t step, uint32_t stream, float* z, int64_t n) {
  Philox p(seed, first_element / 4, step, stream);
  for (int64_t begin = 0; begin < n; begin += kTile) make_normals(p, z + begin, std::min(kTile, n - begin));
}

void words(int64_t seed, int64_t first_counter, uint32_t step, uint32_t stream, uint32_t* out, int64_t n) {
  Philox p(seed, first_counter, step, stream);
  for (int64_t counter = 0; counter < n; counter += kBlock / 4) {
    alignas(64) uint32_t block[kBlock];
    make_words(p, block, kBlock);
    for (int64_t i = 0; i < std::min<int64_t>(kBlock / 4, n - counter); ++i) {
      const uint32_t* group = block + i / kCounters * kGroup;
      const int lane = lane_of(i % kCounters);
      for (int word = 0; word < 4; ++word) out[4 * (counter + i) + word] = group[word % 2 * Isa::kLanes + 2 * lane + word / 2];
    }
  }
}
