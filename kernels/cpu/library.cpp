// What the shared library gives out: the best instruction set here, and every function for each of them.

#include "calls.h"

extern const Kernels tandem_avx2, tandem_avx512, tandem_avx512_bf16;

namespace {

const Kernels* const SETS[] = {nullptr, &tandem_avx2, &tandem_avx512, &tandem_avx512_bf16};

}

extern "C" {

// 0: none of them runs here. 1: AVX2. 2: AVX-512. 3: AVX-512 that multiplies bfloat16 and int8.
int tandem_best_set() {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl"))
        return 1;
    const bool products = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
    return products && __builtin_cpu_supports("avx512vbmi") ? 3 : 2;
}

void tandem_pack(int set, int threads, const Pack* a) { SETS[set]->pack(*a, threads); }
void tandem_linear(int set, int threads, const Linear* a) { SETS[set]->linear(*a, threads); }
void tandem_linear_int8(int set, int threads, const LinearInt8* a) { SETS[set]->linear_int8(*a, threads); }
void tandem_quantize(int set, int threads, const Quantize* a) { SETS[set]->quantize(*a, threads); }
void tandem_lora(int set, int threads, const Lora* a) { SETS[set]->lora(*a, threads); }
void tandem_activate(int set, int threads, const Activate* a) { SETS[set]->activate(*a, threads); }
void tandem_norm(int set, int threads, const Norm* a) { SETS[set]->norm(*a, threads); }
void tandem_rotary(int set, int threads, const Rotary* a) { SETS[set]->rotary(*a, threads); }
void tandem_write(int set, int threads, const Write* a) { SETS[set]->write(*a, threads); }
void tandem_attention(int set, int threads, const Attention* a) { SETS[set]->attention(*a, threads); }
void tandem_greedy(int set, int threads, const Greedy* a) { SETS[set]->greedy(*a, threads); }
void tandem_draw(int set, int threads, const Draw* a) { SETS[set]->draw(*a, threads); }
void tandem_logprobs(int set, int threads, const Logprobs* a) { SETS[set]->logprobs(*a, threads); }

void tandem_replay(int set, int threads, const Replay* a) {
    for (long i = 0; i < a->count; ++i) a->steps[i].function(set, threads, a->steps[i].arguments);
}
}
