// Any processor: the compiler makes what it can of the vectors.
#include "../common.h"

#define PHALANX_ISA_NAME portable
#define PHALANX_ISA_TABLE kPortable
#define PHALANX_ISA_AVX512 0
#define PHALANX_ISA_FMA 0
#define PHALANX_ISA_VNNI 0
#define PHALANX_ISA_BF16 0
#define PHALANX_ISA_ROWS 2
#include "isa.h"
