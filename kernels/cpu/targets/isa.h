// One instruction set's kernels. The including file sets PHALANX_ISA_NAME, _TABLE, _AVX512, _FMA, _VNNI (products of
// integers), _BF16 (of bfloat16, and conversions) and _ROWS, for AMX also _TILES, and turns the instructions on before
// it includes this, but after common.h.

namespace phalanx {
namespace PHALANX_ISA_NAME {

// kMaxRows: rows of x that the micro-kernel takes at once. kTaskRows: query rows of a task of attention (tokens times
// heads of a group).
constexpr int kMaxRows = PHALANX_ISA_ROWS;
#if PHALANX_ISA_TILES
constexpr int kTaskRows = 128;
#else
constexpr int kTaskRows = 48;
#endif

#include "../vectors.h"
#include "../gemm/multiply.h"
#include "../gemm/quantized.h"
#include "../gemm/compressed.h"
#include "../gemm/linear.h"
#include "../attend/pieces.h"
#include "../attend/softmax.h"
#include "../attend/values.h"
#include "../attend/task.h"
#include "../attend/merge.h"
#include "../rows.h"
#if PHALANX_ISA_TILES
#include "../amx/linear.h"
#include "../amx/softmax.h"
#include "../amx/attention.h"
#include "../amx/rate.h"
#endif

// Calls f with a value of the element type: its type is what f wants.
template <class F>
INLINE void by_type(DType dtype, F&& f) {
    dtype == DType::kFloat32 ? f(float{}) : f(bf16{});
}

// Bytes of a packed row of x.
int64_t row_bytes(const Linear& job) {
#if PHALANX_ISA_TILES
    if (job.dtype == DType::kBFloat16) return packed_row_bytes(job);
#endif
    return vector_row_bytes(job);
}

// A row block of x as linear() reads it. With tiles only bfloat16 is multiplied by them, float32 by vectors.
void pack_x(const Linear& job, int block, uint32_t* to, float* scales) {
#if PHALANX_ISA_TILES
    if (job.dtype == DType::kBFloat16) return pack_tiles(job, block, to, scales);
#endif
    by_type(job.dtype, [&](auto t) {
        using T = decltype(t);
        switch (job.kind) {
            case WeightKind::kW8A8:
                return pack_numbers<T, uint8_t, 127, 128>(job, block, to, scales);
            case WeightKind::kInt8:
                return pack_numbers<T, int16_t, 32767, 0>(job, block, to, scales);
            default:
                return pack_rows<T>(job, block, to);
        }
    });
}

// One task. Results that went past the caches are fenced, so that other threads see them.
void linear(const Linear& job, const PackedRows& x, int task) {
#if PHALANX_ISA_TILES
    if (job.dtype == DType::kBFloat16) {
        tile_linear(job, x, task);
        if (streams(job)) fence();
        return;
    }
#endif
    by_type(job.dtype, [&](auto t) {
        using T = decltype(t);
        switch (job.kind) {
            case WeightKind::kW8A8:
                return linear_task_of_numbers<T, Bytes>(job, x, task);
            case WeightKind::kInt8:
                return linear_task_of_numbers<T, Shorts>(job, x, task);
            case WeightKind::kCompressed:
                return linear_task_of_compressed(job, x, task);
            case WeightKind::kInt4:
                if (job.m <= kFewRows) return linear_task_of_nibbles(job, x, task);
                [[fallthrough]];
            default:
                return linear_task<T>(job, x, task);
        }
    });
    if (streams(job)) fence();
}

// One task. A cache of 8-bit numbers is multiplied by vectors with AMX too.
void attention(const Attention& job, int task) {
#if PHALANX_ISA_TILES
    if (job.dtype == DType::kBFloat16 && !job.int8_cache) return tile_attention_task(job, task);
#endif
    by_type(job.dtype, [&](auto t) {
        using T = decltype(t);
        job.int8_cache ? attention_task<T, int8_t>(job, task) : attention_task<T, T>(job, task);
    });
}

void merge(const Attention& job, int row, int kv_head, int splits, int partial) {
    by_type(job.dtype, [&](auto t) { merge_partials<decltype(t)>(job, row, kv_head, splits, partial); });
}
void norm(const Norm& job, int row) {
    by_type(job.dtype, [&](auto t) { norm_row<decltype(t)>(job, row); });
}
void rope(const Rope& job, int token) {
    by_type(job.dtype, [&](auto t) { rope_token<decltype(t)>(job, token); });
}

}  // namespace PHALANX_ISA_NAME

#define PHALANX_STRING_(x) #x
#define PHALANX_STRING(x) PHALANX_STRING_(x)

const Kernels PHALANX_ISA_TABLE = {
    PHALANX_STRING(PHALANX_ISA_NAME), PHALANX_ISA_ROWS,           PHALANX_ISA_NAME::kTaskRows,
#if PHALANX_ISA_TILES
    PHALANX_ISA_NAME::release_tiles,
#else
    nullptr,
#endif
    PHALANX_ISA_NAME::row_bytes,      PHALANX_ISA_NAME::pack_x,   PHALANX_ISA_NAME::linear,
    PHALANX_ISA_NAME::attention,      PHALANX_ISA_NAME::merge,    PHALANX_ISA_NAME::norm,
    PHALANX_ISA_NAME::rope,           PHALANX_ISA_NAME::argmax,   PHALANX_ISA_NAME::gumbel_argmax,
    PHALANX_ISA_NAME::block_maxima,   PHALANX_ISA_NAME::mask_row, PHALANX_ISA_NAME::sum_all,
    PHALANX_ISA_NAME::multiply_adds,  PHALANX_ISA_NAME::compress, PHALANX_ISA_NAME::choose_scale,
#if PHALANX_ISA_TILES
    PHALANX_ISA_NAME::tile_products,
#else
    nullptr,
#endif
};

}  // namespace phalanx
