// AVX-512 intrinsics as pairs of AVX2 ones, so that csrc/isa_avx512.cpp can be compiled and run on a processor without AVX-512. Included before
// it; only what it uses is here, each written from Intel's description of the instruction, half by half.
#pragma once
#include <immintrin.h>

struct Floats512 {
  __m256 low, high;
};
struct Integers512 {
  __m256i low, high;
};

#define DDIM_SHIM static inline __attribute__((always_inline))
#define DDIM_HALVES_F(name, op, ...) \
  DDIM_SHIM Floats512 name(Floats512 a, Floats512 b) { return {op(a.low, b.low __VA_ARGS__), op(a.high, b.high __VA_ARGS__)}; }
#define DDIM_HALVES_I(name, op) \
  DDIM_SHIM Integers512 name(Integers512 a, Integers512 b) { return {op(a.low, b.low), op(a.high, b.high)}; }

DDIM_HALVES_F(shim_add_ps, _mm256_add_ps)
DDIM_HALVES_F(shim_mul_ps, _mm256_mul_ps)
DDIM_HALVES_F(shim_div_ps, _mm256_div_ps)
DDIM_HALVES_F(shim_sub_ps, _mm256_sub_ps)
DDIM_HALVES_F(shim_min_ps, _mm256_min_ps)
DDIM_HALVES_F(shim_max_ps, _mm256_max_ps)
DDIM_HALVES_F(shim_unpacklo_ps, _mm256_unpacklo_ps)  // within each 128-bit lane, as VUNPCKLPS does at every width
DDIM_HALVES_F(shim_unpackhi_ps, _mm256_unpackhi_ps)
DDIM_HALVES_I(shim_and_si512, _mm256_and_si256)
DDIM_HALVES_I(shim_or_si512, _mm256_or_si256)
DDIM_HALVES_I(shim_xor_si512, _mm256_xor_si256)
DDIM_HALVES_I(shim_add_epi32, _mm256_add_epi32)
DDIM_HALVES_I(shim_add_epi64, _mm256_add_epi64)
DDIM_HALVES_I(shim_sub_epi32, _mm256_sub_epi32)
DDIM_HALVES_I(shim_mul_epu32, _mm256_mul_epu32)

DDIM_SHIM Floats512 shim_fmadd_ps(Floats512 a, Floats512 b, Floats512 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
DDIM_SHIM Floats512 shim_sqrt_ps(Floats512 a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
DDIM_SHIM Floats512 shim_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
DDIM_SHIM Integers512 shim_set1_epi32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
DDIM_SHIM Integers512 shim_set1_epi64(long long x) { return {_mm256_set1_epi64x(x), _mm256_set1_epi64x(x)}; }
DDIM_SHIM Floats512 shim_loadu_ps(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
DDIM_SHIM void shim_storeu_ps(float* p, Floats512 a) {
  _mm256_storeu_ps(p, a.low);
  _mm256_storeu_ps(p + 8, a.high);
}
DDIM_SHIM Integers512 shim_loadu_si512(const void* p) {
  const auto* halves = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
DDIM_SHIM void shim_storeu_si512(void* p, Integers512 a) {
  auto* halves = static_cast<__m256i*>(p);
  _mm256_storeu_si256(halves, a.low);
  _mm256_storeu_si256(halves + 1, a.high);
}
DDIM_SHIM Floats512 shim_castsi512_ps(Integers512 a) { return {_mm256_castsi256_ps(a.low), _mm256_castsi256_ps(a.high)}; }
DDIM_SHIM Integers512 shim_castps_si512(Floats512 a) { return {_mm256_castps_si256(a.low), _mm256_castps_si256(a.high)}; }
DDIM_SHIM Floats512 shim_cvtepi32_ps(Integers512 a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
#define shim_slli_epi32(a, n) (Integers512{_mm256_slli_epi32((a).low, n), _mm256_slli_epi32((a).high, n)})
#define shim_srli_epi32(a, n) (Integers512{_mm256_srli_epi32((a).low, n), _mm256_srli_epi32((a).high, n)})
#define shim_slli_epi64(a, n) (Integers512{_mm256_slli_epi64((a).low, n), _mm256_slli_epi64((a).high, n)})
#define shim_srli_epi64(a, n) (Integers512{_mm256_srli_epi64((a).low, n), _mm256_srli_epi64((a).high, n)})

// Bit i of the mask chooses element i of b.
DDIM_SHIM __m256i shim_mask_to_lanes(unsigned mask) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
}
DDIM_SHIM Integers512 shim_mask_blend_epi32(unsigned mask, Integers512 a, Integers512 b) {
  return {_mm256_blendv_epi8(a.low, b.low, shim_mask_to_lanes(mask & 0xff)), _mm256_blendv_epi8(a.high, b.high, shim_mask_to_lanes(mask >> 8))};
}
#define shim_cmp_ps_mask(a, b, predicate)                                            \
  static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps((a).low, (b).low, predicate)) | \
                        _mm256_movemask_ps(_mm256_cmp_ps((a).high, (b).high, predicate)) << 8)

DDIM_SHIM Floats512 shim_cvtph_ps(__m256i a) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
}
#define shim_cvtps_ph(a, rounding)                                                                          \
  _mm256_set_m128i(_mm256_cvtps_ph((a).high, (rounding)&_MM_FROUND_TO_NEAREST_INT), \
                   _mm256_cvtps_ph((a).low, (rounding)&_MM_FROUND_TO_NEAREST_INT))
DDIM_SHIM Integers512 shim_cvtepu16_epi32(__m256i a) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))};
}
DDIM_SHIM __m256i shim_cvtepi32_epi16(Integers512 a) {  // keeps the low half of each element
  alignas(32) int words[16];
  alignas(32) short halves[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), a.low);
  _mm256_store_si256(reinterpret_cast<__m256i*>(words) + 1, a.high);
  for (int i = 0; i < 16; ++i) halves[i] = static_cast<short>(words[i]);
  return _mm256_load_si256(reinterpret_cast<__m256i*>(halves));
}

