#include "../common.h"

// AVX2 with FMA.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,bmi2")
#endif
#include <immintrin.h>
#define PHALANX_ISA_NAME avx2
#define PHALANX_ISA_TABLE kAvx2
#define PHALANX_ISA_AVX512 0
#define PHALANX_ISA_FMA 1
#define PHALANX_ISA_VNNI 0
#define PHALANX_ISA_BF16 0
#define PHALANX_ISA_ROWS 3  // 3 rows by two panels: 12 of 16 registers hold sums, two for each vector of 16 lanes
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
