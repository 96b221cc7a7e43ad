// AVX2 with FMA and F16C: x86-64 since Haswell (2013) and Zen (2017).
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "step.h"
#include "types.h"

namespace ddim {
namespace {

using F = __m256;
using I = __m256i;

struct Isa {
  static constexpr int kLanes = 8;

  static DDIM_INLINE F set(float x) { return _mm256_set1_ps(x); }
  static DDIM_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static DDIM_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static DDIM_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static DDIM_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static DDIM_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static DDIM_INLINE F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static DDIM_INLINE F interleave_low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
  static DDIM_INLINE F interleave_high(F a, F b) { return _mm256_unpackhi_ps(a, b); }

  static DDIM_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  static DDIM_INLINE F load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static DDIM_INLINE F load(const BFloat16* p) {
    return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
  }
  static DDIM_INLINE void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static DDIM_INLINE void store(Float16* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static DDIM_INLINE void store(BFloat16* p, F a) {
    // Round to nearest even on the lower 16 bits; a NaN is kept, made quiet.
    const I x = bits(a);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), set32(1));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(x, _mm256_add_epi32(odd, set32(0x7fff))), 16);
    const I quiet = _mm256_or_si256(_mm256_srli_epi32(x, 16), set32(0x40));
    const I chosen = _mm256_blendv_epi8(rounded, quiet, bits(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)));
    const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(chosen), _mm256_extracti128_si256(chosen, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
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
  static DDIM_INLINE I add64(I a, I b) { return _mm256_add_epi64(a, b); }
  static DDIM_INLINE I mul32(I a, I b) { return _mm256_mul_epu32(a, b); }
  // Shuffles rather than 64-bit shifts: the other half may hold anything, and shuffles run on more ports.
  static DDIM_INLINE I high_to_low(I a) { return _mm256_shuffle_epi32(a, 0xf5); }
  static DDIM_INLINE I low_to_high(I a) { return _mm256_shuffle_epi32(a, 0xa0); }
  static DDIM_INLINE I low_and_high(I low, I high) { return _mm256_blend_epi32(low, high, 0xaa); }
};

#include "noise.inl"
#include "step.inl"

}  // namespace

const Kernels kAvx2 = {"avx2", step, normals, words, triad};

}  // namespace ddim
