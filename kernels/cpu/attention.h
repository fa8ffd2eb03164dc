// Paged attention. A piece of work is a few query positions of one kv head, with all G query heads that share it: R rows.
// They meet K and V in blocks of BLOCK positions, the first a multiple of it, brought into panels (product.h) one by one:
//
//   scores [R, BLOCK] = q · Kᵀ,  m' = max(m, max scores),  p = exp(scores - m'),  l = l · exp(m - m') + Σ p,
//   sums [R, H] = sums · exp(m - m') + p · V,  and at the end sums / l.
//
// The order of all of it depends on a row's own position only: its bits are the same in a prompt, in any chunk of it and
// as a decode, alone and in any batch. A position that a row does not see adds exactly 0. Method: Milakov and Gimelshein,
// "Online normalizer calculation for softmax", 2018. Traffic: K and V are read once per piece of work.

#pragma once

#include "room.h"
#include "rows.h"

namespace {

constexpr long BLOCK = 64, QUERIES = 16, WIDEST = 64;  // positions of K and V, and of queries; rows of a piece

struct Step {  // of a step: see Sequences in ops.py
    const int32_t *starts, *lengths, *table;
    long sequences, table_width;
};

struct Shape {
    long heads, kv_heads, size, page, page_step;  // elements of a head, positions of a page, elements between pages
    float scale;
    const float* alibi;  // [heads] or null
    long window;         // 0: none
    float softcap;       // 0: none
};

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

// Where K and V of the positions of one block lie, for one kv head.
template <class T> struct Block {
    const T *keys[BLOCK], *values[BLOCK];
    long count = 0;  // positions

    // Positions base … base + count - 1; `blank` for those that were never written or whose page is gone: outside of
    // from … to - 1.
    void find(const T* k_pages, const T* v_pages, const int32_t* table, const Shape& shape, long kv_head, long base,
              long positions, long from, long to, const T* blank) {
        count = positions;
        long index = base / shape.page, offset = base % shape.page, place = 0;
        for (long j = 0, at = base; j < count; ++j, ++at, ++offset) {
            if (offset == shape.page) offset = 0, ++index;
            if (at < from || at >= to) {
                keys[j] = values[j] = blank;
                place = 0;
                continue;
            }
            if (offset == 0 || place == 0)
                place = table[index] * shape.page_step + (kv_head * shape.page + offset) * shape.size + 1;
            else place += shape.size;
            keys[j] = k_pages + place - 1;
            values[j] = v_pages + place - 1;
        }
    }

    // Has part `part` of `parts` of its rows (`keys` or `values`) brought to the second-level cache: a little at a time,
    // beside the work on another block. The first level keeps fewer misses in flight, and makes the core wait for them.
    void fetch(const T* const* rows, long part, long parts, long size) const {
        for (long j = count * part / parts; j < count * (part + 1) / parts; ++j)
            for (long line = 0; line < size * (long)sizeof(T); line += 64)
                __builtin_prefetch((const char*)rows[j] + line, 0, 2);
    }
};

// Query rows [first, first + count) of sequence `b`, which stand at positions from `position` on, for one kv head.
struct Piece {
    long b, first, count, position, kv_head;

