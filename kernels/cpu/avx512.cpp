#include "calls.h"

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define TANDEM_AVX512 1
#define TANDEM_BF16_PRODUCTS 0
#include "kernels.h"

extern const Kernels tandem_avx512 = {
    run_pack, run_linear, run_lora, run_activate, run_norm, run_rotary, run_attention, run_greedy, run_draw, run_logprobs,
};
