// The arguments of each function, as native.py lays them out: pointers to the first elements, rows one behind another.

#pragma once

#include <stdint.h>

// Before an instruction set is chosen, so that what is made of these runs on every processor: the linker keeps one copy.
#include <algorithm>
#include <functional>

// Of K and V, [kv_heads, page, size] each, `step` elements from one to the next. int8 ones have float16 scales, [kv_heads, page],
// `scale_step` apart; the others have none.
struct Pages {
    void *k, *v, *k_scale, *v_scale;
    long kv_heads, page, size, step, scale_step;
};

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

struct LinearInt8 {
    const void* x;
    const int8_t* w;
    const float* scale;
    const int32_t* totals;
    const void* bias;  // may be null
    void* y;
    float* room;  // [rows, ins + 4]
    long rows, ins, outs, activation, type, depth;
};

struct Quantize {
    const void* x;
    int8_t* values;
    float* scale;
    long rows, size, type;
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
    void* q;
    Pages pages;
    long rows, heads, half, interleaved, type;
    float eps;
};

struct Write {
    const void *k, *v;
    const int64_t* slots;
    Pages pages;
    long rows, k_step, v_step, type;  // elements from a row of k, and of v, to the next
};

struct Attention {
    const void* q;
    void* out;
    const int32_t *starts, *lengths, *table;
    const float* alibi;  // may be null
    Pages pages;
    long sequences, table_width, heads, window, type;
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

// One of the library's functions and its arguments.
struct ReplayStep {
    void (*function)(int set, int threads, const void* arguments);
    const void* arguments;
};

struct Replay {
    const ReplayStep* steps;
    long count;
};

struct Kernels {
    void (*pack)(const Pack&, int threads);
    void (*linear)(const Linear&, int threads);
    void (*linear_int8)(const LinearInt8&, int threads);
    void (*quantize)(const Quantize&, int threads);
    void (*lora)(const Lora&, int threads);
    void (*activate)(const Activate&, int threads);
    void (*norm)(const Norm&, int threads);
    void (*rotary)(const Rotary&, int threads);
    void (*write)(const Write&, int threads);
    void (*attention)(const Attention&, int threads);
    void (*greedy)(const Greedy&, int threads);
    void (*draw)(const Draw&, int threads);
    void (*logprobs)(const Logprobs&, int threads);
};
