// Rows in int8: round(x / scale), ties to even, with scale = max |x| / 127 of the row.

#pragma once

#include "lanes_int8.h"

namespace {

// max |x|; NaN where there is one.
template <class T> float greatest(const T* from, long size) {
    Lanes most = zeros();
    long i = 0;
    for (; i + 16 <= size; i += 16) most = larger_or_nan(most, magnitude(load(from + i)));
    if (i < size) most = larger_or_nan(most, magnitude(load_some(from + i, size - i)));
    float lanes[16];
    store(lanes, most);
    for (int lane = 1; lane < 16; ++lane)
        if (lanes[lane] > lanes[0] || lanes[lane] != lanes[lane]) lanes[0] = lanes[lane];
    return lanes[0];
}

// `to` [room] in one of the orders of lanes_int8.h; it is at least `size` long, and what is behind holds zeros.
template <class T, class Q> void quantize(const T* from, float scale, Q* to, long size, long room) {
    const Lanes bound = all(127.0f), step = all(scale);
    const auto whole = [=](Lanes x) { return larger(zeros() - bound, smaller(bound, x / step)); };
    long i = 0;
    for (; i + 16 <= size; i += 16) store(to + i, whole(load(from + i)));
    if (i == room) return;
    Q last[16];
    store(last, whole(load_some(from + i, size - i)));
    memcpy(to + i, last, sizeof(Q) * (room - i));
}

// One row; gives its scale.
template <class T, class Q> float quantize_row(const T* from, Q* to, long size, long room) {
    const float scale = greatest(from, size) / 127, least = 1.17549435e-38f;  // the smallest normal number
    const float used = scale < least ? least : scale;
    quantize(from, used, to, size, room);
    return used;
}

}  // namespace
