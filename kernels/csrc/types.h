// Half-precision numbers as they are in memory, and their conversions bit by bit for processors
// that have no instruction for it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

// The kernels are many small functions that must be inlined into their loops; the compiler's own
// limits would stop short of that.
#define DDIM_INLINE inline __attribute__((always_inline))

// A statement for k = 0 .. n - 1, unrolled: the same operation on vectors side by side.
#define DDIM_EACH(n) _Pragma("GCC unroll 8") for (int k = 0; k < (n); ++k)

namespace ddim {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace {

DDIM_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

DDIM_INLINE float float_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

[[maybe_unused]] inline float to_float32(BFloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

[[maybe_unused]] inline BFloat16 to_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  if (std::isnan(x)) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

[[maybe_unused]] inline float to_float32(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) {  // infinity, or a NaN, which becomes quiet
    return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00 ? 0x400000 : 0));
  }
  // The exponents' biases differ by 112: a product with 2^112 moves from one to the other,
  // subnormal numbers included, without rounding.
  return float_from_bits(sign | float_bits(float_from_bits(magnitude << 13) * 0x1p112f));
}

[[maybe_unused]] inline Float16 to_float16(float x) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00 | (magnitude >> 13 & 0x3ff))};
  if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {
    // Below 2^-14 the result is subnormal. Adding 2^-1 * 2^0 puts its last bit, 2^-24, at the last
    // bit of a float32: the addition rounds.
    return {static_cast<uint16_t>(sign | (float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000))};
  }
  return {static_cast<uint16_t>(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}

}  // namespace
}  // namespace ddim
