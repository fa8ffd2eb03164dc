// Paged attention. A piece of work is a few query positions of one kv head, with all G query heads that share it: R rows.
// They meet K and V in blocks of BLOCK positions, the first a multiple of it, brought into panels (product.h) one by one:
//
//   scores [R, BLOCK] = q · Kᵀ,  m' = max(m, max scores),  p = exp(scores - m'),  l = l · exp(m - m') + Σ p,
//   sums [R, H] = sums · exp(m - m') + p · V,  and at the end sums / l.
//
// Both are products of bfloat16 where the processor has those. p is rounded to it, as FlashAttention does, and l is the sum of
// what it was rounded to.
//
// K and V in int8 become bfloat16 in their panels; K's scales multiply the scores, V's scales p where it meets V, which then
// stays float32.
//
// The order of all of it depends on a row's own position only: its bits are the same in a prompt, in any chunk of it and
// as a decode, alone and in any batch. A position that a row does not see adds exactly 0. Method: Milakov and Gimelshein,
// "Online normalizer calculation for softmax", 2018. Traffic: K and V are read once per piece of work.

#pragma once

#include "kv_block.h"
#include "room.h"

namespace {

constexpr long QUERIES = 16, WIDEST = 64;  // positions, and rows, of a piece

// How much of the next block, of its PARTS, has been asked for by the end of each piece of work on this one.
constexpr long WITH_PANEL = 5, BEFORE_SCORES = 36, WITH_SCORES = 52, WITH_WEIGHTS = 88;

struct Step {  // of a step: see Sequences in ops.py
    const int32_t *starts, *lengths, *table;
    long sequences, table_width;
};

struct Shape {
    long heads;
    Pages pages;
    float scale;
    const float* alibi;  // [heads] or null
    long window;         // 0: none
    float softcap;       // 0: none
};

// found [P][R] += weights [R][BLOCK] · V, whose positions are rows, for P · 16 columns from `column` on and for AT_ONCE positions
// from j on.
template <class Weight> constexpr long AT_ONCE = 1;
template <int R, int P, class S>
INLINE void add_positions(const S* const* values, long j, long left, long column, const float* weights, Lanes (&found)[P][R]) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
        const S* from = values[j] + column + p * COLUMNS;
        const Lanes v = P > 1 || left >= COLUMNS ? load(from) : load_some(from, left);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) found[p][r] = fma(all(weights[r * BLOCK + j]), v, found[p][r]);
    }
}

#if TANDEM_BF16_PRODUCTS
template <> constexpr long AT_ONCE<bf16> = 2;
template <int R, int P>
INLINE void add_positions(const bf16* const* values, long j, long left, long column, const bf16* weights, Lanes (&found)[P][R]) {
    __m512i v[P];
    pairs_of<P>(values[j] + column, values[j + 1] + column, left, v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) found[p][r] = add_pair(weights + r * BLOCK + j, v[p], found[p][r]);
    }
}
#endif

// sums [size / 16][R][16] += the same for `count` positions: the sums of `multiply` without its panels, which a single tile of
// rows does not repay. `beside` is called with each 16 positions.
template <int R, int P, class S, class Weight, class Beside>
INLINE void add_columns(const S* const* values, long count, long size, const Weight* weights, float* sums, long column,
                        const Beside& beside) {
    Lanes found[P][R];
    float* at = sums + column * R;
#pragma GCC unroll 64
    for (int i = 0; i < R * P; ++i) found[i / R][i % R] = load(at + i * COLUMNS);
    for (long j = 0; j < count; j += AT_ONCE<Weight>) {
        if (j % COLUMNS == 0 && column == 0) beside(j / COLUMNS);
        add_positions(values, j, size - column, column, weights, found);
    }
#pragma GCC unroll 64
    for (int i = 0; i < R * P; ++i) store(at + i * COLUMNS, found[i / R][i % R]);
}

