// sums += x · W for one row, one panel of W and the next few of K, in each kind of numbers.
//
// Panels are [K / 2][16][2] in bfloat16 and in int8 that is multiplied as floats, [K][16] in float32, and [K / 4][16][4] in
// int8 that is multiplied by int8. An int8 is exact in bfloat16 and float32.

#pragma once

#include "lanes_int8.h"

namespace {

constexpr long COLUMNS = 16;  // of a panel

// W's columns for k and k + 1.
template <class W> INLINE Lanes even(const W* w) { return firsts(w); }
template <class W> INLINE Lanes odd(const W* w) { return seconds(w); }
INLINE Lanes even(const float* w) { return load(w); }
INLINE Lanes odd(const float* w) { return load(w + COLUMNS); }

template <class X, class W> constexpr long STEP = 2;  // of K per addition
template <> constexpr long STEP<bf16, int8_t> = 4;
template <> constexpr long STEP<uint8_t, int8_t> = 4;
template <> constexpr long STEP<int16_t, int8_t> = 4;

// R: rows that meet the same W.
template <int R, class W> INLINE Lanes add(const float* x, const W* w, Lanes sums) {
    return fma(all(x[1]), odd(w), fma(all(x[0]), even(w), sums));
}
INLINE int two_words(const void* at) {
    int both;
    memcpy(&both, at, 4);
    return both;
}
#if TANDEM_BF16_PRODUCTS
INLINE Lanes add_pair(const bf16* x, __m512i w, Lanes sums) {
    return {_mm512_dpbf16_ps(sums.v, (__m512bh)_mm512_set1_epi32(two_words(x)), (__m512bh)w)};
}
template <int R> INLINE Lanes add(const bf16* x, const bf16* w, Lanes sums) { return add_pair(x, _mm512_loadu_si512(w), sums); }
template <int R> INLINE Lanes add(const bf16* x, const int8_t* w, Lanes sums) {
    const Widened wider = as_bf16<R <= 4>(w);
    return add_pair(x + 2, wider.second, add_pair(x, wider.first, sums));
}
#endif

// Whole sums of four products, x and W in the orders of lanes_int8.h. Nothing saturates: they stay below 2³¹ for
// K < 66,000.
#if TANDEM_INT8_PRODUCTS
template <int R> INLINE Lanes add(const uint8_t* x, const int8_t* w, Lanes sums) {
    // GCC's intrinsic copies sums that lie in lanes of another type to and fro, and then has too few registers.
    asm("vpdpbusd %2, %1, %0" : "+v"(sums.v) : "v"(_mm512_set1_epi32(two_words(x))), "v"(_mm512_loadu_si512(w)));
    return sums;
}
#elif TANDEM_AVX512
template <int R> INLINE Lanes add(const int16_t* x, const int8_t* w, Lanes sums) {
    const __m512i quads = _mm512_loadu_si512(w), first = _mm512_srai_epi16(_mm512_slli_epi16(quads, 8), 8);
    const __m512i a = _mm512_madd_epi16(first, _mm512_set1_epi32(two_words(x)));
    const __m512i b = _mm512_madd_epi16(_mm512_srai_epi16(quads, 8), _mm512_set1_epi32(two_words(x + 2)));
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_add_epi32(_mm512_castps_si512(sums.v), a), b))};
}
#else
INLINE __m256 add_half(__m256i x02, __m256i x13, const int8_t* w, __m256 sums) {
    const __m256i quads = _mm256_loadu_si256((const __m256i*)w), first = _mm256_srai_epi16(_mm256_slli_epi16(quads, 8), 8);
    const __m256i a = _mm256_madd_epi16(first, x02), b = _mm256_madd_epi16(_mm256_srai_epi16(quads, 8), x13);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_add_epi32(_mm256_castps_si256(sums), a), b));
}
template <int R> INLINE Lanes add(const int16_t* x, const int8_t* w, Lanes sums) {
    const __m256i x02 = _mm256_set1_epi32(two_words(x)), x13 = _mm256_set1_epi32(two_words(x + 2));
    return {add_half(x02, x13, w, sums.a), add_half(x02, x13, w + 32, sums.b)};
}
#endif

}  // namespace
