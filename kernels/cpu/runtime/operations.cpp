#include "operations.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>

#include "dispatch.h"
#include "pool.h"
#include "scratch.h"

namespace phalanx {
namespace {

// Words of k multiplied in one go: two panels of so many bfloat16 stay in the first cache; fewer floats are summed up
// at once, for precision.
constexpr int kWordBlock = 512, kFloatWordBlock = 64;
constexpr int kCachedRows = 96;                         // rows of x whose packed words stay in the second cache
constexpr int kChunkRows = 768, kTileChunkRows = 1024;  // rows of x that are packed at once
// Each thread packs x for itself, which costs it as much as some 8 columns do, as long as the columns are many and the
// copies fit into a cache: to write lines that another core has read costs more, if that core is far away.
constexpr int64_t kOwnPackedBytes = 16 << 20;
constexpr int64_t kOwnTileBytes = 1 << 18;  // tiles multiply so fast that fewer rows pay
constexpr int kOwnPackedColumns = 64;       // for each thread
constexpr int kTasksPerThread = 16;         // of many rows: so that a thread which is held up costs little

// The rows of x as row blocks, and the tasks: for the micro-kernel of vectors.
void plan_vectors(Linear& job, const Kernels& k) {
    const int64_t cached_rows = kCachedRows * int64_t{job.words} * 4 / k.row_bytes(job);
    job.row_blocks = static_cast<int>(ceil_div(job.m, k.max_rows));
    job.m_tiles = static_cast<int>(ceil_div(job.row_blocks * static_cast<int64_t>(k.max_rows), cached_rows));
    if (job.kind == WeightKind::kPlain || job.kind == WeightKind::kCompressed) {
        int64_t passes = ceil_div(job.words, job.dtype == DType::kFloat32 ? kFloatWordBlock : kWordBlock);
        job.word_block = static_cast<int>(ceil_div(ceil_div(job.words, passes), kGroupWords) * kGroupWords);
    }
    // Of many rows a task does several units, for which it finds its rows in the second cache.
    int64_t wanted = std::max<int64_t>(1, static_cast<int64_t>(threads()) * kTasksPerThread / job.m_tiles);
    job.units_per_task = job.m_tiles > 1 ? static_cast<int>(std::max<int64_t>(1, job.n_units / wanted)) : 1;
}

constexpr int kFewRows = 32;  // whose sums all stay in tiles
// As what m rows of a weight are multiplied. This is the one place where a row's bits depend on how many others there
// are.
WeightKind choose_kind(const Linear& weight, int m) {
    const bool many = weight.kind == WeightKind::kInt8 && by_tiles(kernels(), weight) && m > kMostIntegerRows;
    return many && !weight.deterministic ? WeightKind::kInt8AsBfloat16 : weight.kind;
}

// The same for tiles: as few row blocks as there can be, or an even number of many, as even in size as can be.
void plan_amx(Linear& job) {
    constexpr int kTaskRows = 512;
    constexpr int kChunkWords = 448;
    constexpr int64_t kLeastUnits = 4, kMostUnits = 8;  // of many rows: C stays in the second cache
    const bool grouped = job.kind == WeightKind::kInt8 || job.kind == WeightKind::kInt4, few = job.m <= kFewRows;

    job.row_blocks = static_cast<int>(few || grouped || job.x_tiles ? ceil_div(job.m, kTileRows)
                                                                    : 2 * ceil_div(job.m, 2 * kTileRows));
    job.block_rows = job.x_tiles ? kTileRows : static_cast<int>(ceil_div(job.m, job.row_blocks));
    job.m_tiles = static_cast<int>(ceil_div(job.m, kTaskRows));

    if (!grouped) {
        const int64_t passes = ceil_div(job.words, kChunkWords);
        job.word_block = static_cast<int>(ceil_div(ceil_div(job.words, passes), kGroupWords) * kGroupWords);
    }

    // Of many rows a task has several units, whose C stays in the second cache, but no thread goes without.
    const int64_t wanted = std::max<int64_t>(1, static_cast<int64_t>(threads()) * kTasksPerThread / job.m_tiles);
    int64_t units = std::max<int64_t>(1, job.n_units / wanted);
    if (!grouped && !few) {
        const int64_t fair = std::max<int64_t>(1, static_cast<int64_t>(job.n_units) * job.m_tiles / threads());
        units = std::min(std::max(units, std::min(fair, kLeastUnits)), kMostUnits);
    }
    job.units_per_task = static_cast<int>(units);
}

// Whether x can be multiplied where it stands: as A tiles, or one row.
bool as_it_stands(const Kernels& k, const Linear& job) {
    if (job.x_tiles) return true;
    if (job.m != 1 || job.kind == WeightKind::kInt8 || job.kind == WeightKind::kW8A8) return false;
    return k.row_bytes(job) == int64_t{job.words} * 4;
}

// Plans the tasks of a chunk of rows and runs them. x is multiplied as it stands, or packed first: by each thread for
// itself, or once for all.
void run_chunk(Linear& job) {
    const Kernels& k = kernels();
    const bool tiles = by_tiles(k, job);
    int64_t columns = job.output == Output::kSiluMul ? job.n / 2 : job.n;
    job.n_units = static_cast<int>(ceil_div(columns, job.output == Output::kSiluMul ? kPanel : 2 * kPanel));
    tiles ? plan_amx(job) : plan_vectors(job, k);

    const int tasks = static_cast<int>(ceil_div(job.n_units, job.units_per_task)) * job.m_tiles;
    const int64_t bytes = k.row_bytes(job) * (tiles ? int64_t{job.row_blocks} * job.block_rows : job.m);
    const auto room = [&] { return static_cast<uint32_t*>(scratch(Scratch::kPackedRows, bytes)); };
    const auto room_for_scales = [&] {
        return static_cast<float*>(scratch(Scratch::kRowScales, job.m * sizeof(float)));
    };

    const int64_t own_bytes = tiles ? kOwnTileBytes : kOwnPackedBytes;
    if (as_it_stands(k, job)) {
        const PackedRows x{static_cast<const uint32_t*>(job.x), nullptr};
        parallel(tasks, [&](int task) { k.linear(job, x, task); });
    } else if (bytes * threads() <= own_bytes && job.n >= kOwnPackedColumns * threads()) {
        // A thread packs x when it meets the first of its tasks of this chunk, which the number tells apart from
        // others.
        static std::atomic<uint64_t> jobs{0};
        const uint64_t number = ++jobs;
        parallel(tasks, [&](int task) {
            static thread_local uint64_t packed = 0;
            uint32_t* words = room();
            float* scales = room_for_scales();
            if (packed != number) {
                for (int block = 0; block < job.row_blocks; ++block) k.pack_x(job, block, words, scales);
                packed = number;
            }
            k.linear(job, {words, scales}, task);
        });
    } else {
        uint32_t* words = room();
        float* scales = room_for_scales();
        parallel(job.row_blocks, [&](int block) { k.pack_x(job, block, words, scales); });
        parallel(tasks, [&](int task) { k.linear(job, {words, scales}, task); });
    }
}

}  // namespace

void run_linear(Linear job) {
    if (job.kind == WeightKind::kInt8 && (job.together == 4) != by_tiles(kernels(), job))
        throw std::invalid_argument("an int8 weight is multiplied by the kind of kernels that it was packed for");

    job.kind = choose_kind(job, job.m);
    if (job.kind == WeightKind::kInt8AsBfloat16) job.words = job.k / 2;

    int64_t out_bytes =
        job.output == Output::kStoreFloat || job.output == Output::kAddFloat ? 4 : element_bytes(job.dtype);
    const char* x = static_cast<const char*>(job.x);
    char* out = static_cast<char*>(job.out);

    // Even chunks, so that none is too small for all threads; of whole row blocks. What needs no packing needs no
    // chunks.
    const int m = job.m, most = job.x_tiles ? m : by_tiles(kernels(), job) ? kTileChunkRows : kChunkRows;
    const int64_t chunks = ceil_div(m, most), blocks = ceil_div(m, kTileRows);
    for (int64_t i = 0; i < chunks; ++i) {
        const int first = kTileRows * block_start(blocks, chunks, i);
        job.m = std::min(m, kTileRows * block_start(blocks, chunks, i + 1)) - first;
        job.x = x + first * job.ldx * element_bytes(job.dtype);
        job.out = out + first * job.ldo * out_bytes;
        run_chunk(job);
    }
}

void multiply(Linear weight, Rows x, int m, const void* bias, Output output, Rows out) {
    weight.x = x.first;
    weight.ldx = x.ld;
    weight.x_tiles = x.tiles;
    weight.m = m;
    weight.bias = bias;
    weight.output = output;
    weight.out = out.first;
    weight.ldo = out.ld;
    weight.out_tiles = out.tiles;
    run_linear(weight);
}

bool wants_tiles(const Linear& weight, int m) {
    const WeightKind kind = choose_kind(weight, m);
    const bool as_bfloat16 =
        kind == WeightKind::kPlain || kind == WeightKind::kCompressed || kind == WeightKind::kInt8AsBfloat16;
    return by_tiles(kernels(), weight) && as_bfloat16 && m > kFewRows && weight.k % kTileColumns == 0;
}

int64_t rows_bytes(DType dtype, int m, int64_t size) {
    return ceil_div(m, kTileRows) * kTileRows * size * element_bytes(dtype);
}

namespace {

// Cuts a step's rows into tasks, for each KV head of a row: a prompt chunk's queries into tiles of as many tokens as a
// task takes; a row of few queries but many keys into splits of kSplitKeys keys, whose partial results are merged.
void plan_tasks(AttentionPlan& plan, int heads, int kv_heads) {
    const Attention& job = plan.job;
    plan.tasks.clear();
    plan.merges.clear();
    plan.partials = 0;
    plan.heads = heads;
    plan.kv_heads = kv_heads;

    const int group = heads / kv_heads, rows = kernels().query_rows, most = std::max(1, rows / group);
    for (int row = 0; row < plan.rows; ++row) {
        const int queries = job.cu_q[row + 1] - job.cu_q[row], keys = job.seqused_k[row];
        if (queries == 0) continue;
        const int tiles = static_cast<int>(ceil_div(queries, most));
        const int splits = tiles == 1 && group <= rows ? static_cast<int>(ceil_div(keys, kSplitKeys)) : 1;
        for (int head = 0; head < kv_heads; ++head) {
            if (splits > 1) {
                plan.merges.insert(plan.merges.end(), {row, head, splits, plan.partials});
                for (int s = 0; s < splits; ++s)
                    plan.tasks.insert(plan.tasks.end(), {row, head, 0, queries, s * kSplitKeys, plan.partials++});
                continue;
            }
            // The last tile sees the most keys: long tasks first.
            for (int tile = tiles - 1; tile >= 0; --tile) {
                int first = block_start(queries, tiles, tile), last = block_start(queries, tiles, tile + 1);
                plan.tasks.insert(plan.tasks.end(), {row, head, first, last - first, 0, -1});
            }
        }
    }
}

}  // namespace

void run_attention(AttentionPlan& plan, const Attention& layer) {
    const Kernels& k = kernels();
    if (plan.heads != layer.heads || plan.kv_heads != layer.kv_heads) plan_tasks(plan, layer.heads, layer.kv_heads);

    Attention job = layer;
    job.block_table = plan.job.block_table;
    job.table_stride = plan.job.table_stride;
    job.cu_q = plan.job.cu_q;
    job.seqused_k = plan.job.seqused_k;
    job.tasks = plan.tasks.data();
    job.count = static_cast<int>(plan.tasks.size()) / kTaskFields;
    job.query_rows = k.query_rows;
    job.partials =
        static_cast<float*>(scratch(Scratch::kTaskPartials, static_cast<int64_t>(plan.partials) * job.query_rows *
                                                                (job.head_dim + 2) * sizeof(float)));

    auto body = [&](int task) { k.attention(job, task); };
    parallel(job.count, body);

    auto merge = [&](int i) {
        const int32_t* m = &plan.merges[4 * i];
        k.merge(job, m[0], m[1], m[2], m[3]);
    };
    parallel(static_cast<int>(plan.merges.size()) / 4, merge);
}

// Few rows are done by the caller: waking others would take longer.
template <class F>
void run_rows(int rows, int64_t elements_each, F&& body) {
    constexpr int64_t kLeast = 16384;
    int64_t each = std::max<int64_t>(1, kLeast / std::max<int64_t>(1, elements_each));
    int64_t tasks = std::min<int64_t>(ceil_div(rows, each), static_cast<int64_t>(threads()) * kTasksPerThread);
    auto piece = [&](int task) {
        for (int row = block_start(rows, tasks, task); row < block_start(rows, tasks, task + 1); ++row) body(row);
    };
    parallel(static_cast<int>(tasks), piece);
}

void run_norm(const Norm& job) {
    const Kernels& k = kernels();
    run_rows(job.m, job.size, [&](int row) { k.norm(job, row); });
}

void run_rope(const Rope& job) {
    const Kernels& k = kernels();
    int64_t elements = static_cast<int64_t>(job.heads + 2 * job.kv_heads) * job.head_dim;
    run_rows(job.tokens, 2 * elements, [&](int token) { k.rope(job, token); });
}

void run_argmax(const float* rows, int64_t count, int64_t size, float* values, int64_t* indices) {
    const Kernels& k = kernels();
    run_rows(static_cast<int>(count), size,
             [&](int row) { indices[row] = k.argmax(rows + row * size, size, values + row); });
}

void run_gumbel_argmax(const float* rows, int64_t count, int64_t size, const float* temperatures, const int64_t* seeds,
                       const int64_t* counters, float* values, int64_t* indices) {
    const Kernels& k = kernels();
    run_rows(static_cast<int>(count), size, [&](int row) {
        indices[row] =
            k.gumbel_argmax(rows + row * size, size, temperatures[row], seeds[row], counters[row], values + row);
    });
}

void run_block_maxima(const float* rows, int64_t count, int64_t size, int64_t block, float* out) {
    const Kernels& k = kernels();
    const int64_t blocks = ceil_div(size, block);
    run_rows(static_cast<int>(count), size,
             [&](int row) { k.block_maxima(rows + row * size, size, block, out + row * blocks); });
}

void run_mask(float* rows, const int64_t* indices, int64_t count, int64_t size, const uint32_t* bits, int64_t words,
              int64_t offset) {
    const Kernels& k = kernels();
    run_rows(static_cast<int>(count), size,
             [&](int i) { k.mask(rows + indices[i] * size, size, bits + i * words, offset); });
}

}  // namespace phalanx
