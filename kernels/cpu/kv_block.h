// A block of K and V: where its positions lie in pages, and panels of it (product.h).

#pragma once

#include "rows.h"

namespace {

constexpr long BLOCK = 64;   // positions
constexpr long PARTS = 128;  // of a block's rows, K's and V's, as `fetch` counts

INLINE void transpose_8x8(const uint32_t* const* rows, long from, uint32_t* to) {
    __m256 r[8], t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // halves of rows i and i + 4 side by side, which is for free where one comes from memory
        const float *low = (const float*)(rows[i] + from), *high = (const float*)(rows[i + 4] + from);
        r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
        r[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low + 4)), _mm_loadu_ps(high + 4), 1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        float* at = (float*)to + 4 * i * COLUMNS;
        _mm256_storeu_ps(at, _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44));
        _mm256_storeu_ps(at + COLUMNS, _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee));
        _mm256_storeu_ps(at + 2 * COLUMNS, _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44));
        _mm256_storeu_ps(at + 3 * COLUMNS, _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee));
    }
}

// One panel of K: 16 positions are its columns. An element of it is a float32 or a pair of bfloat16.
template <class T> void keys_panel(const T* const* rows, long size, T* to) {
    const uint32_t* from[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) from[j] = (const uint32_t*)rows[j];
    const long count = size * (long)sizeof(T) / 4;
    uint32_t* into = (uint32_t*)to;
    long i = 0;
    for (; i + 8 <= count; i += 8) {
        transpose_8x8(from, i, into + i * COLUMNS);
        transpose_8x8(from + 8, i, into + i * COLUMNS + 8);
    }
    for (; i < count; ++i)
        for (int j = 0; j < COLUMNS; ++j) into[i * COLUMNS + j] = from[j][i];
}

#if TANDEM_BF16_PRODUCTS
// Places of words in two registers, of one and the other in turns.
struct Alternating {
    uint16_t low[32] = {0}, high[32] = {0};
    constexpr Alternating() {
        for (int i = 0; i < 32; ++i) {
            low[i] = i / 2 + i % 2 * 32;
            high[i] = low[i] + 16;
        }
    }
};
alignas(64) constexpr Alternating IN_TURNS;
#endif

// The panels of V: positions are its depth. `step`: elements of a panel.
void values_panels(const float* const* rows, long count, long size, float* to, long step) {
    for (long j = 0; j < count; ++j)
        for (long h = 0; h < size; h += COLUMNS) {
            float* into = to + h / COLUMNS * step + j * COLUMNS;
            store(into, size - h >= COLUMNS ? load(rows[j] + h) : load_some(rows[j] + h, size - h));
        }
}
void values_panels(const bf16* const* rows, long count, long size, bf16* to, long step) {
    for (long j = 0; j < count; j += 2)
        for (long h = 0; h < size; h += COLUMNS) {
            bf16* into = to + h / COLUMNS * step + j * COLUMNS;
            if (size - h >= COLUMNS) {
                __m256i a = _mm256_loadu_si256((const __m256i*)(rows[j] + h));
                __m256i b = _mm256_loadu_si256((const __m256i*)(rows[j + 1] + h));
                __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
                _mm256_storeu_si256((__m256i*)into, _mm256_permute2x128_si256(low, high, 0x20));
                _mm256_storeu_si256((__m256i*)(into + 16), _mm256_permute2x128_si256(low, high, 0x31));
            } else {
                for (long i = 0; i < COLUMNS; ++i) {
                    into[2 * i] = h + i < size ? rows[j][h + i] : 0;
                    into[2 * i + 1] = h + i < size ? rows[j + 1][h + i] : 0;
                }
            }
        }
}

#if TANDEM_BF16_PRODUCTS
// What panels of V hold of two positions, for P · 16 columns; one panel may have only `left` of its 16.
template <int P> INLINE void pairs_of(const bf16* first, const bf16* second, long left, __m512i* to) {
    const __m512i low = _mm512_load_si512(IN_TURNS.low), high = _mm512_load_si512(IN_TURNS.high);
    if constexpr (P == 1) {
        const __mmask32 there = left < COLUMNS ? (1u << left) - 1 : 0xffff;
        to[0] = _mm512_permutex2var_epi16(_mm512_maskz_loadu_epi16(there, first), low, _mm512_maskz_loadu_epi16(there, second));
    } else {
#pragma GCC unroll 4
        for (int p = 0; p < P; p += 2) {
            const __m512i a = _mm512_loadu_si512(first + p * COLUMNS), b = _mm512_loadu_si512(second + p * COLUMNS);
            to[p] = _mm512_permutex2var_epi16(a, low, b);
            to[p + 1] = _mm512_permutex2var_epi16(a, high, b);
        }
    }
}
#endif