// The same for all columns of `rows` rows; `rows` is R or less.
template <int R, class S, class Weight, class Beside>
void add_values(long rows, const S* const* values, long count, long size, const Weight* weights, float* sums,
                const Beside& beside) {
    if constexpr (R > 0) {
        if (rows < R) return add_values<R - 1>(rows, values, count, size, weights, sums, beside);
        constexpr int P = R <= WIDE_TILE ? 4 : TANDEM_AVX512 ? 2 : 1;
        long column = 0;
        for (; column + P * COLUMNS <= size; column += P * COLUMNS)
            add_columns<R, P>(values, count, size, weights, sums, column, beside);
        for (; column < size; column += COLUMNS) add_columns<R, 1>(values, count, size, weights, sums, column, beside);
    }
}

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
template <class S> struct Ahead {
    Block<S> blocks[2];
    int now = 0;
    bool found = false;
};

// What a factor is multiplied as by K or V.
template <class Factor, class Other> struct Multiplied { typedef float Type; };
#if TANDEM_BF16_PRODUCTS
template <> struct Multiplied<bf16, bf16> { typedef bf16 Type; };
#endif

INLINE void take_row(const bf16* from, bf16* to, long size) { memcpy(to, from, size * sizeof(bf16)); }
template <class T> INLINE void take_row(const T* from, float* to, long size) {
    for (long i = 0; i < size; ++i) to[i] = wide(from[i]);
}

