// Log-probabilities of given tokens, their ranks and the most likely tokens: `token_logprobs` of ops.py.
//
//   value = f x[target] - f max x - log Σ exp(f x - f max x),  rank = 1 + #{x > x[target]}
//
// Two looks at a row, the second for sum and rank together. The most likely are picked from tokens that reach what as many
// groups have as their largest.

#pragma once

#include <math.h>

#include "vocabulary.h"

namespace {

struct Candidate {
    float logit;
    int32_t token;
    bool operator<(const Candidate& other) const { return logit > other.logit || (logit == other.logit && token < other.token); }
};

// The `count` most likely tokens in order. `candidates` [groups · GROUP], `copy` [groups]: room.
template <class T> void most_likely(const Vocabulary<T>& row, long count, Candidate* candidates, float* copy) {
    const float least = row.reached_by(count, copy);
    long found = 0;
    for (long g = 0; g < row.groups; ++g) {
        if (row.peaks[g] < least) continue;
        const T* at = row.group(g);
        for (long i = 0; i < GROUP && g * GROUP + i < row.size; ++i) {
            candidates[found] = {wide(at[i]), (int32_t)(g * GROUP + i)};
            found += candidates[found].logit >= least;
        }
    }
    std::partial_sort(candidates, candidates + count, candidates + found);
}

template <class T> void logprobs_of(const Logprobs& a, long r, Room& memory) {
    const long groups = groups_of(a.size), lanes = whole_lanes(groups);
    float* peaks = memory.of(2 * lanes + 2 * groups * GROUP);
    const Vocabulary<T> row((const T*)a.logits + r * a.size, a.size, peaks);
    const long target = a.targets[r];
    const float factor = a.factors ? a.factors[r] : 1, offset = factor * row.best;
    const float own = wide(row.logits[target < 0 ? 0 : target]);
    Lanes above = zeros();
    double mass = 0;
    for (long g = 0; g < groups; ++g) {
        Lanes part = zeros();
        for (long i = 0; i < GROUP; i += 16) {
            Lanes x = load(row.group(g) + i);
            above = above + where_less(all(own), x, all(1), zeros());
            part = part + exponential(x * all(factor) - all(offset));
        }
        mass += sum(part);
    }
    const float log_mass = row.finite ? (float)log(mass) : __builtin_nanf("");
    a.values[r] = target < 0 ? 0 : factor * own - offset - log_mass;
    a.ranks[r] = target < 0 ? 0 : 1 + (int64_t)sum(above);
    float* values = a.top_values + r * a.top;
    int64_t* tokens = a.top_tokens + r * a.top;
    if (!row.finite) {
        for (long i = 0; i < a.top; ++i) values[i] = log_mass, tokens[i] = i;
        return;
    }
    Candidate* candidates = (Candidate*)(peaks + 2 * lanes);
    if (a.top) most_likely(row, a.top, candidates, peaks + lanes);
    for (long i = 0; i < a.top; ++i) {
        values[i] = factor * candidates[i].logit - offset - log_mass;
        tokens[i] = candidates[i].token;
    }
}

}  // namespace
