// The draw of a row's token: `draw` of sampling.py. A group of tokens is drawn first, then one of its tokens:
//
//   s = (x - max x) / temperature,  w = eˢ where s >= lowest, else 0,  group: argmax Σ w / noise,  token: argmax w / noise
//
// A group weighs at most GROUP times its likeliest token, which is known from the first look at the row. So only groups
// whose bound exceeds the best found so far are added up: a few of them, beside that one look at V logits.

#pragma once

#include <math.h>

#include "vocabulary.h"

namespace {

constexpr float GREEDY_BELOW = 1e-5f;
constexpr int ROUNDS = 10, COUNTERS = 16;  // of Philox, and how many are worked on side by side
constexpr long BUCKETS = 1024;             // of values, when top-p looks for its threshold
constexpr float NEAR = -8, WEIGHTLESS = -104;  // values that top-p tries first, and under which e^s is 0

// Philox-4x32-10 of counters (first … first + COUNTERS - 1, position, choice, 0) -> 4 words each; see `philox`.
void philox(uint32_t first, uint32_t position, uint32_t choice, uint64_t seed, uint32_t* to) {
    uint32_t a[COUNTERS], b[COUNTERS], c[COUNTERS], d[COUNTERS];
    for (int i = 0; i < COUNTERS; ++i) a[i] = first + i, b[i] = position, c[i] = choice, d[i] = 0;
    uint32_t low = (uint32_t)seed, high = (uint32_t)(seed >> 32);
    for (int round = 0; round < ROUNDS; ++round, low += 0x9E3779B9u, high += 0xBB67AE85u)
        for (int i = 0; i < COUNTERS; ++i) {
            const uint64_t p = (uint64_t)a[i] * 0xD2511F53u, q = (uint64_t)c[i] * 0xCD9E8D57u;
            a[i] = (uint32_t)(q >> 32) ^ b[i] ^ low;
            b[i] = (uint32_t)q;
            c[i] = (uint32_t)(p >> 32) ^ d[i] ^ high;
            d[i] = (uint32_t)p;
        }
    for (int i = 0; i < COUNTERS; ++i) to[4 * i] = a[i], to[4 * i + 1] = b[i], to[4 * i + 2] = c[i], to[4 * i + 3] = d[i];
}

// Exponential noise [count], `draws` of sampling.py; room for count up to a multiple of 4 · COUNTERS.
void exponential_noise(uint64_t seed, uint32_t choice, uint32_t position, float* to, long count) {
    uint32_t words[4 * COUNTERS];
    for (long begin = 0; begin < count; begin += 4 * COUNTERS) {
        philox((uint32_t)(begin / 4), position, choice, seed, words);
        for (int i = 0; i < 4 * COUNTERS; ++i) {
            const float v = (float)words[i] * 0x1p-32f + 0x1p-33f;
            to[begin + i] = -log1pf(-std::min(v, 1 - 0x1p-24f));
        }
    }
}

struct Filters {
    long top_k;  // 0: off
    float top_p, log_min_p;
};

template <class T> struct Drawing {
    const Vocabulary<T>& row;
    float temperature;
    float* peaks;  // of s, up to whole lanes
    float lowest;

    Lanes scaled(Lanes x) const { return (x - all(row.best)) / all(temperature); }

    // The weights of a group [GROUP], and their sum.
    float weigh(long g, float* weights) const {
        Lanes total = zeros();
        for (long i = 0; i < GROUP; i += 16) {
            Lanes s = scaled(load(row.group(g) + i));
            Lanes w = where_less(s, all(lowest), zeros(), exponential(s));
            store(weights + i, w);
            total = total + w;
        }
        return sum(total);
    }

    // The group, then the token in it, that noise [groups + GROUP] makes the largest. `bounds`: [groups] up to whole lanes.
    long token(const float* noise, float* bounds) const {
        float weights[GROUP];
        for (long g = 0; g < row.groups; g += 16)
            store(bounds + g, all(GROUP * 1.0001f) * exponential(load(peaks + g)) / load(noise + g));
        long winner = std::max_element(bounds, bounds + row.groups) - bounds;
        float most = weigh(winner, weights) / noise[winner];
        for (long g = 0, first = winner; g < row.groups; ++g) {
            if (g == first || bounds[g] < most) continue;
            const float found = weigh(g, weights) / noise[g];
            if (found > most || (found == most && g < winner)) most = found, winner = g;
        }
        weigh(winner, weights);
        const float* own = noise + row.groups;
        for (long i = 0; i < GROUP; ++i) weights[i] /= own[i];
        return winner * GROUP + (std::max_element(weights, weights + GROUP) - weights);
    }

    // All s >= least, to `to`; how many. Beyond the vocabulary there are more of -∞.
    long gather(float least, float* to) const {
        long count = 0;
        for (long g = 0; g < row.groups; ++g) {
            if (peaks[g] < least) continue;
            float values[GROUP];
            for (long i = 0; i < GROUP; i += 16) store(values + i, scaled(load(row.group(g) + i)));
            for (long i = 0; i < GROUP; ++i) {
                to[count] = values[i];
                count += values[i] >= least;
            }
        }
        return count;
    }

    float kth(long k, float* room) const {
        const float reached = row.reached_by(k, room);  // a logit; a token that reaches it has an s that does, too
        const long count = gather(reached == -INFINITE ? reached : (reached - row.best) / temperature, room);
        std::nth_element(room, room + k - 1, room + count, std::greater<float>());
        return room[k - 1];
    }

    // The s at which the mass, summed from the most likely on, reaches top_p of that of all s >= kth.
    float nucleus(float top_p, float kth, float* room) {
        double all_mass = 0;
        float weights[GROUP];
        lowest = kth;
        for (long g = 0; g < row.groups; ++g)
            if (peaks[g] >= kth) all_mass += weigh(g, weights);
        const float wanted = top_p * (float)all_mass;
        for (float least = std::max(kth, NEAR);; least = kth) {
            float cut;
            if (reaches(wanted, gather(least, room), std::max(least, WEIGHTLESS), room, &cut)) return cut;
            if (least == kth) return kth;
        }
    }

    // Whether the mass of values [count], from `least` on, reaches `wanted`, and at which of them.
    bool reaches(float wanted, long count, float least, float* values, float* cut) const {
        double masses[BUCKETS] = {0}, mass = 0;
        const float width = (BUCKETS - 1) / std::min(least, -1e-3f);
        const auto bucket = [&](float s) { return std::min((long)(std::max(s, WEIGHTLESS) * width), BUCKETS - 1); };
        float weights[16];
        for (long i = 0; i < count; i += 16) {
            store(weights, exponential(i + 16 <= count ? load(values + i) : load_some(values + i, count - i)));
            for (long j = 0; j < 16 && i + j < count; ++j) masses[bucket(values[i + j])] += weights[j];
        }
        long b = 0;
        for (; b < BUCKETS && mass + masses[b] < wanted; ++b) mass += masses[b];
        if (b == BUCKETS) return false;
        long some = 0;
        for (long i = 0; i < count; ++i)
            if (bucket(values[i]) == b) values[some++] = values[i];
        std::sort(values, values + some, std::greater<float>());
        *cut = values[0];
        for (long i = 0; i < some && mass < wanted; ++i) {
            store(weights, exponential(all(values[i])));
            mass += weights[0];
            *cut = values[i];
        }
        return true;
    }

    float threshold(const Filters& filters, float* room) {
        const bool limited = 0 < filters.top_k && filters.top_k < row.size;
        const float k = limited ? kth(filters.top_k, room) : -INFINITE;
        const float p = filters.top_p < 1 ? nucleus(filters.top_p, k, room) : -INFINITE;
        return std::max(filters.log_min_p, std::max(k, p));
    }
};

template <class T> void draw_row(const Draw& a, long r, Room& memory) {
    const long groups = groups_of(a.size), lanes = whole_lanes(groups), whole = groups * GROUP;
    float* peaks = memory.of(3 * lanes + groups + GROUP + 4 * COUNTERS + 16 + whole);
    float *scaled_peaks = peaks + lanes, *bounds = scaled_peaks + lanes, *noise = bounds + lanes;
    float* room = noise + (groups + GROUP + 4 * COUNTERS + 15) / 16 * 16;
    const Vocabulary<T> row((const T*)a.logits + r * a.size, a.size, peaks);
    a.lowest[r] = -INFINITE;
    a.tokens[r] = -1;
    if (!row.finite) return;
    if (a.temperature[r] < GREEDY_BELOW) {
        a.tokens[r] = row.most_likely();
        return;
    }
    Drawing<T> drawing = {row, a.temperature[r], scaled_peaks, -INFINITE};
    for (long g = 0; g < groups; g += 16) store(scaled_peaks + g, drawing.scaled(load(peaks + g)));
    drawing.lowest = a.lowest[r] = drawing.threshold({a.top_k[r], a.top_p[r], a.log_min_p[r]}, room);
    exponential_noise((uint64_t)a.seeds[r], (uint32_t)a.choices[r], (uint32_t)a.positions[r], noise, groups + GROUP);
    a.tokens[r] = drawing.token(noise, bounds);
}

}  // namespace
