// The code that AMX runs, with its instructions in plain C++ (amx/tiles.h) and portable vectors around them: for tests
// on any processor, and chosen only by its name.
#include "../common.h"

#define PHALANX_ISA_NAME emulated_amx
#define PHALANX_ISA_TABLE kEmulatedAmx
#define PHALANX_ISA_AVX512 0
#define PHALANX_ISA_FMA 0
#define PHALANX_ISA_VNNI 0
#define PHALANX_ISA_BF16 0
#define PHALANX_ISA_TILES 1
#define PHALANX_ISA_EMULATED_TILES 1
#define PHALANX_ISA_ROWS 2
#include "isa.h"
