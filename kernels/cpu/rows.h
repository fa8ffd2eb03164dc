// What happens to one row at a time: norms, rotation, the write of K and V. A row is one thread's, its sums run over 16 lanes.

#pragma once

#include "calls.h"
#include "product.h"
#include "quantize.h"

namespace {

constexpr long WIDEST_HEAD = 1024;

// Adds x to the residual, if there is one, and normalises the sum. Each result is rounded to T as the definition does.
template <class T> void rms_norm(const T* from, T* residual, const T* weight, T* to, long size, float eps) {
    Lanes squares = zeros();
    long i = 0;
    for (; i + 16 <= size; i += 16) {
        Lanes v = load(from + i);
        if (residual) {
            v = as_stored(T(), load(residual + i) + v);
            store(residual + i, v);
        }
        squares = fma(v, v, squares);
    }
    if (residual) {
        for (long j = i; j < size; ++j) narrow(residual + j, wide(residual[j]) + wide(from[j]));
        from = residual;
    }
    if (i < size) {
        const Lanes v = load_some(from + i, size - i);
        squares = fma(v, v, squares);
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)size + eps);
    for (i = 0; i + 16 <= size; i += 16)
        store(to + i, as_stored(T(), load(from + i) * all(scale)) * load(weight + i));
    if (i < size) {
        Lanes v = as_stored(T(), load_some(from + i, size - i) * all(scale));
        store_some(to + i, v * load_some(weight + i, size - i), size - i);
    }
}

template <class T>
void layer_norm(const T* from, T* residual, const T* weight, const T* bias, T* to, long size, float eps) {
    Lanes total = zeros(), squares = zeros();
    long i = 0;
    if (residual) {
        for (; i + 16 <= size; i += 16) store(residual + i, load(residual + i) + load(from + i));
        for (; i < size; ++i) narrow(residual + i, wide(residual[i]) + wide(from[i]));
        from = residual;
    }
    for (i = 0; i + 16 <= size; i += 16) total = total + load(from + i);
    if (i < size) total = total + load_some(from + i, size - i);
    const float mean = sum(total) / (float)size;
    for (i = 0; i + 16 <= size; i += 16) {
        Lanes v = load(from + i) - all(mean);
        squares = fma(v, v, squares);
    }
    float rest = 0;
    for (; i < size; ++i) rest += (wide(from[i]) - mean) * (wide(from[i]) - mean);
    const float scale = 1.0f / __builtin_sqrtf((sum(squares) + rest) / (float)size + eps);
    for (i = 0; i + 16 <= size; i += 16)
        store(to + i, fma((load(from + i) - all(mean)) * all(scale), load(weight + i), load(bias + i)));
    for (; i < size; ++i)
        narrow(to + i, __builtin_fmaf((wide(from[i]) - mean) * scale, wide(weight[i]), wide(bias[i])));
}

// Rotary embedding of the first 2 · `half` elements of a head [size] in place, float32. See ops.py for the formula.
void rotate(float* head, const float* cos, const float* sin, long half, bool interleaved) {
    if (interleaved) {
        for (long i = 0; i < half; ++i) {
            const float a = head[2 * i], b = head[2 * i + 1];
            head[2 * i] = a * cos[i] - b * sin[i];
            head[2 * i + 1] = b * cos[i] + a * sin[i];
        }
        return;
    }
    long i = 0;
    for (; i + 16 <= half; i += 16) {
        Lanes a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
        store(head + i, a * c - b * s);
        store(head + half + i, b * c + a * s);
    }
    for (; i < half; ++i) {
        const float a = head[i], b = head[half + i];
        head[i] = a * cos[i] - b * sin[i];
        head[half + i] = b * cos[i] + a * sin[i];
    }
}

// One head of a token, [size], to `values` and, where they are int8, its scale to `scales`, both of `pages`, at `slot`.
template <class T> void write_head(const T* from, void* values, void* scales, const Pages& pages, long slot, long head) {
    const long page = slot / pages.page, line = head * pages.page + slot % pages.page;
    const long place = page * pages.step + line * pages.size;
    if (!scales) {
        memcpy((T*)values + place, from, pages.size * sizeof(T));
        return;
    }
    float16* kept = (float16*)scales + page * pages.scale_step + line;
    const float scale = greatest(from, pages.size) / 127, least = 6.10351562e-5f;  // float16's smallest normal number
    narrow(kept, scale < least ? least : scale);
    quantize(from, wide(*kept), (int8_t*)values + place, pages.size, pages.size);
}

// A row of qkv [N + 2 K, size] -> q [N, size]; k and v into pages at `slot`. `norms`: weights of an RMS norm over each head of
// q, then of k; null without.
template <class T>
void rotary_and_write(const T* from, const T* q_norm, const T* k_norm, float eps, const float* cos, const float* sin,
                      long half, bool interleaved, long slot, T* q, const Pages& pages, long queries) {
    const long size = pages.size, kv_heads = pages.kv_heads;
    float head[WIDEST_HEAD];
    T key[WIDEST_HEAD];
    for (long h = 0; h < queries + kv_heads; ++h, from += size) {
        const T* norm = h < queries ? q_norm : k_norm;
        long i = 0;
        for (; i + 16 <= size; i += 16) store(head + i, load(from + i));
        for (; i < size; ++i) head[i] = wide(from[i]);
        if (norm) {
            Lanes squares = zeros();
            for (i = 0; i + 16 <= size; i += 16) squares = fma(load(head + i), load(head + i), squares);
            float total = sum(squares);
            for (; i < size; ++i) total += head[i] * head[i];
            const float scale = 1.0f / __builtin_sqrtf(total / (float)size + eps);
            for (i = 0; i < size; ++i) head[i] = head[i] * scale * wide(norm[i]);
        }
        rotate(head, cos, sin, half, interleaved);
        T* to = h < queries ? q + h * size : key;
        for (i = 0; i + 16 <= size; i += 16) store(to + i, load(head + i));
        for (; i < size; ++i) narrow(to + i, head[i]);
        if (h >= queries) write_head(key, pages.k, pages.k_scale, pages, slot, h - queries);
    }
    for (long h = 0; h < kv_heads; ++h, from += size) write_head(from, pages.v, pages.v_scale, pages, slot, h);
}

}  // namespace
