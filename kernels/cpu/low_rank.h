// Low-rank adapters: y += B · (A · x) for a row, with the A and B of its own adapter. A row is one thread's. A sum over D runs over
// 16 lanes, one over r in order. What is between A and B stays float32. Memory: a row reads its adapter once, from L2 where the
// row before had the same one.

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

// One row: x [ins], a [parts · rank, ins], b [rank, width], y [width] of `outs` outputs each; rank is a multiple of 4.
template <class T>
void lora(const T* x, const T* a, const T* b, const int64_t* outs, T* y, long ins, long parts, long rank, long width) {
    float inner[MOST_INNER];
    for (long j = 0; j < parts * rank; j += 4) dots<4>(x, a + j * ins, ins, inner + j);
    for (long p = 0; p < parts; b += outs[p], y += outs[p], ++p) {
        const float* own = inner + p * rank;
        long o = 0;
        for (; o + 64 <= outs[p]; o += 64) widen<4>(own, b + o, rank, width, y + o);
        for (; o + 16 <= outs[p]; o += 16) widen<1>(own, b + o, rank, width, y + o);
        if (o < outs[p]) widen_some(own, b + o, rank, width, y + o, outs[p] - o);
    }
}

}  // namespace
