// int8, float16 and whole sums in the lanes of lanes.h. Sixteen int32 lie in Lanes as their bits; `zeros` is 0 of both kinds.

#pragma once

#include "lanes.h"

namespace {

struct float16 { uint16_t bits; };

// `load` and `store` of int8; what is stored is rounded to the nearest, ties to even, and lies in -127 … 127. NaN becomes 0. What is
// read may be -128, too.
// The other two are for products with int8: uint8 is x + 128; int16 has the second and the third of every four exchanged.

#if TANDEM_AVX512

INLINE Lanes load(const int8_t* at) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)at)))};
}
INLINE __m128i bytes_of(Lanes x) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(x.v)); }
INLINE __m256i words_of(Lanes x) { return _mm256_cvtepi8_epi16(bytes_of(x)); }

INLINE Lanes load(const float16* at) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)at))}; }

// The first and the second of each of 16 neighbouring pairs.
INLINE __m512i pair_words(const int8_t* at) { return _mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)at)); }
INLINE Lanes firsts(const int8_t* at) {
    return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pair_words(at), 24), 24))};
}
INLINE Lanes seconds(const int8_t* at) { return {_mm512_cvtepi32_ps(_mm512_srai_epi32(pair_words(at), 8))}; }

#if TANDEM_BF16_PRODUCTS

INLINE __m512i converted(const int8_t* at) { return (__m512i)_mm512_cvtne2ps_pbh(load(at + 16).v, load(at).v); }

// 0 … 127 in bfloat16, upper and lower bytes.
struct Magnitudes {
    uint8_t low[128] = {0}, high[128] = {0};
    constexpr Magnitudes() {
        for (int x = 1, exponent = 0; x < 128; ++x) {
            if (x >> (exponent + 1)) ++exponent;
            const int bits = (127 + exponent) << 7 | (x << (7 - exponent) & 0x7f);
            low[x] = bits & 0xff;
            high[x] = bits >> 8;
        }
    }
};
alignas(64) constexpr Magnitudes MAGNITUDES;

// 64 numbers in bfloat16, 32 and 32, by conversions, which leave the units of products free, or by the fewest operations.
struct Widened { __m512i first, second; };
template <bool FEWEST> INLINE Widened as_bf16(const int8_t* at) {
    if (!FEWEST) return {converted(at), converted(at + 32)};
    const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);  // of a half in the lower halves of 128 bits
    const __m512i x = _mm512_permutexvar_epi64(halves, _mm512_loadu_si512(at)), place = _mm512_abs_epi8(x);
    const auto found = [=](const uint8_t* table) {
        return _mm512_permutex2var_epi8(_mm512_load_si512(table), place, _mm512_load_si512(table + 64));
    };
    const __m512i low = found(MAGNITUDES.low), sign = _mm512_set1_epi8((char)0x80);
    const __m512i signed_high = _mm512_ternarylogic_epi32(found(MAGNITUDES.high), x, sign, 0xf8);  // a | (b & c)
    const __m512i high = _mm512_mask_mov_epi8(signed_high, _mm512_movepi8_mask(place), _mm512_set1_epi8((char)0xc3));  // -128
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

#else

INLINE __m512i converted(const int8_t* at) {
    const __m256i low = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(load(at).v), 16));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(load(at + 16).v), 16));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

#endif

INLINE void widen_32(const int8_t* from, bf16* to) { _mm512_storeu_si512(to, converted(from)); }

// |x|, and the larger of two that are not negative; NaN is larger than all.
INLINE Lanes magnitude(Lanes x) { return {_mm512_abs_ps(x.v)}; }
INLINE Lanes larger_or_nan(Lanes a, Lanes b) {
    return {_mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(b.v)))};
}

// Whole sums less 128 · totals, as float32.
INLINE Lanes whole_sums(Lanes x, const int32_t* totals) {
    const __m512i excess = _mm512_slli_epi32(_mm512_loadu_si512(totals), 7);
    return {_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_castps_si512(x.v), excess))};
}
INLINE Lanes whole_sums(Lanes x) { return {_mm512_cvtepi32_ps(_mm512_castps_si512(x.v))}; }

#else

INLINE __m256 floats_of_8(const int8_t* at) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)at)));
}
INLINE Lanes load(const int8_t* at) { return {floats_of_8(at), floats_of_8(at + 8)}; }

INLINE __m256i words_of(Lanes x) {
    const __m256i low_byte = _mm256_set1_epi32(0xff);  // NaN's is 0
    const __m256i a = _mm256_and_si256(_mm256_cvtps_epi32(x.a), low_byte);
    const __m256i b = _mm256_and_si256(_mm256_cvtps_epi32(x.b), low_byte);
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
    return _mm256_srai_epi16(_mm256_slli_epi16(words, 8), 8);
}
INLINE __m128i bytes_of(Lanes x) {
    const __m256i words = words_of(x);
    return _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

INLINE __m256 floats_of_8(const float16* at) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)); }
INLINE Lanes load(const float16* at) { return {floats_of_8(at), floats_of_8(at + 8)}; }

INLINE __m256i pair_words(const int8_t* at) { return _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)at)); }
INLINE __m256 lower_byte(__m256i x) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 24), 24));
}
INLINE __m256 upper_byte(__m256i x) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(x, 8)); }
INLINE Lanes firsts(const int8_t* at) { return {lower_byte(pair_words(at)), lower_byte(pair_words(at + 16))}; }
INLINE Lanes seconds(const int8_t* at) { return {upper_byte(pair_words(at)), upper_byte(pair_words(at + 16))}; }

INLINE void widen_16(const int8_t* from, bf16* to) {
    const Lanes x = load(from);
    const __m256i a = _mm256_srli_epi32(_mm256_castps_si256(x.a), 16), b = _mm256_srli_epi32(_mm256_castps_si256(x.b), 16);
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8));
}
INLINE void widen_32(const int8_t* from, bf16* to) {
    widen_16(from, to);
    widen_16(from + 16, to + 16);
}

INLINE __m256 without_sign(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
INLINE Lanes magnitude(Lanes x) { return {without_sign(x.a), without_sign(x.b)}; }
INLINE __m256 larger_bits(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
INLINE Lanes larger_or_nan(Lanes a, Lanes b) { return {larger_bits(a.a, b.a), larger_bits(a.b, b.b)}; }

INLINE Lanes whole_sums(Lanes x) {
    return {_mm256_cvtepi32_ps(_mm256_castps_si256(x.a)), _mm256_cvtepi32_ps(_mm256_castps_si256(x.b))};
}

#endif

INLINE void store(int8_t* at, Lanes x) { _mm_storeu_si128((__m128i*)at, bytes_of(x)); }
INLINE void store(uint8_t* at, Lanes x) {
    _mm_storeu_si128((__m128i*)at, _mm_xor_si128(bytes_of(x), _mm_set1_epi8((char)0x80)));
}
INLINE void store(int16_t* at, Lanes x) {
    const __m256i exchanged = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words_of(x), 0xd8), 0xd8);
    _mm256_storeu_si256((__m256i*)at, exchanged);
}

// `count` numbers in bfloat16.
INLINE void widen(const int8_t* from, bf16* to, long count) {
    long i = 0;
    for (; i + 32 <= count; i += 32) widen_32(from + i, to + i);
    if (i + 16 <= count) {
        store(to + i, load(from + i));
        i += 16;
    }
    for (; i < count; ++i) narrow(to + i, (float)from[i]);
}

INLINE float wide(float16 x) { return _cvtsh_ss(x.bits); }
INLINE void narrow(float16* at, float x) { at->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

}  // namespace
