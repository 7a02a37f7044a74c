// What a step on a CPU needs of the other ranks, as one extension gives it to another: an address.
#pragma once

#include <cstdint>

namespace phalanx {

// Adds to `total` the sum over all ranks of `count` numbers at `x`, bfloat16 if an item has 2 bytes and float32 if it
// has 4. `x` is overwritten. Called without the GIL; throws what becomes a Python exception, when a rank is lost.
using AddReduced = void (*)(void* group, void* x, int64_t count, int item_bytes, float* total);

}  // namespace phalanx
