// Whole operations: they plan the tasks of a job and run them on the pool.
#pragma once

#include <vector>

#include "../kernels.h"

namespace phalanx {

// Rows of x that int8 weights are multiplied with as integers where there are tiles. With more rows the weights become
// bfloat16 (amx/int8.h), unless they are deterministic.
constexpr int kMostIntegerRows = 16;

// x W^T of all rows of x, in chunks that are packed at once. Throws std::invalid_argument for an int8 weight that was
// packed for kernels of another kind.
void run_linear(Linear job);

// m rows of elements: `ld` elements apart, or as A tiles of rows of `ld` elements, see element().
struct Rows {
    void* first;
    int64_t ld;
    bool tiles = false;
};

// The same for a weight (the fields that describe it) and what it is multiplied with.
void multiply(Linear weight, Rows x, int m, const void* bias, Output output, Rows out);

// Whether m rows that a weight is multiplied with had better stand as A tiles from the start: then nothing packs them.
bool wants_tiles(const Linear& weight, int m);

// Bytes of m rows of `size` elements, also as A tiles.
int64_t rows_bytes(DType dtype, int m, int64_t size);

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

// These go over rows or tokens; the caller does few of them alone.
void run_norm(const Norm& job);
void run_rope(const Rope& job);

// Each row's largest value and its index.
void run_argmax(const float* rows, int64_t count, int64_t size, float* values, int64_t* indices);

// The same of each row / temperature + Gumbel noise (kernels/noise.py).
void run_gumbel_argmax(const float* rows, int64_t count, int64_t size, const float* temperatures, const int64_t* seeds,
                       const int64_t* counters, float* values, int64_t* indices);

// The largest of each `block` columns of each row, to out (count, ceil(size / block)).
void run_block_maxima(const float* rows, int64_t count, int64_t size, int64_t block, float* out);

// -inf, in `count` rows of (., size) whose numbers are in `indices`, where a bit is not set: row i's are
// bits[i * words ...], of which the first belongs to column -offset.
void run_mask(float* rows, const int64_t* indices, int64_t count, int64_t size, const uint32_t* bits, int64_t words,
              int64_t offset);

}  // namespace phalanx
