// Which set of kernels runs.
#pragma once

#include "../kernels.h"

namespace phalanx {

// The set of kernels of that name; null if there is none or this processor cannot run it.
const Kernels* find_kernels(const char* name);

// Use this set from now on, also for work that threads do when they become idle.
void use_kernels(const Kernels* kernels);

// The set in use: the best this processor runs, until use_kernels() has named another.
const Kernels& kernels();

}  // namespace phalanx
