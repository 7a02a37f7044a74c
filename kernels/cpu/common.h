// The standard library, included before any instruction set is turned on: its inline functions are shared by all files.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.h"
#include "runtime/scratch.h"
