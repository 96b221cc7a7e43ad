// AVX-512 Foundation: x86-64 servers since Skylake-SP (2017) and Zen 4 (2022). Only instructions of
// AVX512F are used.
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own _mm512_undefined_ps() (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
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

using F = __m512;
using I = __m512i;

// One vector after the other.
struct Pair {
  F a, b;
};

struct Isa {
  static constexpr int kLanes = 16;
  static constexpr bool kNormalsInRegisters = true;
  static constexpr bool kDeinterleavesBFloat16 = false;
  static constexpr int kGroups = 2;
  static constexpr int kAccumulators = 24;

  static DDIM_INLINE F set(float x) { return _mm512_set1_ps(x); }
  static DDIM_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static DDIM_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static DDIM_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static DDIM_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static DDIM_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static DDIM_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static DDIM_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static DDIM_INLINE F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static DDIM_INLINE F where_at_most(F a, F bound, F value) {
    return floats(_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, bound, _CMP_LE_OQ), set32(0), bits(value)));
  }
  static DDIM_INLINE F interleave_low(F a, F b) { return _mm512_unpacklo_ps(a, b); }
  static DDIM_INLINE F interleave_high(F a, F b) { return _mm512_unpackhi_ps(a, b); }

  static DDIM_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  static DDIM_INLINE F load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static DDIM_INLINE F load(const BFloat16* p) {
    return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
  }
  static DDIM_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static DDIM_INLINE void store(Float16* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static DDIM_INLINE void store(BFloat16* p, F a) {
    // Round to nearest even on the lower 16 bits; a NaN becomes a quiet NaN.
    const I x = bits(a);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), set32(1));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(x, _mm512_add_epi32(odd, set32(0x7fff))), 16);
    const I quiet = _mm512_or_si512(_mm512_srli_epi32(x, 16), set32(0x40));
    const I chosen = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), rounded, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(chosen));
  }

  static DDIM_INLINE I bits(F a) { return _mm512_castps_si512(a); }
  static DDIM_INLINE F floats(I a) { return _mm512_castsi512_ps(a); }
  static DDIM_INLINE F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static DDIM_INLINE I set32(int32_t x) { return _mm512_set1_epi32(x); }
  static DDIM_INLINE I set64(uint64_t x) { return _mm512_set1_epi64(static_cast<int64_t>(x)); }
  static DDIM_INLINE I load_i(const void* p) { return _mm512_loadu_si512(p); }
  static DDIM_INLINE void store_i(void* p, I a) { _mm512_storeu_si512(p, a); }
  static DDIM_INLINE I and_(I a, I b) { return _mm512_and_si512(a, b); }
  static DDIM_INLINE I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
  static DDIM_INLINE I sub32(I a, I b) { return _mm512_sub_epi32(a, b); }
  static DDIM_INLINE I shift_left(I a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
  static DDIM_INLINE I add64(I a, I b) { return _mm512_add_epi64(a, b); }
  static DDIM_INLINE I mul32(I a, I b) { return _mm512_mul_epu32(a, b); }
  static DDIM_INLINE I high_to_low(I a) { return _mm512_srli_epi64(a, 32); }
  static DDIM_INLINE I low_to_high(I a) { return _mm512_slli_epi64(a, 32); }
  static DDIM_INLINE I low_and_high(I low, I high) { return _mm512_mask_blend_epi32(0xaaaa, low, high); }
};

#include "noise.inl"
#include "step.inl"
#include "convolution.inl"
#include "normalization.inl"

}  // namespace

const Kernels kAvx512 = {"avx512", step, normals, words, triad, convolve, normalize, silu, density, density_backward};

}  // namespace ddim
