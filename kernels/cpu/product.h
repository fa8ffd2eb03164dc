// Products with a matrix in panels of 16 columns: y = x · Wᵀ, where W [N, K] is stored so that 16 outputs are computed side
// by side, [N / 16][K / 2][16][2] in bfloat16, [N / 16][K][16] in float32; int8 see additions.h.
//
// An output is one chain of fused multiply-adds over K in order. So a row has the same bits whatever rows are computed
// with it. Memory: every panel is read once per ROWS rows of x.

#pragma once

#include "additions.h"
#include "crew.h"

namespace {

constexpr long ROWS = 64, DEPTH = 1024;  // of x between two readings of W; of K per visit of a tile

// Rows that a tile of one panel (with AVX-512 also of two) holds, and one of four: their sums, and two registers for W, must
// fit the registers.
#if TANDEM_AVX512
constexpr long TILE = 12, WIDE_TILE = 6;
#else
constexpr long TILE = 5, WIDE_TILE = 1;
#endif

// What a tile brings to the second-level cache beside its products: of each of its panels, what lies `ahead` bytes behind it,
// `pace` bytes with every step of K.
struct Fetch { long ahead, pace; };

// R rows of x (stride `x_step`) times P panels, over `depth` of K (a multiple of STEP). c [P][.. `c_step` rows][16]: sums so
// far. Few rows take W from memory panel by panel, more of them share registers.
template <int R, int P, class X, class W>
INLINE void tile(const X* x, long x_step, const W* const* panels, long depth, float* c, long c_step, bool fresh, Fetch fetch) {
    constexpr int THIRDS = (R + 2) / 3;
    Lanes sums[P][R];
    const W* w[P];
    const char* coming[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
        w[p] = panels[p];
        coming[p] = (const char*)w[p] + fetch.ahead;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sums[p][r] = fresh ? zeros() : load(c + (p * c_step + r) * COLUMNS);
    }
    // Of every third row a pointer, by which an instruction finds the next two as well: one for each row, and some would lie
    // in vector registers, whose moves cost as much as products.
    const X* thirds[THIRDS];
#pragma GCC unroll 8
    for (int t = 0; t < THIRDS; ++t) thirds[t] = x + 3 * t * x_step;
    for (long k = 0; k < depth; k += STEP<X, W>) {
        // The processor follows a stream to the end of its 4 KiB page. That is enough for four at a time, which wait for
        // memory anyway, but between more rows' products one or two would wait at each page.
        if (P < 4) {
#pragma GCC unroll 2
            for (int p = 0; p < P; ++p) __builtin_prefetch(coming[p], 0, 2), coming[p] += fetch.pace;
        }
#pragma GCC unroll 64
        for (int i = 0; i < R * P; ++i) {
            const int r = P < 4 ? i / P : i % R, p = P < 4 ? i % P : i / R;
            sums[p][r] = add<R>(thirds[r / 3] + r % 3 * x_step, w[p], sums[p][r]);
        }
#pragma GCC unroll 8
        for (int t = 0; t < THIRDS; ++t) {
            thirds[t] += STEP<X, W>;
            asm("" : "+r"(thirds[t]));
        }
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) w[p] += STEP<X, W> * COLUMNS;
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) store(c + (p * c_step + r) * COLUMNS, sums[p][r]);
    }
}

// Rows by a template's number: R = rows, or one less.
template <int R, int P, class X, class W>
void rows_of(long rows, const X* x, long x_step, const W* const* w, long depth, float* c, long c_step, bool fresh, Fetch fetch) {
    if constexpr (R > 0) {
        if (rows == R) return tile<R, P>(x, x_step, w, depth, c, c_step, fresh, fetch);
        rows_of<R - 1, P>(rows, x, x_step, w, depth, c, c_step, fresh, fetch);
    }
}

