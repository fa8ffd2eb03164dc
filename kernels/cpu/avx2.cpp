#include "calls.h"

#pragma GCC target("avx2,fma,f16c")
#define TANDEM_AVX512 0
#define TANDEM_BF16_PRODUCTS 0
#define TANDEM_INT8_PRODUCTS 0
#include "kernels.h"

extern const Kernels tandem_avx2 = OF_THIS_SET;
