// What this machine could do at best. Every function measures on all threads of the pool for so many seconds, but
// kLeastRepeats times at least, and returns what each repeat reached: how far they are apart shows who else was at
// work.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace phalanx {

constexpr int kLeastRepeats = 3;

using Repeats = std::vector<double>;

// Bytes a second of memory that is read once, by the name of the pattern; the patterns take turns.
// Throws std::bad_alloc.
std::map<std::string, Repeats> read_rate(int64_t bytes, double seconds);

// Bytes a second of what each thread finds in its cache of a level, 1 or 2; each reads half of what that holds.
// Throws std::invalid_argument.
Repeats cache_rate(int level, double seconds);

// Operations a second of bfloat16 in registers, a multiply-add counted as two. A repeat is `steps` for each task.
Repeats multiply_rate(int64_t steps, double seconds);

// The same of tiles, of bfloat16 or int8, whose operands come from the first cache; empty where there are no tiles.
Repeats tile_rate(bool int8, int64_t steps, double seconds);

}  // namespace phalanx
