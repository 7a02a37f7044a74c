// Whole operations: they plan the tasks of a job and run them on the pool.
#pragma once

#include <vector>

#include "kernels.h"

namespace phalanx {

// The best set of kernels this processor runs, or the one named. Null if there is none of that name or it cannot run
// it.
const Kernels* find_kernels(const char* name);
void use_kernels(const Kernels* kernels);
const Kernels& kernels();

void run_linear(Linear job);

// The same for a weight (the fields that describe it) and what it is multiplied with.
void multiply(Linear weight, const void* x, int64_t ldx, int m, const void* bias, Output output, void* out,
              int64_t ldo);

// Put a weight of n rows, a multiple of 16, and k columns, in its own memory, into panels.
void pack_weight(DType dtype, void* weight, int64_t n, int64_t k);

// A bfloat16 weight of n rows, a multiple of 16, to panels of 8 bits, `together` (2 or 4) numbers of a row side by
// side, with a scale for each `group` of k and the sum of what each row became; k is a multiple of 4. And to panels of
// 4 bits, where k and the group are multiples of 8.
void quantize_int8(const void* weight, int64_t n, int64_t k, int together, int64_t group, void* numbers, float* scales,
                   float* sums);
void quantize_int4(const void* weight, int64_t n, int64_t k, int64_t group, void* numbers, float* scales);

// As look_up(), to bfloat16.
void look_up_int8(const void* numbers, const float* scales, int64_t n, int64_t k, int together, int64_t group,
                  const int64_t* rows, int64_t count, void* out);

// A weight of bfloat16 panels, of n rows (a multiple of 16) and k columns (a multiple of 8), to compressed_bytes(k / 2)
// for each panel at `to`, and to the groups that stand apart. `firsts` (n / 16) says where each panel's are. Without a
// `to` it only fills in `firsts`; returns how many groups stand apart.
int64_t compress_weight(const void* weight, int64_t n, int64_t k, void* to, void* apart, int64_t* firsts);
void look_up_compressed(const void* weight, const void* apart, int64_t n, int64_t k, const int64_t* rows, int64_t count,
                        void* out);

// Rows of a packed weight (row numbers below 0 or from n on are zero) to out (count, k).
void look_up(DType dtype, const void* weight, int64_t n, int64_t k, const int64_t* rows, int64_t count, void* out);

// One step's rows, and how they are cut into tasks: once for all layers, which have the same heads.
struct AttentionPlan {
    Attention job;  // block_table, table_stride, cu_q and seqused_k
    int rows = 0;
    int heads = 0, kv_heads = 0;  // that the tasks are made for
    std::vector<int32_t> tasks;   // kTaskFields each
    std::vector<int32_t> merges;  // row, kv head, splits, first partial
    int partials = 0;
};

// `layer` brings what is not the plan's.
void run_attention(AttentionPlan& plan, const Attention& layer);

void run_norm(const Norm& job);
void run_rope(const Rope& job);
void run_argmax(const float* rows, int64_t count, int64_t size, float* values, int64_t* places);

void run_noisy_argmax(const float* rows, int64_t count, int64_t size, const float* temperatures, const int64_t* seeds,
                      const int64_t* counters, float* values, int64_t* places);
void run_block_maxima(const float* rows, int64_t count, int64_t size, int64_t block, float* out);

// Bytes a second of memory that is read once, by all threads; and multiply-adds a second of bfloat16, counted as two.
double read_rate(int64_t bytes, int repeats);
double multiply_rate(int64_t steps);

}  // namespace phalanx
