// Weights as the kernels want them: what loading a model does once, and rows picked out again.
#pragma once

#include "../kernels.h"

namespace phalanx {

// Put a weight of n rows, a multiple of 16, and k columns, in its own memory, into panels. Of rows r0 to r15, whose
// words are 0, 1, 2, ...:
//
//     as it is loaded   r0[0] r0[1] r0[2] ... r0[K-1] | r1[0] r1[1] ... | ... | r15[0] ... r15[K-1]
//     as a panel        r0[0] r1[0] ... r15[0] | r0[1] r1[1] ... r15[1] | ... | r0[K-1] ... r15[K-1]
//
// One vector load of 64 bytes then gives the same word of 16 output columns, and a panel is read from its first byte to
// its last, which is what the processor foresees best.
void pack_weight(DType dtype, void* weight, int64_t n, int64_t k);

// Copy such panels to memory that nobody has touched: each thread writes first to what it will multiply with.
void copy_panels(DType dtype, const void* panels, int64_t n, int64_t k, void* to);

// A bfloat16 weight of n rows, a multiple of 16, to panels of 8 bits, `together` (2 or 4) numbers of a row side by
// side, with a scale for each `group` of k and the sum of what each row became; k is a multiple of 4. And to panels of
// 4 bits, where k and the group are multiples of 8.
void quantize_int8(const void* weight, int64_t n, int64_t k, int together, int64_t group, void* numbers, bf16* scales,
                   float* sums);
void quantize_int4(const void* weight, int64_t n, int64_t k, int64_t group, void* numbers, bf16* scales);

// As look_up(), of 8-bit panels: numbers times scales, rounded to bfloat16, ties away from zero.
void look_up_int8(const void* numbers, const bf16* scales, int64_t n, int64_t k, int together, int64_t group,
                  const int64_t* rows, int64_t count, void* out);

// A weight of bfloat16 panels, of n rows (a multiple of 16) and k columns (a multiple of 8), to compressed_bytes(k / 2)
// for each panel at `to`, and to the groups that stand apart. `firsts` (n / 16) says where each panel's are. Without a
// `to` it only fills in `firsts`; returns how many groups stand apart.
int64_t compress_weight(const void* weight, int64_t n, int64_t k, void* to, void* apart, int64_t* firsts);
void look_up_compressed(const void* weight, const void* apart, int64_t n, int64_t k, const int64_t* rows, int64_t count,
                        void* out);

// Rows of a packed weight (row numbers below 0 or from n on are zero) to out (count, k).
void look_up(DType dtype, const void* weight, int64_t n, int64_t k, const int64_t* rows, int64_t count, void* out);

}  // namespace phalanx