    long last() const { return position + count - 1; }
    long seen_from(const Shape& shape) const {
        return shape.window && position + 1 > shape.window ? position + 1 - shape.window : 0;
    }
    long first_block(const Shape& shape) const { return seen_from(shape) / BLOCK * BLOCK; }
    long panels_at(long base) const {
        const long there = last() + 1 - base < BLOCK ? last() + 1 - base : BLOCK;
        return (there + COLUMNS - 1) / COLUMNS;
    }
};

// What one thread keeps from a piece for the next: blocks[now] is that one's first, on its way, if `found`.
template <class T> struct Ahead {
    Block<T> blocks[2];
    int now = 0;
    bool found = false;
};

// `next`: the piece that follows; null: none does.
template <class T>
void attend(const T* q, const T* k_pages, const T* v_pages, T* out, const Step& step, const Shape& shape, const Piece& piece,
            const Piece* next, const T* blank, Ahead<T>& ahead, Room& room) {
    const long first = piece.first, count = piece.count, position = piece.position, kv_head = piece.kv_head;
    const long size = shape.size, group = shape.heads / shape.kv_heads, rows = count * group;
    const long outer = (size + COLUMNS - 1) / COLUMNS, last = piece.last();
    float* queries = room.of(rows * size + rows * (BLOCK * 2 + outer * COLUMNS + 2) + BLOCK * size + BLOCK * outer * COLUMNS);
    float* scores = queries + rows * size;             // [4][rows][16]
    float* weights = scores + rows * BLOCK;            // [rows][BLOCK]
    float* sums = weights + rows * BLOCK;              // [outer][rows][16]
    float *tops = sums + rows * outer * COLUMNS, *totals = tops + rows;
    T* keys = (T*)(totals + rows);                     // 4 panels of size · 16
    T* values = (T*)((float*)keys + BLOCK * size);     // `outer` panels of BLOCK · 16

    for (long r = 0; r < rows; ++r) {
        const T* from = q + ((first + r / group) * shape.heads + kv_head * group + r % group) * size;
        for (long i = 0; i < size; ++i) queries[r * size + i] = wide(from[i]);
        tops[r] = -__builtin_inff();
        totals[r] = 0;
    }
    memset(sums, 0, sizeof(float) * rows * outer * COLUMNS);
    float lanes[COLUMNS];
    for (int i = 0; i < COLUMNS; ++i) lanes[i] = (float)i;
    const Lanes lane = load(lanes);

    const auto find = [&](const Piece& of, long base, Block<T>& into) {
        into.find(k_pages, v_pages, step.table + of.b * step.table_width, shape, of.kv_head, base,
                  of.panels_at(base) * COLUMNS, of.seen_from(shape), step.lengths[of.b], blank);
    };
    if (!ahead.found) find(piece, piece.first_block(shape), ahead.blocks[ahead.now]);
    for (long base = piece.first_block(shape); base <= last; base += BLOCK, ahead.now ^= 1) {
        const long panels = piece.panels_at(base);
        const Block<T>& block = ahead.blocks[ahead.now];
        Block<T>& coming = ahead.blocks[ahead.now ^ 1];
        coming.count = 0;
        if (base + BLOCK <= last) find(piece, base + BLOCK, coming);
        else if (next) find(*next, next->first_block(shape), coming);
        const T *key_panels[4], *value_panels[WIDEST_HEAD / COLUMNS];
        for (long p = 0; p < panels; ++p) {
            key_panels[p] = keys + p * size * COLUMNS;
            keys_panel(block.keys + p * COLUMNS, size, keys + p * size * COLUMNS);
            coming.fetch(coming.keys, p, panels, size);
        }
        for (long p = 0; p < panels; ++p) {
            values_panels(block.values + p * COLUMNS, COLUMNS, size, values + p * COLUMNS * COLUMNS, BLOCK * COLUMNS);
            coming.fetch(coming.values, p, panels, size);
        }
        for (long p = 0; p < outer; ++p) value_panels[p] = values + p * BLOCK * COLUMNS;

        multiply(rows, queries, size, key_panels, panels, size, scores, rows, true);
        for (long r = 0; r < rows; ++r) {
            const long own = position + r / group;
            const Lanes behind = all((float)(own - base) + 0.5f);  // a column below it is not in the future
            const Lanes before = all(shape.window ? (float)(own - base - shape.window) + 0.5f : -__builtin_inff());
            const Lanes hidden = all(-__builtin_inff());
            Lanes s[4];
            Lanes most = hidden;
            for (long p = 0; p < panels; ++p) {
                const Lanes column = lane + all((float)(p * COLUMNS));
                s[p] = load(scores + (p * rows + r) * COLUMNS) * all(shape.scale);
                if (shape.softcap != 0)
                    s[p] = all(shape.softcap) * hyperbolic_tangent(s[p] / all(shape.softcap));
                if (shape.alibi)
                    s[p] = fma(all(shape.alibi[kv_head * group + r % group]), column - all((float)(own - base)), s[p]);
                s[p] = where_less(column, behind, where_less(before, column, s[p], hidden), hidden);
                most = larger(most, s[p]);
            }
            const float block_top = largest(most);
            float* to = weights + r * BLOCK;
            if (block_top == -__builtin_inff() && !(tops[r] > -__builtin_inff())) {  // it has seen nothing yet
                for (long p = 0; p < panels; ++p) store(to + p * COLUMNS, zeros());
                continue;
            }
            const float top = block_top > tops[r] ? block_top : tops[r];
            Lanes total = zeros();
            for (long p = 0; p < panels; ++p) {
                const Lanes weight = exponential(s[p] - all(top));
                store(to + p * COLUMNS, weight);
                total = total + weight;
            }
            if (top != tops[r]) {
                float shrink[COLUMNS];
                store(shrink, exponential(all(tops[r] - top)));
                totals[r] *= shrink[0];
                for (long p = 0; p < outer; ++p) {
                    float* at = sums + (p * rows + r) * COLUMNS;
                    store(at, load(at) * all(shrink[0]));
                }
                tops[r] = top;
            }
            totals[r] += sum(total);
        }
        multiply(rows, weights, BLOCK, value_panels, outer, panels * COLUMNS, sums, rows, false);
    }
    ahead.found = next != nullptr;
    for (long r = 0; r < rows; ++r) {
        T* to = out + ((first + r / group) * shape.heads + kv_head * group + r % group) * size;
        for (long p = 0; p < outer; ++p) {
            const Lanes found = load(sums + (p * rows + r) * COLUMNS) / all(totals[r]);
            const long width = size - p * COLUMNS;
            if (width >= COLUMNS) store(to + p * COLUMNS, found);
            else store_some(to + p * COLUMNS, found, width);
        }
    }
}

// Query positions of one piece of work.
INLINE long positions_of(const Shape& shape) {
    const long fit = WIDEST / (shape.heads / shape.kv_heads);
    return fit > QUERIES ? QUERIES : fit > 0 ? fit : 1;
}

// A sequence's last positions take longest: the pieces are handed out from the last to the first.
template <class T>
void attention(const T* q, const T* k_pages, const T* v_pages, T* out, const Step& step, const Shape& shape, int threads) {
    static thread_local Room list;
    const long piece = positions_of(shape);
    int32_t* ends = (int32_t*)list.of(step.sequences);  // pieces of the sequences up to each
    long total = 0;
    for (long b = 0; b < step.sequences; ++b)
        ends[b] = (int32_t)(total += (step.starts[b + 1] - step.starts[b] + piece - 1) / piece);
    const auto piece_of = [=](long item) {
        const long place = total - 1 - item / shape.kv_heads;
        long b = 0;
        for (long step_down = step.sequences; step_down > 0;) {  // how many sequences end at or before this piece
            const long half = step_down / 2;
            if (ends[b + half] <= place) {
                b += half + 1;
                step_down -= half + 1;
            } else step_down = half;
        }
        const long rows = step.starts[b + 1] - step.starts[b], first = (place - (b ? ends[b - 1] : 0)) * piece;
        return Piece{b, step.starts[b] + first, rows - first < piece ? rows - first : piece, step.lengths[b] - rows + first,
                     item % shape.kv_heads};
    };
    const long items = total * shape.kv_heads, part = part_of(items, threads);
    each(items, part < shape.kv_heads ? part : shape.kv_heads, threads, [&](long first, long end) {
        static thread_local Room room;
        T blank[WIDEST_HEAD];
        memset(blank, 0, sizeof(T) * shape.size);
        Ahead<T> ahead;
        Piece piece = piece_of(first), next;
        for (long item = first; item < end; ++item, piece = next) {
            const bool more = item + 1 < end && step.lengths[(next = piece_of(item + 1)).b] > 0;
            if (step.lengths[piece.b] == 0)
                for (long row = 0; row < piece.count; ++row)
                    memset(out + ((piece.first + row) * shape.heads + piece.kv_head * (shape.heads / shape.kv_heads)) * shape.size,
                           0, sizeof(T) * shape.heads / shape.kv_heads * shape.size);
            else attend(q, k_pages, v_pages, out, step, shape, piece, more ? &next : nullptr, blank, ahead, room);
        }
    });
}

}  // namespace
