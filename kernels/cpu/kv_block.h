// A block of K and V: where its positions lie in pages, and panels of it (product.h).

#pragma once

#include "rows.h"

namespace {

constexpr long BLOCK = 64;  // positions

INLINE void transpose_8x8(const uint32_t* const* rows, long from, uint32_t* to) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps((const float*)(rows[i] + from));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps((float*)(to + i * COLUMNS), _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps((float*)(to + (i + 4) * COLUMNS), _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
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
    bool together[BLOCK / COLUMNS];                          // whether the 16 positions of a panel lie side by side
    long count = 0;                                          // of positions

    // Positions base … base + positions - 1; `blank` for those that were never written or whose page is gone: outside of
    // from … to - 1.
    void find(const int32_t* table, const Pages& pages, long kv_head, long base, long positions, long from, long to,
              const S* blank) {
        count = positions;
        long index = base / pages.page, offset = base % pages.page;
        bool known = false;  // where the position before lies
        for (long j = 0, at = base; j < count; ++j, ++at, ++offset) {
            if (offset == pages.page) offset = 0, ++index;
            const bool follows = known && offset > 0;
            together[j / COLUMNS] = j % COLUMNS == 0 || (together[j / COLUMNS] && follows);
            if (at < from || at >= to) {
                keys[j] = values[j] = blank;
                key_scales[j] = value_scales[j] = &NO_SCALE;
                known = together[j / COLUMNS] = false;
                continue;
            }
            if (follows) {
                keys[j] = keys[j - 1] + pages.size, values[j] = values[j - 1] + pages.size;
                key_scales[j] = key_scales[j - 1] + 1, value_scales[j] = value_scales[j - 1] + 1;
            } else {
                const long page = table[index], line = kv_head * pages.page + offset;
                const long place = page * pages.step + line * pages.size, scale_place = page * pages.scale_step + line;
                keys[j] = (const S*)pages.k + place, values[j] = (const S*)pages.v + place;
                key_scales[j] = (const float16*)pages.k_scale + scale_place;
                value_scales[j] = (const float16*)pages.v_scale + scale_place;
                if (SCALED) {
                    __builtin_prefetch(key_scales[j]);
                    __builtin_prefetch(value_scales[j]);
                }
                known = true;
            }
        }
    }

    // Has part `part` of `parts` of its rows (`keys` or `values`) brought to the second-level cache: a little at a time,
    // beside the work on another block. The first level keeps fewer misses in flight, and makes the core wait for them.
    void fetch(const S* const* rows, long part, long parts, long size) const {
        for (long j = count * part / parts; j < count * (part + 1) / parts; ++j)
            for (long line = 0; line < size * (long)sizeof(S); line += 64)
                __builtin_prefetch((const char*)rows[j] + line, 0, 2);
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
