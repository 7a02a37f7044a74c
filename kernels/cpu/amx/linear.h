// Linear layers by AMX's tiles: what targets/isa.h calls. Included inside an instruction set's namespace.

#include "tiles.h"
#include "pack.h"
#include "gemm.h"
#include "grouped.h"
#include "int8.h"

// A row block of x as A tiles, in the form that the kind of weight is multiplied with.
inline void pack_tiles(const Linear& job, int block, uint32_t* to, float* scales) {
    char* at = reinterpret_cast<char*>(to) + int64_t{block} * job.block_rows * packed_row_bytes(job);
    switch (job.kind) {
        case WeightKind::kW8A8:
            return pack_tile_bytes(job, block, at, scales);
        case WeightKind::kInt8:
            return pack_tile_shorts(job, block, at, scales);
        default:
            return pack_tile_rows(job, block, at);
    }
}

// One task of a linear layer. int4 and int8 have a scale for each group of k, the others none or one for a row.
inline void tile_linear(const Linear& job, const PackedRows& x, int task) {
    switch (job.kind) {
        case WeightKind::kPlain:
            return TileTask<StoredPanels, Bfloat16Products>(job, x, task).run();
        case WeightKind::kCompressed:
            return TileTask<CompressedPanels, Bfloat16Products>(job, x, task).run();
        case WeightKind::kW8A8:
            return TileTask<StoredPanels, Int8Products>(job, x, task).run();
        case WeightKind::kInt8:
            return by_vectors(job) ? Int8Rows(job, x, task).run() : GroupedTask<Int8Groups>(job, x, task).run();
        case WeightKind::kInt8AsBfloat16:
            return TileTask<Int8Panels, Bfloat16Products>(job, x, task).run();
        case WeightKind::kInt4:
            return GroupedTask<Int4Groups>(job, x, task).run();
    }
}
