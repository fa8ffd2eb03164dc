// The functions that Python calls (native.py), for one instruction set. Number types: 0 float32, 1 bfloat16.

#include "attention.h"
#include "low_rank.h"

namespace {

// Multiplications, or elements of rows, below which a second thread costs more than it brings.
constexpr long FEW_PRODUCTS = 1 << 18, FEW_ELEMENTS = 1 << 15;

void run_pack(const Pack& a) {
    if (a.type) pack((const bf16*)a.w, (bf16*)a.into, a.outs, a.ins);
    else pack((const float*)a.w, (float*)a.into, a.outs, a.ins);
}

void run_linear(const Linear& a) {
#pragma omp parallel if (a.rows * a.ins * a.outs >= FEW_PRODUCTS)
    {
        if (a.type == 0) {
            const float* x = (const float*)a.x;
            if (a.w_type) linear(x, (const bf16*)a.w, (const float*)a.bias, (float*)a.y, a.rows, a.ins, a.outs, a.activation);
            else linear(x, (const float*)a.w, (const float*)a.bias, (float*)a.y, a.rows, a.ins, a.outs, a.activation);
        } else {
            const bf16* x = (const bf16*)a.x;
#if TANDEM_BF16_PRODUCTS
            linear(x, (const bf16*)a.w, (const bf16*)a.bias, (bf16*)a.y, a.rows, a.ins, a.outs, a.activation);
#else
#pragma omp for schedule(static)
            for (long row = 0; row < a.rows; ++row) {
                long i = row * a.ins, end = i + a.ins;
                for (; i + 16 <= end; i += 16) store(a.wide_x + i, load(x + i));
                for (; i < end; ++i) a.wide_x[i] = wide(x[i]);
            }
            linear((const float*)a.wide_x, (const bf16*)a.w, (const bf16*)a.bias, (bf16*)a.y, a.rows, a.ins, a.outs,
                   a.activation);
#endif
        }
    }
}

void run_lora(const Lora& a) {
    long width = 0, with_one = 0;
    for (long p = 0; p < a.parts; ++p) width += a.outs[p];
    for (long row = 0; row < a.rows; ++row) with_one += a.slots[row] != 0;
#pragma omp parallel if (with_one > 1 && with_one * a.rank * (a.parts * a.ins + width) >= FEW_PRODUCTS)
    {
        if (a.type)
            lora((const bf16*)a.x, (const bf16*)a.a, (const bf16*)a.b, a.slots, a.outs, (bf16*)a.y, a.rows, a.ins, a.parts, a.rank);
        else
            lora((const float*)a.x, (const float*)a.a, (const float*)a.b, a.slots, a.outs, (float*)a.y, a.rows, a.ins, a.parts,
                 a.rank);
    }
}

void run_activate(const Activate& a) {
#pragma omp parallel if (a.rows * a.outs >= FEW_ELEMENTS)
    {
        if (a.type) activate((const bf16*)a.x, (bf16*)a.y, a.rows, a.outs, a.activation);
        else activate((const float*)a.x, (float*)a.y, a.rows, a.outs, a.activation);
    }
}

template <class T> void norm_of(const Norm& a) {
    if (a.bias)
        layer_norm((const T*)a.x, (T*)a.residual, (const T*)a.weight, (const T*)a.bias, (T*)a.y, a.rows, a.size, a.eps);
    else rms_norm((const T*)a.x, (T*)a.residual, (const T*)a.weight, (T*)a.y, a.rows, a.size, a.eps);
}

void run_norm(const Norm& a) {
#pragma omp parallel if (a.rows * a.size >= FEW_ELEMENTS)
    {
        if (a.type) norm_of<bf16>(a);
        else norm_of<float>(a);
    }
}

template <class T> void rotary_of(const Rotary& a) {
    rotary_and_write((const T*)a.qkv, (const T*)a.q_norm, (const T*)a.k_norm, a.eps, a.positions, a.cos, a.sin, a.half,
                     a.interleaved != 0, a.slots, (T*)a.q, (T*)a.k, (T*)a.v, a.rows, a.heads, a.kv_heads, a.size, a.page);
}

void run_rotary(const Rotary& a) {
#pragma omp parallel if (a.rows * (a.heads + 2 * a.kv_heads) * a.size >= FEW_ELEMENTS)
    {
        if (a.type) rotary_of<bf16>(a);
        else rotary_of<float>(a);
    }
}

void run_attention(const Attention& a) {
    const Step step = {a.starts, a.lengths, a.table, a.sequences, a.table_width};
    const Shape shape = {a.heads, a.kv_heads, a.size, a.page, a.scale, a.alibi, a.window, a.softcap};
    long pairs = 0;
    for (long b = 0; b < a.sequences; ++b) pairs += (long)(a.starts[b + 1] - a.starts[b]) * a.lengths[b];
#pragma omp parallel if (pairs * a.heads * a.size >= FEW_PRODUCTS)
    {
        if (a.type) attention((const bf16*)a.q, (const bf16*)a.k, (const bf16*)a.v, (bf16*)a.out, step, shape);
        else attention((const float*)a.q, (const float*)a.k, (const float*)a.v, (float*)a.out, step, shape);
    }
}

}  // namespace