// `rows` rows times `count` panels that start at w[0], w[1], …; c [count][c_step][16]. What lies `ahead` bytes behind those panels is
// fetched, a part with each tile of rows; 0: nothing.
template <class X, class W>
void multiply(long rows, const X* x, long x_step, const W* const* w, long count, long depth, float* c, long c_step,
                     bool fresh, long ahead = 0) {
    const long tiles = (rows + TILE - 1) / TILE;
    for (long t = 0, first = 0; t < tiles; ++t) {
        const long here = (rows - first + tiles - t - 1) / (tiles - t);  // shared out evenly
        const X* from = x + first * x_step;
        float* to = c + first * COLUMNS;
        constexpr long LINES = STEP<X, W> * COLUMNS * sizeof(W);
        Fetch fetch = {0, 0};
        if (ahead) fetch = {ahead + depth * COLUMNS * (long)sizeof(W) * t / tiles, (LINES + tiles - 1) / tiles};
        long p = 0;
        // Few rows are few chains of additions: several panels at a time fill the pipelines.
        if (here <= WIDE_TILE)
            for (; p + 4 <= count; p += 4)
                rows_of<WIDE_TILE, 4>(here, from, x_step, w + p, depth, to + p * c_step * COLUMNS, c_step, fresh, fetch);
        if (here <= TILE / 2 || TANDEM_AVX512)
            for (; p + 2 <= count; p += 2)
                rows_of<TANDEM_AVX512 ? TILE : TILE / 2, 2>(here, from, x_step, w + p, depth, to + p * c_step * COLUMNS,
                                                            c_step, fresh, fetch);
        for (; p < count; ++p)
            rows_of<TILE, 1>(here, from, x_step, w + p, depth, to + p * c_step * COLUMNS, c_step, fresh, fetch);
        first += here;
    }
}

enum Activation { NONE, SILU_AND_MUL, GELU_TANH, GELU };

INLINE Lanes silu(Lanes x) { return x / (all(1.0f) + exponential(zeros() - x)); }
INLINE Lanes gelu_tanh(Lanes x) {
    Lanes inner = all(0.7978845608f) * fma(x * x * x, all(0.044715f), x);
    return all(0.5f) * x * (all(1.0f) + hyperbolic_tangent(inner));
}

// x · Φ(x) with Φ(x) = erfc(-x / √2) / 2. erfc(z) = e^(-z²) · f(t), t = 1 / (1 + 0.4 z); f is a polynomial that was fitted for
// 0 <= z <= 10 at Chebyshev's points, 2e-8 off.
INLINE Lanes gelu(Lanes x) {
    const float f[] = {0.225714177f, 0.224802673f, 0.216226116f,  0.12328095f,  0.291403413f,
                       -0.321848214f, 0.594138443f, -0.53497237f, 0.213839307f, -0.0325844735f};
    Lanes z = larger(x, zeros() - x) * all(0.707106781f), t = all(1.0f) / fma(all(0.4f), z, all(1.0f));
    Lanes y = all(f[9]);
    for (int i = 8; i >= 0; --i) y = fma(y, t, all(f[i]));
    Lanes half = all(0.5f) * t * y * exponential(zeros() - z * z);
    return x * where_less(x, zeros(), half, all(1.0f) - half);
}

// What the sums of a panel, whose first output is `column`, and of row r of x stand for.
struct Floats {
    INLINE Lanes of(Lanes sums, long column, long row) const { return sums; }
    Floats from(long row) const { return *this; }
};

// int8 outputs: `scale` [panels · 16].
struct ScaledOutputs {
    const float* scale;
    INLINE Lanes of(Lanes sums, long column, long row) const { return sums * load(scale + column); }
    ScaledOutputs from(long row) const { return *this; }
};

// int8 rows and outputs.
struct ScaledBoth {
    const float *scale, *x_scale;
    const int32_t* totals;
    INLINE Lanes of(Lanes sums, long column, long row) const {
#if TANDEM_INT8_PRODUCTS
        sums = whole_sums(sums, totals + column);  // x was 128 more than it should be
#else
        sums = whole_sums(sums);
#endif
        return sums * all(x_scale[row]) * load(scale + column);
    }
    ScaledBoth from(long row) const { return {scale, x_scale + row, totals}; }
};

