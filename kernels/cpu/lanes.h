// Sixteen float32 lanes on whatever vectors the including file's instruction set has, and the numbers kept in memory.
//
// Everything else in this directory is written in these lanes, so that one text serves AVX2 (two registers) and AVX-512
// (one). The order of every sum is that of the text: the same on one row or a hundred, in one thread or many.

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

namespace {  // each instruction set has its own

typedef uint16_t bf16;  // the upper half of a float32

#if TANDEM_AVX512

struct Lanes { __m512 v; };

INLINE Lanes zeros() { return {_mm512_setzero_ps()}; }
INLINE Lanes all(float x) { return {_mm512_set1_ps(x)}; }
INLINE Lanes load(const float* at) { return {_mm512_loadu_ps(at)}; }
INLINE void store(float* at, Lanes x) { _mm512_storeu_ps(at, x.v); }
INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE Lanes larger(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE Lanes smaller(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE Lanes rounded(Lanes x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }

// x · 2ⁿ for whole n in -126 … 127.
INLINE Lanes scaled(Lanes x, Lanes n) {
    __m512i power = _mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23);
    return {_mm512_mul_ps(x.v, _mm512_castsi512_ps(power))};
}

// `x` where a < b, else `y`.
INLINE Lanes where_less(Lanes a, Lanes b, Lanes x, Lanes y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}

// The first and the second of each of 16 neighbouring pairs.
INLINE Lanes firsts(const bf16* at) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(at), 16))}; }
INLINE Lanes seconds(const bf16* at) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(at), _mm512_set1_epi32((int)0xffff0000u)))};
}

INLINE Lanes widened(__m256i x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))}; }
INLINE Lanes load(const bf16* at) { return widened(_mm256_loadu_si256((const __m256i*)at)); }

// To the nearest, ties to even; what is no number stays none.
#if TANDEM_BF16_PRODUCTS
INLINE __m256i narrowed(Lanes x) { return (__m256i)_mm512_cvtneps_pbh(x.v); }  // 0 for what is below 2⁻¹²⁶
#else
INLINE __m256i narrowed(Lanes x) {
    __m512i bits = _mm512_castps_si512(x.v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    __mmask16 none = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    up = _mm512_mask_blend_epi32(none, up, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
#endif
INLINE void store(bf16* at, Lanes x) { _mm256_storeu_si256((__m256i*)at, narrowed(x)); }

INLINE Lanes as_stored(bf16, Lanes x) { return widened(narrowed(x)); }

INLINE void split(Lanes x, __m256* low, __m256* high) {
    *low = _mm512_castps512_ps256(x.v);
    *high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x.v), 1));
}

#else

struct Lanes { __m256 a, b; };

INLINE Lanes zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
INLINE Lanes all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Lanes load(const float* at) { return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)}; }
INLINE void store(float* at, Lanes x) {
    _mm256_storeu_ps(at, x.a);
    _mm256_storeu_ps(at + 8, x.b);
}
INLINE Lanes operator+(Lanes a, Lanes b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
INLINE Lanes operator-(Lanes a, Lanes b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
INLINE Lanes operator*(Lanes a, Lanes b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
INLINE Lanes operator/(Lanes a, Lanes b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
INLINE Lanes larger(Lanes a, Lanes b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
INLINE Lanes smaller(Lanes a, Lanes b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
INLINE Lanes fma(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)};
}
INLINE Lanes rounded(Lanes x) {
    const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, nearest), _mm256_round_ps(x.b, nearest)};
}

INLINE __m256 scaled_half(__m256 x, __m256 n) {
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
}
INLINE Lanes scaled(Lanes x, Lanes n) { return {scaled_half(x.a, n.a), scaled_half(x.b, n.b)}; }

INLINE Lanes where_less(Lanes a, Lanes b, Lanes x, Lanes y) {
    return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(a.a, b.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(a.b, b.b, _CMP_LT_OQ))};
}

INLINE __m256i pairs(const bf16* at) { return _mm256_loadu_si256((const __m256i*)at); }
INLINE __m256 upper(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
INLINE __m256 lower_off(__m256i x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000u)));
}
INLINE Lanes firsts(const bf16* at) { return {upper(pairs(at)), upper(pairs(at + 16))}; }
INLINE Lanes seconds(const bf16* at) { return {lower_off(pairs(at)), lower_off(pairs(at + 16))}; }

