// The arguments of each function, as native.py lays them out: pointers to the first elements, rows one behind another.

#pragma once

#include <stdint.h>

// Before an instruction set is chosen, so that what is made of these runs on every processor: the linker keeps one copy.
#include <algorithm>
#include <functional>

struct Pack {
    const void* w;
    void* into;
    long outs, ins, type;
};

struct Linear {
    const void *x, *w, *bias;  // bias may be null
    void* y;
    float* wide_x;  // room for x as float32, where x is bfloat16
    long rows, ins, outs, activation, type, w_type;
};

struct Lora {
    const void *x, *a, *b;
    const int64_t *slots, *outs;
    void* y;
    long rows, ins, parts, rank, type;
};

struct Activate {
    const void* x;
    void* y;
    long rows, outs, activation, type;
};

struct Norm {
    const void* x;
    void* residual;  // may be null
    const void *weight, *bias;  // without a bias an RMS norm, with one a layer norm
    void* y;
    long rows, size, type;
    float eps;
};

struct Rotary {
    const void *qkv, *q_norm, *k_norm;  // norms may be null
    const int64_t* positions;
    const float *cos, *sin;
    const int64_t* slots;
    void *q, *k, *v;
    long rows, heads, kv_heads, size, page, page_step, half, interleaved, type;
    float eps;
};

struct Attention {
    const void *q, *k, *v;
    void* out;
    const int32_t *starts, *lengths, *table;
    const float* alibi;  // may be null
    long sequences, table_width, heads, kv_heads, size, page, page_step, window, type;
    float scale, softcap;
};

struct Greedy {
    const void* logits;
    int64_t* tokens;
    long rows, size, type;
};

struct Draw {
    const void* logits;
    const float* temperature;
    const int64_t *seeds, *choices, *positions, *top_k;
    const float *top_p, *log_min_p;
    int64_t* tokens;
    float* lowest;
    long rows, size, type;
};

struct Logprobs {
    const void* logits;
    const int64_t* targets;
    const float* factors;  // may be null
    float* values;
    int64_t* ranks;
    float* top_values;
    int64_t* top_tokens;
    long rows, size, top, type;
};

struct Kernels {
    void (*pack)(const Pack&, int threads);
    void (*linear)(const Linear&, int threads);
    void (*lora)(const Lora&, int threads);
    void (*activate)(const Activate&, int threads);
    void (*norm)(const Norm&, int threads);
    void (*rotary)(const Rotary&, int threads);
    void (*attention)(const Attention&, int threads);
    void (*greedy)(const Greedy&, int threads);
    void (*draw)(const Draw&, int threads);
    void (*logprobs)(const Logprobs&, int threads);
};