// y [rows, outs] = activation(x [rows, ins] · Wᵀ + bias), rounded to T before the activation as well. `x` holds the same
// as rows of T where the processor multiplies T itself, else as float32, or int8. silu_and_mul: W holds gate above up,
// `outs` each. Here its `count` panels of the result from `first` on; there are at most ROWS rows.
template <class T, class X, class W, class Meant>
void some_panels(const X* x, const W* w, const Meant& meant, const T* bias, T* y, long rows, long ins, long outs,
                 int activation, long first, long count) {
    const bool gated = activation == SILU_AND_MUL;
    const long panels = (outs + COLUMNS - 1) / COLUMNS, all_panels = gated ? 2 * count : count;
    float c[4 * ROWS * COLUMNS];
    const W* starts[4];
    // The result's lines are asked for before its sums: a store that waits for memory holds up those behind it.
    for (long r = 0; r < rows; ++r)
        for (long column = first * COLUMNS; column < outs && column < (first + count) * COLUMNS; column += 64 / (long)sizeof(T))
            __builtin_prefetch(y + r * outs + column, 1, 2);
    for (long k = 0; k < ins; k += DEPTH) {
        for (long p = 0; p < all_panels; ++p)
            starts[p] = w + ((p < count ? first + p : panels + first + p - count) * ins + k) * COLUMNS;
        multiply(rows, x + k, ins, starts, all_panels, ins - k < DEPTH ? ins - k : DEPTH, c, rows, k == 0, count * ins * COLUMNS * sizeof(W));
    }
    for (long p = 0; p < count; ++p) {
        const long column = (first + p) * COLUMNS, width = outs - column < COLUMNS ? outs - column : COLUMNS;
        const bool whole = width == COLUMNS;
        Lanes b = zeros(), b_up = zeros();
        if (bias) {
            b = whole ? load(bias + column) : load_some(bias + column, width);
            if (gated) b_up = load(bias + outs + column);
        }
        for (long r = 0; r < rows; ++r) {
            Lanes v = meant.of(load(c + (p * rows + r) * COLUMNS), column, r) + b;
            if (activation != NONE) v = as_stored(T(), v);
            if (gated) {
                const Lanes up = load(c + ((count + p) * rows + r) * COLUMNS);
                v = silu(v) * as_stored(T(), meant.of(up, outs + column, r) + b_up);
            }
            if (activation == GELU_TANH) v = gelu_tanh(v);
            if (activation == GELU) v = gelu(v);
            T* to = y + r * outs + column;
            if (whole) store(to, v);
            else store_some(to, v, width);
        }
    }
}

// All of it.
template <class T, class X, class W, class Meant>
void linear(const X* x, const W* w, const Meant& meant, const T* bias, T* y, long rows, long ins, long outs, int activation,
            int threads) {
    const long panels = (outs + COLUMNS - 1) / COLUMNS;
    // Two panels where a tile holds no more and there is one block of rows: smaller parts end closer together.
    const long most = TANDEM_AVX512 && rows > WIDE_TILE && rows <= ROWS ? 2 : 4;
    const long group = activation == SILU_AND_MUL ? most / 2 : most;  // panels of the result that are computed together
    const long groups = (panels + group - 1) / group, blocks = (rows + ROWS - 1) / ROWS;
    each(blocks * groups, groups / 32 > 1 ? groups / 32 : 1, threads, [=](long begin, long end) {
        for (long item = begin; item < end; ++item) {
            const long top = item / groups * ROWS, first = item % groups * group;
            some_panels(x + top * ins, w, meant.from(top), bias, y + top * outs, rows - top < ROWS ? rows - top : ROWS, ins, outs,
                        activation, first, panels - first < group ? panels - first : group);
        }
    });
}

// to [outs] = activation(x) for one row, the bits that `linear` gives behind a product. silu_and_mul: x has gate, then up.
template <class T> void activate(const T* from, T* to, long outs, int activation) {
    for (long column = 0; column < outs; column += COLUMNS) {
        const long width = outs - column;
        const bool whole = width >= COLUMNS;
        Lanes v = whole ? load(from + column) : load_some(from + column, width);
        if (activation == SILU_AND_MUL)
            v = silu(v) * (whole ? load(from + outs + column) : load_some(from + outs + column, width));
        if (activation == GELU_TANH) v = gelu_tanh(v);
        if (activation == GELU) v = gelu(v);
        if (whole) store(to + column, v);
        else store_some(to + column, v, width);
    }
}

// Panels of W [outs, ins], what is beyond `outs` 0.
void pack_panel(const bf16* w, bf16* to, long panel, long outs, long ins) {
    for (long k = 0; k < ins; k += 2)
        for (long column = 0; column < COLUMNS; ++column, to += 2) {
            const bool there = panel * COLUMNS + column < outs;
            const bf16* from = w + (panel * COLUMNS + column) * ins + k;
            to[0] = there ? from[0] : 0;
            to[1] = there ? from[1] : 0;
        }
}

void pack_panel(const float* w, float* to, long panel, long outs, long ins) {
    for (long k = 0; k < ins; ++k)
        for (long column = 0; column < COLUMNS; ++column)
            *to++ = panel * COLUMNS + column < outs ? w[(panel * COLUMNS + column) * ins + k] : 0;
}

template <class W> void pack(const W* w, W* into, long outs, long ins, int threads) {
    const long panels = (outs + COLUMNS - 1) / COLUMNS;
    each(panels, part_of(panels, threads), threads, [=](long first, long end) {
        for (long panel = first; panel < end; ++panel) pack_panel(w, into + panel * ins * COLUMNS, panel, outs, ins);
    });
}

}  // namespace