INLINE __m256 widened(const bf16* at) { return upper(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)at))); }
INLINE Lanes load(const bf16* at) { return {widened(at), widened(at + 8)}; }

INLINE __m256i narrowed(__m256 x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    __m256i none = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), none), 16);
}
INLINE void store(bf16* at, Lanes x) {
    __m256i mixed = _mm256_packus_epi32(narrowed(x.a), narrowed(x.b));
    _mm256_storeu_si256((__m256i*)at, _mm256_permute4x64_epi64(mixed, 0xd8));
}

INLINE Lanes as_stored(bf16, Lanes x) {
    bf16 part[16];
    store(part, x);
    return load(part);
}

INLINE void split(Lanes x, __m256* low, __m256* high) {
    *low = x.a;
    *high = x.b;
}

#endif

INLINE Lanes as_stored(float, Lanes x) { return x; }

// One number.

INLINE float wide(float x) { return x; }
INLINE float wide(int8_t x) { return x; }
INLINE float wide(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
INLINE void narrow(float* at, float x) { *at = x; }
INLINE void narrow(bf16* at, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    *at = x != x ? 0x7fc0 : (bf16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The first `count` < 16 of the lanes; those behind are 0.
template <class T> INLINE Lanes load_some(const T* at, long count) {
    float part[16] = {0};
    for (long i = 0; i < count; ++i) part[i] = wide(at[i]);
    return load(part);
}
template <class T> INLINE void store_some(T* at, Lanes x, long count) {
    float part[16];
    store(part, x);
    for (long i = 0; i < count; ++i) narrow(at + i, part[i]);
}

INLINE float sum(Lanes x) {
    __m256 low, high;
    split(x, &low, &high);
    __m256 eight = _mm256_add_ps(low, high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
INLINE float largest(Lanes x) {
    __m256 low, high;
    split(x, &low, &high);
    __m256 eight = _mm256_max_ps(low, high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// eˣ within 2 units of rounding; 0 below -87, where float32 has no normal numbers any more, ∞ from 88 on, NaN of NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor series of eʳ, whose rest is below 6e-9.
INLINE Lanes exponential(Lanes x) {
    Lanes low = all(-87.0f), high = all(88.0f);
    Lanes n = rounded(larger(smaller(x, high), low) * all(1.44269504f));
    Lanes r = larger(smaller(x, high), low);
    r = fma(n, all(-0.693145752f), r);  // ln 2 in two parts, the first exact in 13 bits, so that n times it is exact
    r = fma(n, all(-1.42860677e-6f), r);
    Lanes y = all(1.0f / 5040);
    y = fma(y, r, all(1.0f / 720));
    y = fma(y, r, all(1.0f / 120));
    y = fma(y, r, all(1.0f / 24));
    y = fma(y, r, all(1.0f / 6));
    y = fma(y, r, all(0.5f));
    y = fma(y, r, all(1.0f));
    y = fma(y, r, all(1.0f));
    y = scaled(y, n);
    y = where_less(x, high, y, larger(all(__builtin_inff()), x));  // the second where one of the two is NaN
    return where_less(x, low, zeros(), y);
}

// tanh x = 1 - 2 / (e²ˣ + 1), within 1.2e-7.
INLINE Lanes hyperbolic_tangent(Lanes x) {
    Lanes bound = all(40.0f);
    x = larger(smaller(x, bound), zeros() - bound);
    return all(1.0f) - all(2.0f) / (exponential(x + x) + all(1.0f));
}

}  // namespace
