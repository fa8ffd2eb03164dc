// The functions that Python calls (native.py), for one instruction set. Number types: 0 float32, 1 bfloat16.

#include "attention.h"
#include "draw.h"
#include "logprobs.h"
#include "low_rank.h"

namespace {

// Multiplications, or elements of rows, below which a second thread costs more than it brings.
constexpr long FEW_PRODUCTS = 1 << 18, FEW_ELEMENTS = 1 << 15;

void run_pack(const Pack& a, int threads) {
    if (a.type) pack((const bf16*)a.w, (bf16*)a.into, a.outs, a.ins, threads);
    else pack((const float*)a.w, (float*)a.into, a.outs, a.ins, threads);
}

template <class X, class W, class T>
void linear_of(const Linear& a, const X* x, T* y, int threads) {
    linear(x, (const W*)a.w, (const T*)a.bias, y, a.rows, a.ins, a.outs, a.activation, threads);
}

void run_linear(const Linear& a, int threads) {
    if (a.rows * a.ins * a.outs < FEW_PRODUCTS) threads = 1;
    if (a.type == 0) {
        if (a.w_type) linear_of<float, bf16>(a, (const float*)a.x, (float*)a.y, threads);
        else linear_of<float, float>(a, (const float*)a.x, (float*)a.y, threads);
        return;
    }
    const bf16* x = (const bf16*)a.x;
#if TANDEM_BF16_PRODUCTS
    linear_of<bf16, bf16>(a, x, (bf16*)a.y, threads);
#else
    each(a.rows, part_of(a.rows, threads), threads, [&](long first, long end) {
        for (long i = first * a.ins; i < end * a.ins; i += 16) {
            if (i + 16 <= end * a.ins) store(a.wide_x + i, load(x + i));
            else
                for (long j = i; j < end * a.ins; ++j) a.wide_x[j] = wide(x[j]);
        }
    });
    linear_of<float, bf16>(a, (const float*)a.wide_x, (bf16*)a.y, threads);
#endif
}

template <class T> void lora_of(const Lora& a, long width, int threads) {
    const long lines = a.parts * a.rank;
    each(a.rows, part_of(a.rows, threads), threads, [&](long first, long end) {
        for (long row = first; row < end; ++row) {
            const long adapter = a.slots[row] - 1;
            if (adapter < 0) continue;
            const T *down = (const T*)a.a + adapter * lines * a.ins, *up = (const T*)a.b + adapter * a.rank * width;
            lora((const T*)a.x + row * a.ins, down, up, a.outs, (T*)a.y + row * width, a.ins, a.parts, a.rank, width);
        }
    });
}

void run_lora(const Lora& a, int threads) {
    long width = 0, adapted = 0;
    for (long p = 0; p < a.parts; ++p) width += a.outs[p];
    for (long row = 0; row < a.rows; ++row) adapted += a.slots[row] != 0;
    if (adapted * a.rank * (a.parts * a.ins + width) < FEW_PRODUCTS) threads = 1;
    if (a.type) lora_of<bf16>(a, width, threads);
    else lora_of<float>(a, width, threads);
}

template <class T> void activate_of(const Activate& a, int threads) {
    const long width = a.outs * (a.activation == SILU_AND_MUL ? 2 : 1);
    each(a.rows, part_of(a.rows, threads), threads, [&](long first, long end) {
        for (long row = first; row < end; ++row)
            activate((const T*)a.x + row * width, (T*)a.y + row * a.outs, a.outs, a.activation);
    });
}

void run_activate(const Activate& a, int threads) {
    if (a.rows * a.outs < FEW_ELEMENTS) threads = 1;
    if (a.type) activate_of<bf16>(a, threads);
    else activate_of<float>(a, threads);
}

template <class T> void norm_of(const Norm& a, int threads) {
    const T *weight = (const T*)a.weight, *bias = (const T*)a.bias;
    each(a.rows, part_of(a.rows, threads), threads, [&](long first, long end) {
        for (long row = first; row < end; ++row) {
            const T* x = (const T*)a.x + row * a.size;
            T *residual = a.residual ? (T*)a.residual + row * a.size : nullptr, *y = (T*)a.y + row * a.size;
            if (bias) layer_norm(x, residual, weight, bias, y, a.size, a.eps);
            else rms_norm(x, residual, weight, y, a.size, a.eps);
        }
    });
}

void run_norm(const Norm& a, int threads) {
    if (a.rows * a.size < FEW_ELEMENTS) threads = 1;
    if (a.type) norm_of<bf16>(a, threads);
    else norm_of<float>(a, threads);
}

template <class T> void rotary_of(const Rotary& a, int threads) {
    each(a.rows, part_of(a.rows, threads), threads, [&](long first, long end) {
        for (long row = first; row < end; ++row) {
            const T* qkv = (const T*)a.qkv + row * (a.heads + 2 * a.kv_heads) * a.size;
            const long angles = a.positions[row] * a.half;
            rotary_and_write(qkv, (const T*)a.q_norm, (const T*)a.k_norm, a.eps, a.cos + angles, a.sin + angles, a.half,
                             a.interleaved != 0, a.slots[row], (T*)a.q + row * a.heads * a.size, (T*)a.k, (T*)a.v, a.heads,
                             a.kv_heads, a.size, a.page, a.page_step);
        }
    });
}

void run_rotary(const Rotary& a, int threads) {
    if (a.rows * (a.heads + 2 * a.kv_heads) * a.size < FEW_ELEMENTS) threads = 1;
    if (a.type) rotary_of<bf16>(a, threads);
    else rotary_of<float>(a, threads);
}

void run_attention(const Attention& a, int threads) {
    const Step step = {a.starts, a.lengths, a.table, a.sequences, a.table_width};
    const Shape shape = {a.heads, a.kv_heads, a.size, a.page, a.page_step, a.scale, a.alibi, a.window, a.softcap};
    long pairs = 0;
    for (long b = 0; b < a.sequences; ++b) pairs += (long)(a.starts[b + 1] - a.starts[b]) * a.lengths[b];
    if (pairs * a.heads * a.size < FEW_PRODUCTS) threads = 1;
    if (a.type) attention((const bf16*)a.q, (const bf16*)a.k, (const bf16*)a.v, (bf16*)a.out, step, shape, threads);
    else attention((const float*)a.q, (const float*)a.k, (const float*)a.v, (float*)a.out, step, shape, threads);
}

// of(row, memory) for each row of `size` logits.
template <class Of> void each_row(long rows, long size, int threads, const Of& of) {
    if (rows * size < FEW_ELEMENTS) threads = 1;
    each(rows, part_of(rows, threads), threads, [&](long first, long end) {
        static thread_local Room memory;
        for (long row = first; row < end; ++row) of(row, memory);
    });
}

template <class T> void greedy_of(const Greedy& a, long row, Room& memory) {
    const Vocabulary<T> found((const T*)a.logits + row * a.size, a.size, memory.of(whole_lanes(groups_of(a.size))));
    a.tokens[row] = found.finite ? found.most_likely() : -1;
}

void run_greedy(const Greedy& a, int threads) {
    each_row(a.rows, a.size, threads, [&](long row, Room& memory) {
        if (a.type) greedy_of<bf16>(a, row, memory);
        else greedy_of<float>(a, row, memory);
    });
}

void run_draw(const Draw& a, int threads) {
    each_row(a.rows, a.size, threads, [&](long row, Room& memory) {
        if (a.type) draw_row<bf16>(a, row, memory);
        else draw_row<float>(a, row, memory);
    });
}

void run_logprobs(const Logprobs& a, int threads) {
    each_row(a.rows, a.size, threads, [&](long row, Room& memory) {
        if (a.type) logprobs_of<bf16>(a, row, memory);
        else logprobs_of<float>(a, row, memory);
    });
}

}  // namespace