// `next`: the piece that follows; null: none does.
template <class T, class S>
void attend(const T* q, T* out, const Step& step, const Shape& shape, const Piece& piece, const Piece* next, const S* blank,
            Ahead<S>& ahead, Room& room) {
    typedef typename InPanels<S>::Type Panel;
    typedef typename Multiplied<T, Panel>::Type Q;
    typedef typename Multiplied<T, S>::Type P;
    const long first = piece.first, count = piece.count, position = piece.position, kv_head = piece.kv_head;
    const long size = shape.pages.size, group = shape.heads / shape.pages.kv_heads, rows = count * group;
    const long outer = (size + COLUMNS - 1) / COLUMNS, last = piece.last();
    // scores [4][rows][16]
    float* scores = room.of(rows * size + rows * (BLOCK * 2 + outer * COLUMNS + 2) + BLOCK * size + BLOCK * outer * COLUMNS);
    P* weights = (P*)(scores + rows * BLOCK);          // [rows][BLOCK]
    float* sums = scores + 2 * rows * BLOCK;           // [outer][rows][16]
    float *tops = sums + rows * outer * COLUMNS, *totals = tops + rows;
    Q* queries = (Q*)(totals + rows);                  // [rows][size]
    Panel* keys = (Panel*)((float*)queries + rows * size);  // 4 panels of size · 16
    Panel* values = (Panel*)((float*)keys + BLOCK * size);  // `outer` panels of BLOCK · 16

    for (long r = 0; r < rows; ++r) {
        const T* from = q + ((first + r / group) * shape.heads + kv_head * group + r % group) * size;
        take_row(from, queries + r * size, size);
        tops[r] = -__builtin_inff();
        totals[r] = 0;
    }
    memset(sums, 0, sizeof(float) * rows * outer * COLUMNS);
    float lanes[COLUMNS];
    for (int i = 0; i < COLUMNS; ++i) lanes[i] = (float)i;
    const Lanes lane = load(lanes);

    const auto find = [&](const Piece& of, long base, Block<S>& into) {
        into.find(step.table + of.b * step.table_width, shape.pages, of.kv_head, base, of.panels_at(base) * COLUMNS,
                  of.seen_from(shape), step.lengths[of.b], blank);
    };
    if (!ahead.found) find(piece, piece.first_block(shape), ahead.blocks[ahead.now]);
    for (long base = piece.first_block(shape); base <= last; base += BLOCK, ahead.now ^= 1) {
        const long panels = piece.panels_at(base);
        const Block<S>& block = ahead.blocks[ahead.now];
        Block<S>& coming = ahead.blocks[ahead.now ^ 1];
        coming.count = 0;
        if (base + BLOCK <= last) find(piece, base + BLOCK, coming);
        else if (next) find(*next, next->first_block(shape), coming);
        const Panel* key_panels[BLOCK / COLUMNS];
        Lanes key_scales[4], value_scales[4];
        for (long p = 0; p < panels; ++p) {
            if (block.SCALED) {
                key_scales[p] = block.scales(block.key_scales, p);
                value_scales[p] = block.scales(block.value_scales, p);
            }
            key_panels[p] = keys + p * size * COLUMNS;
            keys_panel(block.keys + p * COLUMNS, size, keys + p * size * COLUMNS);
            coming.fetch(WITH_PANEL * (p + 1), size);
        }
        coming.fetch(BEFORE_SCORES, size);
        multiply(rows, queries, size, key_panels, panels, size, scores, rows, true);
        coming.fetch(WITH_SCORES, size);
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
                if (block.SCALED) s[p] = s[p] * key_scales[p];
                if (shape.softcap != 0)
                    s[p] = all(shape.softcap) * hyperbolic_tangent(s[p] / all(shape.softcap));
                if (shape.alibi)
                    s[p] = fma(all(shape.alibi[kv_head * group + r % group]), column - all((float)(own - base)), s[p]);
                s[p] = where_less(column, behind, where_less(before, column, s[p], hidden), hidden);
                most = larger(most, s[p]);
            }
            coming.fetch(WITH_SCORES + (WITH_WEIGHTS - WITH_SCORES) * (r + 1) / rows, size);
            const float block_top = largest(most);
            P* to = weights + r * BLOCK;
            if (block_top == -__builtin_inff() && !(tops[r] > -__builtin_inff())) {  // it has seen nothing yet
                for (long p = 0; p < panels; ++p) store(to + p * COLUMNS, zeros());
                continue;
            }
            const float top = block_top > tops[r] ? block_top : tops[r];
            Lanes total = zeros();
            for (long p = 0; p < panels; ++p) {
                const Lanes weight = as_stored(P(), exponential(s[p] - all(top)));
                store(to + p * COLUMNS, block.SCALED ? weight * value_scales[p] : weight);
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
        if (rows <= TILE) {
            add_values<TILE>(rows, block.values, panels * COLUMNS, size, weights, sums, [&](long panel) {
                coming.fetch(WITH_WEIGHTS + (PARTS - WITH_WEIGHTS) * (panel + 1) / panels, size);
            });
            continue;
        }
        coming.fetch(PARTS, size);
        const Panel* value_panels[WIDEST_HEAD / COLUMNS];
        for (long p = 0; p < outer; ++p) value_panels[p] = values + p * BLOCK * COLUMNS;
        values_panels(block.values, panels * COLUMNS, size, values, BLOCK * COLUMNS);
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
    const long fit = WIDEST / (shape.heads / shape.pages.kv_heads);
    return fit > QUERIES ? QUERIES : fit > 0 ? fit : 1;
}

// A sequence's last positions take longest: the pieces are handed out from the last to the first.
template <class T, class S> void attention(const T* q, T* out, const Step& step, const Shape& shape, int threads) {
    static thread_local Room list;
    const long piece = positions_of(shape), kv_heads = shape.pages.kv_heads;
    int32_t* ends = (int32_t*)list.of(step.sequences);  // pieces of the sequences up to each
    long total = 0;
    for (long b = 0; b < step.sequences; ++b)
        ends[b] = (int32_t)(total += (step.starts[b + 1] - step.starts[b] + piece - 1) / piece);
    const auto piece_of = [=](long item) {
        const long place = total - 1 - item / kv_heads;
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
                     item % kv_heads};
    };
    const long items = total * kv_heads, part = part_of(items, threads), width = shape.heads / kv_heads * shape.pages.size;
    each(items, part < kv_heads ? part : kv_heads, threads, [&](long first, long end) {
        static thread_local Room room;
        S blank[WIDEST_HEAD];
        memset(blank, 0, sizeof(S) * shape.pages.size);
        Ahead<S> ahead;
        Piece here = piece_of(first), next;
        for (long item = first; item < end; ++item, here = next) {
            // The one behind the last is fetched, too: this thread is the likeliest to take it.
            const bool more = item + 1 < items && step.lengths[(next = piece_of(item + 1)).b] > 0;
            if (step.lengths[here.b] == 0)
                for (long row = here.first; row < here.first + here.count; ++row)
                    memset(out + (row * kv_heads + here.kv_head) * width, 0, sizeof(T) * width);
            else attend(q, out, step, shape, here, more ? &next : nullptr, blank, ahead, room);
        }
    });
}

}  // namespace
