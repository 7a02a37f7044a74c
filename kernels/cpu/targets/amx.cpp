#include "../common.h"

// AVX512-BF16 with AMX.
#if PHALANX_HAS_AMX
#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((                                                                                                    \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8,fma,avx2,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,amx-tile,amx-bf16,amx-int8,fma,avx2,bmi2")
#endif
#include <immintrin.h>
#define PHALANX_ISA_NAME avx512_amx
#define PHALANX_ISA_TABLE kAvx512Amx
#define PHALANX_ISA_AVX512 1
#define PHALANX_ISA_FMA 1
#define PHALANX_ISA_VNNI 1
#define PHALANX_ISA_BF16 1
#define PHALANX_ISA_TILES 1
#define PHALANX_ISA_ROWS 12  // 12 rows by two panels: 24 of 32 registers hold sums
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#elif defined(__x86_64__)
#pragma message("phalanx is built without AMX, which needs Linux, and GCC 11 or Clang 12")
#endif
