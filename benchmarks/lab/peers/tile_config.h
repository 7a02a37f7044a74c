// Included by install.py before every C++ file of llama.cpp, which is not changed otherwise.
//
// g++ 12 and older tell the optimizer that loading AMX's tile configuration reads 8 of its 64 bytes. It then removes
// the stores to the rest, and the first tile that is used is an illegal instruction (llama.cpp's pull request 26954).
#pragma once

#if defined(__AMX_TILE__)
#include <immintrin.h>

static inline void load_whole_tile_config(const void* config) {
    __asm__ volatile("ldtilecfg %0" : : "m"(*static_cast<const char (*)[64]>(config)));
}
#define _tile_loadconfig load_whole_tile_config
#endif
