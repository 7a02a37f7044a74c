#include "../common.h"

// AVX-512 with products of 8- and 16-bit integers (AVX512-VNNI), where products of bfloat16 are slower than floats'.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,avx2,bmi2")
#endif
#include <immintrin.h>
#define PHALANX_ISA_NAME avx512_vnni
#define PHALANX_ISA_TABLE kAvx512Vnni
#define PHALANX_ISA_AVX512 1
#define PHALANX_ISA_FMA 1
#define PHALANX_ISA_VNNI 1
#define PHALANX_ISA_BF16 0
#define PHALANX_ISA_ROWS 12  // 12 rows by two panels: 24 of 32 registers hold sums
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
