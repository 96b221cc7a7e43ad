// Plain C++, for any processor: vectors are arrays of four, which the compiler vectorizes if it
// can. It gives the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "convolution.h"
#include "density.h"
#include "normalization.h"
#include "step.h"
#include "types.h"

namespace ddim {
namespace {

struct F {
  float v[4];
};
struct I {
  uint64_t v[2];
};

// One vector after the other.
struct Pair {
  F a, b;
};

struct Isa {
  static constexpr int kLanes = 4;
  static constexpr bool kNormalsInRegisters = false;
  static constexpr bool kDeinterleavesBFloat16 = false;
  static constexpr int kGroups = 1;
  static constexpr int kAccumulators = 24;

  template <typename Function>
  static DDIM_INLINE F each(Function f) {
    return {{f(0), f(1), f(2), f(3)}};
  }

  static DDIM_INLINE F set(float x) { return {{x, x, x, x}}; }
  static DDIM_INLINE F fma(F a, F b, F c) {
    return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
  }
  static DDIM_INLINE F mul(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static DDIM_INLINE F add(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static DDIM_INLINE F sub(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static DDIM_INLINE F div(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static DDIM_INLINE F min(F a, F b) {  // as on x86: the second operand if either is NaN
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static DDIM_INLINE F max(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static DDIM_INLINE F sqrt(F a) {
    return each([&](int i) { return std::sqrt(a.v[i]); });
  }
  static DDIM_INLINE F where_at_most(F a, F bound, F value) {  // 0 elsewhere
    return each([&](int i) { return a.v[i] <= bound.v[i] ? value.v[i] : 0.0f; });
  }
  static DDIM_INLINE F interleave_low(F a, F b) { return {{a.v[0], b.v[0], a.v[1], b.v[1]}}; }
  static DDIM_INLINE F interleave_high(F a, F b) { return {{a.v[2], b.v[2], a.v[3], b.v[3]}}; }

  static DDIM_INLINE F load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static DDIM_INLINE F load(const Float16* p) {
    return each([&](int i) { return to_float32(p[i]); });
  }
  static DDIM_INLINE F load(const BFloat16* p) {
    return each([&](int i) { return to_float32(p[i]); });
  }
  static DDIM_INLINE void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
  static DDIM_INLINE void store(Float16* p, F a) {
    for (int i = 0; i < 4; ++i) p[i] = to_float16(a.v[i]);
  }
  static DDIM_INLINE void store(BFloat16* p, F a) {
    for (int i = 0; i < 4; ++i) p[i] = to_bfloat16(a.v[i]);
  }

  static DDIM_INLINE I bits(F a) {
    I r;
    uint32_t w[4];
    std::memcpy(w, a.v, sizeof w);
    for (int i = 0; i < 2; ++i) r.v[i] = uint64_t{w[2 * i + 1]} << 32 | w[2 * i];
    return r;
  }
  static DDIM_INLINE uint32_t word(I a, int i) { return static_cast<uint32_t>(a.v[i / 2] >> (i % 2 * 32)); }
  static DDIM_INLINE F floats(I a) {
    return each([&](int i) {
      const uint32_t w = word(a, i);
      float x;
      std::memcpy(&x, &w, sizeof x);
      return x;
    });
  }
  static DDIM_INLINE F to_float(I a) {
    return each([&](int i) { return static_cast<float>(static_cast<int32_t>(word(a, i))); });
  }
  static DDIM_INLINE I set64(uint64_t x) { return {{x, x}}; }
  static DDIM_INLINE I set32(int32_t x) { return set64(uint64_t{static_cast<uint32_t>(x)} << 32 | static_cast<uint32_t>(x)); }
  static DDIM_INLINE I load_i(const uint64_t* p) { return {{p[0], p[1]}}; }
  // 64-bit lanes from and to 32-bit words, low half first, for any byte order of the machine.
  static DDIM_INLINE I load_i(const uint32_t* p) { return {{uint64_t{p[1]} << 32 | p[0], uint64_t{p[3]} << 32 | p[2]}}; }
  static DDIM_INLINE void store_i(uint32_t* p, I a) {
    for (int i = 0; i < 4; ++i) p[i] = word(a, i);
  }
  static DDIM_INLINE I and_(I a, I b) { return {{a.v[0] & b.v[0], a.v[1] & b.v[1]}}; }
  static DDIM_INLINE I xor_(I a, I b) { return {{a.v[0] ^ b.v[0], a.v[1] ^ b.v[1]}}; }
  static DDIM_INLINE I sub32(I a, I b) {
    I r;
    for (int i = 0; i < 2; ++i)
      r.v[i] = uint64_t{word(a, 2 * i + 1) - word(b, 2 * i + 1)} << 32 | (word(a, 2 * i) - word(b, 2 * i));
    return r;
  }
  static DDIM_INLINE I shift_left(I a, int n) {
    I r;
    for (int i = 0; i < 2; ++i) r.v[i] = uint64_t{word(a, 2 * i + 1) << n} << 32 | (word(a, 2 * i) << n);
    return r;
  }
  static DDIM_INLINE I add64(I a, I b) { return {{a.v[0] + b.v[0], a.v[1] + b.v[1]}}; }
  static DDIM_INLINE uint64_t product(uint64_t a, uint64_t b) {
    return uint64_t{static_cast<uint32_t>(a)} * static_cast<uint32_t>(b);
  }
  static DDIM_INLINE I mul32(I a, I b) { return {{product(a.v[0], b.v[0]), product(a.v[1], b.v[1])}}; }
  static DDIM_INLINE I high_to_low(I a) { return {{a.v[0] >> 32, a.v[1] >> 32}}; }
  static DDIM_INLINE I low_to_high(I a) { return {{a.v[0] << 32, a.v[1] << 32}}; }
  static DDIM_INLINE uint64_t join(uint64_t low, uint64_t high) { return (high >> 32 << 32) | static_cast<uint32_t>(low); }
  static DDIM_INLINE I low_and_high(I low, I high) { return {{join(low.v[0], high.v[0]), join(low.v[1], high.v[1])}}; }
};

#include "noise.inl"
#include "step.inl"
#include "convolution.inl"
#include "normalization.inl"

}  // namespace

const Kernels kPortable = {"portable", step, normals, words, triad, convolve, normalize, silu, density, density_backward};

}  // namespace ddim
