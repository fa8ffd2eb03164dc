// Low-rank adapters: y += B · (A · x), row by row, with the A and B of the row's own adapter. A row is one thread's. A sum over D
// runs over 16 lanes, one over r in order. What is between A and B stays float32. Memory: a row reads its adapter once, from L2
// where the row before had the same one.

#pragma once

#include "product.h"

namespace {

constexpr long MOST_INNER = 4096;  // n · r

// Of x [ins] with J rows of A.
template <int J, class T> INLINE void dots(const T* x, const T* a, long ins, float* into) {
    Lanes sums[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sums[j] = zeros();
    long k = 0;
    for (; k + 16 <= ins; k += 16) {
        Lanes value = load(x + k);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) sums[j] = fma(value, load(a + j * ins + k), sums[j]);
    }
    if (k < ins) {
        Lanes value = load_some(x + k, ins - k);
#pragma GCC unroll 8
        for (int j = 0; j < J; ++j) sums[j] = fma(value, load_some(a + j * ins + k, ins - k), sums[j]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) into[j] = sum(sums[j]);
}

// y[0 … 16 V) += inner [rank] · b, whose rows are `step` apart.
template <int V, class T> INLINE void widen(const float* inner, const T* b, long rank, long step, T* y) {
    Lanes sums[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[v] = zeros();
    for (long j = 0; j < rank; ++j) {
        Lanes factor = all(inner[j]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[v] = fma(factor, load(b + j * step + 16 * v), sums[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(y + 16 * v, load(y + 16 * v) + sums[v]);
}

template <class T> void widen_some(const float* inner, const T* b, long rank, long step, T* y, long count) {
    Lanes sums = zeros();
    for (long j = 0; j < rank; ++j) sums = fma(all(inner[j]), load_some(b + j * step, count), sums);
    store_some(y, load_some(y, count) + sums, count);
}

// x [rows, ins], a [S, parts · rank, ins], b [S, rank, sum of outs], y [rows, sum of outs]; rank is a multiple of 4.
template <class T>
void lora(const T* x, const T* a, const T* b, const int64_t* slots, const int64_t* outs, T* y, long rows, long ins, long parts,
          long rank) {
    const long lines = parts * rank;
    long width = 0;
    for (long p = 0; p < parts; ++p) width += outs[p];
#pragma omp for schedule(dynamic, 4)
    for (long row = 0; row < rows; ++row) {
        if (slots[row] == 0) continue;
        const T *from = x + row * ins, *down = a + (slots[row] - 1) * lines * ins, *up = b + (slots[row] - 1) * rank * width;
        T* to = y + row * width;
        float inner[MOST_INNER];
        for (long j = 0; j < lines; j += 4) dots<4>(from, down + j * ins, ins, inner + j);
        for (long p = 0; p < parts; up += outs[p], to += outs[p], ++p) {
            const float* own = inner + p * rank;
            long o = 0;
            for (; o + 64 <= outs[p]; o += 64) widen<4>(own, up + o, rank, width, to + o);
            for (; o + 16 <= outs[p]; o += 16) widen<1>(own, up + o, rank, width, to + o);
            if (o < outs[p]) widen_some(own, up + o, rank, width, to + o, outs[p] - o);
        }
    }
}

}  // namespace