template <class S> struct InPanels { typedef S Type; };  // of what is stored as S
template <> struct InPanels<int8_t> { typedef bf16 Type; };

void keys_panel(const int8_t* const* rows, long size, bf16* to) {
    bf16 wider[COLUMNS * WIDEST_HEAD];
    const bf16* all_rows[COLUMNS];
    for (int j = 0; j < COLUMNS; ++j) {
        widen(rows[j], wider + j * size, size);
        all_rows[j] = wider + j * size;
    }
    keys_panel(all_rows, size, to);
}
void values_panels(const int8_t* const* rows, long count, long size, bf16* to, long step) {
    bf16 wider[2][WIDEST_HEAD];
    const bf16* pair[] = {wider[0], wider[1]};
    for (long j = 0; j < count; j += 2) {
        widen(rows[j], wider[0], size);
        widen(rows[j + 1], wider[1], size);
        values_panels(pair, 2, size, to + j * COLUMNS, step);
    }
}

constexpr float16 NO_SCALE = {0};

// Where K and V of the positions of one block lie, for one kv head.
template <class S> struct Block {
    static constexpr bool SCALED = sizeof(S) == 1;
    const S *keys[BLOCK], *values[BLOCK];
    const float16 *key_scales[BLOCK], *value_scales[BLOCK];  // of int8
    bool together[BLOCK / COLUMNS];                          // whether the scales of a panel's 16 positions lie side by side
    long count = 0;                                          // of positions
    long fetched = 0;                                        // rows that `fetch` has asked for

    // Positions base … base + positions - 1; `blank` for those that were never written or whose page is gone: outside of
    // from … to - 1.
    void find(const int32_t* table, const Pages& pages, long kv_head, long base, long positions, long from, long to,
              const S* blank) {
        count = positions, fetched = 0;
        const long known_from = from > base ? from - base : 0, known_to = to - base < count ? to - base : count;
        for (long j = 0; j < count;) {
            if (j < known_from || j >= known_to) {
                keys[j] = values[j] = blank;
                if (SCALED) key_scales[j] = value_scales[j] = &NO_SCALE;
                ++j;
                continue;
            }
            const long offset = (base + j) % pages.page, page = table[(base + j) / pages.page], line = kv_head * pages.page + offset;
            const long place = page * pages.step + line * pages.size, end = j + pages.page - offset;
            const S *key = (const S*)pages.k + place, *value = (const S*)pages.v + place;
            const long begin = j;
            for (; j < end && j < known_to; ++j, key += pages.size, value += pages.size) keys[j] = key, values[j] = value;
            if (SCALED) {
                const long scale_place = page * pages.scale_step + line;
                const float16 *key_scale = (const float16*)pages.k_scale + scale_place;
                const float16 *value_scale = (const float16*)pages.v_scale + scale_place;
                __builtin_prefetch(key_scale);
                __builtin_prefetch(value_scale);
                for (long i = begin; i < j; ++i) key_scales[i] = key_scale++, value_scales[i] = value_scale++;
            }
        }
        if (SCALED)
            for (long p = 0; p < count / COLUMNS; ++p) {
                const float16* const* at = key_scales + p * COLUMNS;
                together[p] = true;
                for (long i = 1; i < COLUMNS; ++i) together[p] = together[p] && at[i] == at[0] + i;
            }
    }

    // Has its rows, K's before V's, brought to the second-level cache as far as `part` of PARTS: a little at a time, beside
    // the work on another block. A core keeps some 24 misses in flight; one that asks for more waits. The first level keeps
    // fewer.
    INLINE void fetch(long part, long size) {
        for (const long end = 2 * count * part / PARTS; fetched < end; ++fetched) {
            const char* row = (const char*)(fetched < count ? keys[fetched] : values[fetched - count]);
            for (long line = 0; line < size * (long)sizeof(S); line += 64) __builtin_prefetch(row + line, 0, 2);
        }
    }

    // Those of panel p.
    INLINE Lanes scales(const float16* const* of, long p) const {
        const float16* const* at = of + p * COLUMNS;
        if (together[p]) return load(*at);
        float16 gathered[COLUMNS];
        for (int i = 0; i < COLUMNS; ++i) gathered[i] = *at[i];
        return load(gathered);
    }
};

}  // namespace
