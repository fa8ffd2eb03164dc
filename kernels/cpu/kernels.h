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
    linear(x, (const W*)a.w, Floats(), (const T*)a.bias, y, a.rows, a.ins, a.outs, a.activation, threads);
}

// bfloat16 x [rows, ins] as float32.
void widen_rows(const bf16* x, float* to, long rows, long ins, int threads) {
    each(rows, part_of(rows, threads), threads, [&](long first, long end) {
        for (long i = first * ins; i < end * ins; i += 16) {
            if (i + 16 <= end * ins) store(to + i, load(x + i));
            else
                for (long j = i; j < end * ins; ++j) to[j] = wide(x[j]);
        }
    });
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
    widen_rows(x, a.wide_x, a.rows, a.ins, threads);
    linear_of<float, bf16>(a, (const float*)a.wide_x, (bf16*)a.y, threads);
#endif
}

template <class X, class T, class Meant>
void int8_linear_of(const LinearInt8& a, const X* x, long ins, const Meant& meant, T* y, int threads) {
    linear(x, a.w, meant, (const T*)a.bias, y, a.rows, ins, a.outs, a.activation, threads);
}

template <class T> void whole_linear_of(const LinearInt8& a, int threads) {
#if TANDEM_INT8_PRODUCTS
    typedef uint8_t Operand;
#else
    typedef int16_t Operand;
#endif
    const long ins = (a.ins + 3) / 4 * 4;
    Operand* x = (Operand*)(a.room + a.rows);
    each(a.rows, part_of(a.rows, threads), a.rows * a.ins < FEW_ELEMENTS ? 1 : threads, [&](long first, long end) {
        for (long row = first; row < end; ++row)
            a.room[row] = quantize_row((const T*)a.x + row * a.ins, x + row * ins, a.ins, ins);
    });
    int8_linear_of(a, x, ins, ScaledBoth{a.scale, a.room, a.totals}, (T*)a.y, threads);
}

void run_linear_int8(const LinearInt8& a, int threads) {
    if (a.rows * a.ins * a.outs < FEW_PRODUCTS) threads = 1;
    if (a.depth == 4) {
        if (a.type) whole_linear_of<bf16>(a, threads);
        else whole_linear_of<float>(a, threads);
        return;
    }
    const ScaledOutputs meant = {a.scale};
    if (a.type == 0) return int8_linear_of(a, (const float*)a.x, a.ins, meant, (float*)a.y, threads);
#if TANDEM_BF16_PRODUCTS
    int8_linear_of(a, (const bf16*)a.x, a.ins, meant, (bf16*)a.y, threads);
#else
    widen_rows((const bf16*)a.x, a.room, a.rows, a.ins, threads);
    int8_linear_of(a, (const float*)a.room, a.ins, meant, (bf16*)a.y, threads);
#endif
}

template <class T> void quantize_of(const Quantize& a, int threads) {
    each(a.rows, part_of(a.rows, threads), threads, [&](long first, long end) {
        for (long row = first; row < end; ++row)
            a.scale[row] = quantize_row((const T*)a.x + row * a.size, a.values + row * a.size, a.size, a.size);
    });
}

void run_quantize(const Quantize& a, int threads) {
    if (a.rows * a.size < FEW_ELEMENTS) threads = 1;
    if (a.type) quantize_of<bf16>(a, threads);
    else quantize_of<float>(a, threads);
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
    const long width = (a.heads + 2 * a.pages.kv_heads) * a.pages.size;
    each(a.rows, part_of(a.rows, threads), threads, [&](long first, long end) {
        for (long row = first; row < end; ++row) {
            const long angles = a.positions[row] * a.half;
            rotary_and_write((const T*)a.qkv + row * width, (const T*)a.q_norm, (const T*)a.k_norm, a.eps, a.cos + angles,
                             a.sin + angles, a.half, a.interleaved != 0, a.slots[row],
                             (T*)a.q + row * a.heads * a.pages.size, a.pages, a.heads);
        }
    });
}

void run_rotary(const Rotary& a, int threads) {
    if (a.rows * (a.heads + 2 * a.pages.kv_heads) * a.pages.size < FEW_ELEMENTS) threads = 1;
    if (a.type) rotary_of<bf16>(a, threads);
    else rotary_of<float>(a, threads);
}

template <class T> void write_of(const Write& a, int threads) {
    const Pages& to = a.pages;
    each(a.rows, part_of(a.rows, threads), threads, [&](long first, long end) {
        for (long row = first; row < end; ++row)
            for (long head = 0; head < to.kv_heads; ++head) {
                const T *k = (const T*)a.k + row * a.k_step, *v = (const T*)a.v + row * a.v_step;
                write_head(k + head * to.size, to.k, to.k_scale, to, a.slots[row], head);
                write_head(v + head * to.size, to.v, to.v_scale, to, a.slots[row], head);
            }
    });
}

void run_write(const Write& a, int threads) {
    if (2 * a.rows * a.pages.kv_heads * a.pages.size < FEW_ELEMENTS) threads = 1;
    if (a.type) write_of<bf16>(a, threads);
    else write_of<float>(a, threads);
}

template <class T> void attention_of(const Attention& a, int threads) {
    const Step step = {a.starts, a.lengths, a.table, a.sequences, a.table_width};
    const Shape shape = {a.heads, a.pages, a.scale, a.alibi, a.window, a.softcap};
    if (a.pages.k_scale) attention<T, int8_t>((const T*)a.q, (T*)a.out, step, shape, threads);
    else attention<T, T>((const T*)a.q, (T*)a.out, step, shape, threads);
}

void run_attention(const Attention& a, int threads) {
    long pairs = 0;
    for (long b = 0; b < a.sequences; ++b) pairs += (long)(a.starts[b + 1] - a.starts[b]) * a.lengths[b];
    if (pairs * a.heads * a.pages.size < FEW_PRODUCTS) threads = 1;
    if (a.type) attention_of<bf16>(a, threads);
    else attention_of<float>(a, threads);
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

constexpr Kernels OF_THIS_SET = {run_pack, run_linear, run_linear_int8, run_quantize, run_lora, run_activate, run_norm,
                                 run_rotary, run_write, run_attention, run_greedy, run_draw, run_logprobs};

}  // namespace
