// A row of logits in groups of GROUP neighbouring tokens, with the largest of each: what most questions about a row need to
// know before they look at its tokens. The last group is filled up with -∞.

#pragma once

#include "room.h"
#include "rows.h"

namespace {

constexpr long GROUP = 128;  // `LANES` of sampling.py
constexpr float INFINITE = __builtin_inff();

INLINE long whole_lanes(long count) { return (count + 15) / 16 * 16; }
INLINE long groups_of(long size) { return (size + GROUP - 1) / GROUP; }

template <class T> struct Vocabulary {
    const T* logits;
    long size, groups;
    float* peaks;  // [groups], up to whole lanes -∞
    float best;
    bool finite;  // the best is, and no logit is NaN
    T rest[GROUP];

    Vocabulary(const T* logits, long size, float* peaks) : logits(logits), size(size), groups(groups_of(size)), peaks(peaks) {
        for (long i = 0; i < GROUP; ++i) narrow(rest + i, -INFINITE);
        if (size % GROUP) memcpy(rest, logits + size / GROUP * GROUP, size % GROUP * sizeof(T));
        Lanes odd = zeros(), most_of_all = all(-INFINITE);  // odd: ∞ or NaN in a lane that saw one
        for (long g = 0; g < groups; ++g) {
            const T* at = group(g);
            Lanes most = all(-INFINITE);
            for (long i = 0; i < GROUP; i += 16) {
                Lanes x = load(at + i);
                most = larger(x, most);
                odd = where_less(x, all(INFINITE), odd, x);
            }
            peaks[g] = largest(most);
            most_of_all = larger(most, most_of_all);
        }
        for (long g = groups; g < whole_lanes(groups); ++g) peaks[g] = -INFINITE;
        best = largest(most_of_all);
        finite = sum(odd) == 0 && best > -INFINITE;
    }

    const T* group(long g) const { return (g + 1) * GROUP <= size ? logits + g * GROUP : rest; }

    // The first token that has the best logit.
    long most_likely() const {
        const long g = std::find(peaks, peaks + groups, best) - peaks;
        const T* at = group(g);
        long i = 0;
        while (wide(at[i]) != best) ++i;
        return g * GROUP + i;
    }

    // A logit that at least `count` tokens have or exceed, and not many more where the likely ones are spread out.
    // `copy` [groups]: room.
    float reached_by(long count, float* copy) const {
        if (count > groups) return -INFINITE;
        memcpy(copy, peaks, groups * sizeof(float));
        std::nth_element(copy, copy + count - 1, copy + groups, std::greater<float>());
        return copy[count - 1];
    }
};

}  // namespace
