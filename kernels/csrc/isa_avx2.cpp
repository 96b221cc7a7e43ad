// AVX2 with FMA and F16C: x86-64 since Haswell (2013) and Zen (2017).
#include <immintrin.h>

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

using F = __m256;
using I = __m256i;

// One vector after the other; or deinterleaved: the elements with even numbers, and those with odd
// ones.
struct Pair {
  F a, b;
};

struct Isa {
  static constexpr int kLanes = 8;
  static constexpr bool kNormalsInRegisters = true;
  static constexpr int kGroups = 2;
  static constexpr int kAccumulators = 12;

  static DDIM_INLINE F set(float x) { return _mm256_set1_ps(x); }
  static DDIM_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static DDIM_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static DDIM_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static DDIM_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static DDIM_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static DDIM_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static DDIM_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static DDIM_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static DDIM_INLINE F where_at_most(F a, F bound, F value) { return _mm256_and_ps(_mm256_cmp_ps(a, bound, _CMP_LE_OQ), value); }
  static DDIM_INLINE F interleave_low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
  static DDIM_INLINE F interleave_high(F a, F b) { return _mm256_unpackhi_ps(a, b); }

  static DDIM_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static DDIM_INLINE F load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static DDIM_INLINE F load(const BFloat16* p) {
    // Each half of the vector moves four of the eight numbers into the upper halves of its
    // elements; -1 puts zero in the lower ones.
    const I both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const I places = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13,
                                      -1, -1, 14, 15);
    return floats(_mm256_shuffle_epi8(both, places));
  }
  static DDIM_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static DDIM_INLINE void store(Float16* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  // Any number, with the elements in order. Rounds to nearest even on the lower 16 bits; a NaN
  // becomes a quiet NaN.
  static DDIM_INLINE void store(BFloat16* p, F a) {
    const I x = bits(a), upper = _mm256_srli_epi32(x, 16);
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(_mm256_and_si256(upper, set32(1)), set32(0x7fff))), 16);
    const I quiet = _mm256_or_si256(upper, set32(0x40));
    const I chosen = _mm256_blendv_epi8(rounded, quiet, bits(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1)));
  }

  // bfloat16 is deinterleaved into two vectors. An even and an odd element fill 32 bits of memory
  // together, the odd one in the upper half, where it already has its float32 value. Nothing has to
  // cross the lanes of the vector, on loading or storing.
  static constexpr bool kDeinterleavesBFloat16 = true;

  static DDIM_INLINE Pair load_deinterleaved(const BFloat16* p) {
    const I both = load_i(p);
    return {floats(lower_to_upper(both)), floats(_mm256_and_si256(both, set32(static_cast<int32_t>(0xffff0000))))};
  }
  static DDIM_INLINE Pair deinterleave(Pair pair) {
    const F low = _mm256_insertf128_ps(pair.a, _mm256_castps256_ps128(pair.b), 1);
    const F high = _mm256_blend_ps(_mm256_castps128_ps256(_mm256_extractf128_ps(pair.a, 1)), pair.b, 0xf0);
    return {_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xdd)};
  }
  // Rounds to nearest even, sixteen numbers at a time: half a unit is added, which leaves zero in
  // the lower half where the number was in the middle between two, and there the last bit is
  // cleared. A NaN stays one: its lower half is zero (see Row), so that nothing carries.
  static DDIM_INLINE void store_deinterleaved(BFloat16* p, Pair pair) {
    const I half = set32(0x8000);
    const I even = _mm256_add_epi32(bits(pair.a), half), odd = _mm256_add_epi32(bits(pair.b), half);
    const I upper = _mm256_blend_epi16(upper_to_lower(even), odd, 0xaa), lower = _mm256_blend_epi16(even, lower_to_upper(odd), 0xaa);
    const I middle = _mm256_subs_epu16(_mm256_set1_epi16(1), lower);  // 1 where lower is zero, and 0 elsewhere
    store_i(p, _mm256_andnot_si256(middle, upper));
  }
  // Byte shuffles rather than shifts: they run on more ports.
  static DDIM_INLINE I lower_to_upper(I a) {
    const I places = _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, 0, 1, -1, -1, 4, 5, -1, -1, 8, 9, -1, -1, 12, 13));
    return _mm256_shuffle_epi8(a, places);
  }
  static DDIM_INLINE I upper_to_lower(I a) {
    const I places = _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 3, -1, -1, 6, 7, -1, -1, 10, 11, -1, -1, 14, 15, -1, -1));
    return _mm256_shuffle_epi8(a, places);
  }

  static DDIM_INLINE I bits(F a) { return _mm256_castps_si256(a); }
  static DDIM_INLINE F floats(I a) { return _mm256_castsi256_ps(a); }
  static DDIM_INLINE F to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static DDIM_INLINE I set32(int32_t x) { return _mm256_set1_epi32(x); }
  static DDIM_INLINE I set64(uint64_t x) { return _mm256_set1_epi64x(static_cast<int64_t>(x)); }
  static DDIM_INLINE I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
  static DDIM_INLINE void store_i(void* p, I a) { _mm256_storeu_si256(static_cast<I*>(p), a); }
  static DDIM_INLINE I and_(I a, I b) { return _mm256_and_si256(a, b); }
  static DDIM_INLINE I xor_(I a, I b) { return _mm256_xor_si256(a, b); }
  static DDIM_INLINE I sub32(I a, I b) { return _mm256_sub_epi32(a, b); }
  static DDIM_INLINE I shift_left(I a, int n) { return _mm256_slli_epi32(a, n); }
  static DDIM_INLINE I add64(I a, I b) { return _mm256_add_epi64(a, b); }
  static DDIM_INLINE I mul32(I a, I b) { return _mm256_mul_epu32(a, b); }
  // Shuffles rather than 64-bit shifts: the other half may hold anything, and shuffles run on more
  // ports.
  static DDIM_INLINE I high_to_low(I a) { return _mm256_shuffle_epi32(a, 0xf5); }
  static DDIM_INLINE I low_to_high(I a) { return _mm256_shuffle_epi32(a, 0xa0); }
  static DDIM_INLINE I low_and_high(I low, I high) { return _mm256_blend_epi32(low, high, 0xaa); }
};

#include "noise.inl"
#include "step.inl"
#include "convolution.inl"
#include "normalization.inl"

}  // namespace

const Kernels kAvx2 = {"avx2", step, normals, words, triad, convolve, normalize, silu, density, density_backward};

}  // namespace ddim