#define __m512 Floats512
#define __m512i Integers512
#define _mm512_add_epi32 shim_add_epi32
#define _mm512_add_epi64 shim_add_epi64
#define _mm512_add_ps shim_add_ps
#define _mm512_and_si512 shim_and_si512
#define _mm512_castps_si512 shim_castps_si512
#define _mm512_castsi512_ps shim_castsi512_ps
#define _mm512_cmp_ps_mask shim_cmp_ps_mask
#define _mm512_cvtepi32_epi16 shim_cvtepi32_epi16
#define _mm512_cvtepi32_ps shim_cvtepi32_ps
#define _mm512_cvtepu16_epi32 shim_cvtepu16_epi32
#define _mm512_cvtph_ps shim_cvtph_ps
#define _mm512_cvtps_ph shim_cvtps_ph
#define _mm512_div_ps shim_div_ps
#define _mm512_fmadd_ps shim_fmadd_ps
#define _mm512_loadu_ps shim_loadu_ps
#define _mm512_loadu_si512 shim_loadu_si512
#define _mm512_mask_blend_epi32 shim_mask_blend_epi32
#define _mm512_max_ps shim_max_ps
#define _mm512_min_ps shim_min_ps
#define _mm512_mul_epu32 shim_mul_epu32
#define _mm512_mul_ps shim_mul_ps
#define _mm512_or_si512 shim_or_si512
#define _mm512_set1_epi32 shim_set1_epi32
#define _mm512_set1_epi64 shim_set1_epi64
#define _mm512_set1_ps shim_set1_ps
#define _mm512_slli_epi32 shim_slli_epi32
#define _mm512_slli_epi64 shim_slli_epi64
#define _mm512_sqrt_ps shim_sqrt_ps
#define _mm512_srli_epi32 shim_srli_epi32
#define _mm512_srli_epi64 shim_srli_epi64
#define _mm512_storeu_ps shim_storeu_ps
#define _mm512_storeu_si512 shim_storeu_si512
#define _mm512_sub_epi32 shim_sub_epi32
#define _mm512_sub_ps shim_sub_ps
#define _mm512_unpackhi_ps shim_unpackhi_ps
#define _mm512_unpacklo_ps shim_unpacklo_ps
#define _mm512_xor_si512 shim_xor_si512
