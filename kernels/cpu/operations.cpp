#include "operations.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "pool.h"

namespace phalanx {
namespace {

// Words of k multiplied in one go: two panels of so many bfloat16 stay in the first cache; fewer floats are summed up
// at once, for precision.
constexpr int kWordBlock = 512, kFloatWordBlock = 64;
constexpr int kTileRows = 96;                           // rows of x whose packed words stay in the second cache
constexpr int kChunkRows = 768, kTileChunkRows = 1024;  // rows of x that are packed at once
// Each thread packs x for itself, which costs it as much as some 8 columns do, as long as the columns are many and the
// copies fit into a cache: to write lines that another core has read costs more, if that core is far away.
constexpr int64_t kOwnPackedBytes = 16 << 20;
constexpr int64_t kOwnTileBytes = 1 << 18;  // tiles multiply so fast that fewer rows pay
constexpr int kOwnPackedColumns = 64;       // for each thread
constexpr int kTasksPerThread = 16;         // of many rows: so that a thread which is held up costs little

const Kernels* best_kernels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    for (const char* name : {"avx512_amx", "avx512_bf16", "avx512", "avx2"}) {
        if (const Kernels* found = find_kernels(name)) return found;
    }
#endif
    return &kPortable;
}

const Kernels* current = nullptr;

// The rows of x as row blocks, and the tasks: for the micro-kernel of vectors.
void plan_vectors(Linear& job, int rows_each) {
    job.row_blocks = static_cast<int>(ceil_div(job.m, rows_each));
    job.m_tiles = static_cast<int>(ceil_div(job.row_blocks * static_cast<int64_t>(rows_each), kTileRows));
    if (job.kind == WeightKind::kPlain || job.kind == WeightKind::kCompressed) {
        int64_t passes = ceil_div(job.words, job.dtype == DType::kFloat32 ? kFloatWordBlock : kWordBlock);
        job.word_block = static_cast<int>(ceil_div(ceil_div(job.words, passes), kGroupWords) * kGroupWords);
    }
    // Of many rows a task does several units, for which it finds its rows in the second cache.
    int64_t wanted = std::max<int64_t>(1, static_cast<int64_t>(threads()) * kTasksPerThread / job.m_tiles);
    job.units_per_task = job.m_tiles > 1 ? static_cast<int>(std::max<int64_t>(1, job.n_units / wanted)) : 1;
}

// The same for tiles. Row blocks are even in number, unless there is but one, and as even in size as can be.
void plan_amx(Linear& job) {
    constexpr int kRows = 16, kTaskRows = 512;
    constexpr int kFewRowsWords = 128, kManyRowsWords = 256;  // of a chunk; two or four panels stay in the first cache
    constexpr int64_t kLeastUnits = 4, kMostUnits = 8;        // of many rows: C stays in the second cache
    const bool grouped = job.kind == WeightKind::kInt8 || job.kind == WeightKind::kInt4, one = job.m <= kRows;
    job.row_blocks = static_cast<int>(one ? 1 : grouped ? ceil_div(job.m, kRows) : 2 * ceil_div(job.m, 2 * kRows));
    job.block_rows = static_cast<int>(ceil_div(job.m, job.row_blocks));
    job.m_tiles = static_cast<int>(ceil_div(job.m, kTaskRows));
    if (!grouped) {
        const int64_t passes = ceil_div(job.words, one ? kFewRowsWords : kManyRowsWords);
        job.word_block = static_cast<int>(ceil_div(ceil_div(job.words, passes), kGroupWords) * kGroupWords);
    }
    const int64_t wanted = std::max<int64_t>(1, static_cast<int64_t>(threads()) * kTasksPerThread / job.m_tiles);
    int64_t units = std::max<int64_t>(1, job.n_units / wanted);
    if (one) {
        units = ceil_div(units, 2) * 2;
    } else if (!grouped && job.m > 4 * kRows) {
        const int64_t fair = std::max<int64_t>(1, static_cast<int64_t>(job.n_units) * job.m_tiles / threads());
        units = std::min(std::max(units, std::min(fair, kLeastUnits)), kMostUnits);
    }
    job.units_per_task = static_cast<int>(units);
}

// Whether one row of x can be multiplied where it stands.
bool as_it_stands(const Kernels& k, const Linear& job) {
    if (job.m != 1 || job.kind == WeightKind::kInt8 || job.kind == WeightKind::kW8A8) return false;
    return !by_tiles(k, job) || k.row_bytes(job) == int64_t{job.words} * 4;
}

void run_chunk(Linear& job) {
    const Kernels& k = kernels();
    const bool tiles = by_tiles(k, job);
    int64_t columns = job.output == Output::kSiluMul ? job.n / 2 : job.n;
    job.n_units = static_cast<int>(ceil_div(columns, job.output == Output::kSiluMul ? kPanel : 2 * kPanel));
    tiles ? plan_amx(job) : plan_vectors(job, k.max_rows);

    const int tasks = static_cast<int>(ceil_div(job.n_units, job.units_per_task)) * job.m_tiles;
    const int64_t bytes = tiles ? int64_t{job.row_blocks} * job.block_rows * k.row_bytes(job)
                                : static_cast<int64_t>(job.m) * job.words * 4;
    const auto room = [&] { return static_cast<uint32_t*>(scratch(3, bytes)); };
    const auto room_for_scales = [&] { return static_cast<float*>(scratch(7, job.m * sizeof(float))); };
    const int64_t own_bytes = tiles ? kOwnTileBytes : kOwnPackedBytes;
    if (as_it_stands(k, job)) {
        const PackedRows x{static_cast<const uint32_t*>(job.x), nullptr};
        parallel(tasks, [&](int task) { k.linear(job, x, task); });
    } else if (bytes * threads() <= own_bytes && job.n >= kOwnPackedColumns * threads()) {
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

#if PHALANX_HAS_AMX
// Whether the processor has AMX for both kinds of numbers, and the system lets this process use it: the state of its
// tiles is large, so Linux wants to be asked, once a process (arch_prctl(2), ARCH_REQ_XCOMP_PERM).
bool may_use_tiles() {
    static const bool may = [] {
        constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25, kAll = kBFloat16 | kTiles | kInt8;
        unsigned a, b, c, d;
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
        constexpr long kRequest = 0x1023, kTileData = 18;
        return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    }();
    return may;
}
#endif

}  // namespace

const Kernels* find_kernels(const char* name) {
    std::string_view wanted(name);
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool bf16 = avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#if PHALANX_HAS_AMX
    if (bf16 && wanted == kAvx512Amx.name && may_use_tiles()) return &kAvx512Amx;
#endif
    if (bf16 && wanted == kAvx512Bf16.name) return &kAvx512Bf16;
    if (avx512 && wanted == kAvx512.name) return &kAvx512;
    if (avx2 && wanted == kAvx2.name) return &kAvx2;
#endif
    if (wanted == kEmulatedAmx.name) return &kEmulatedAmx;
    return wanted == kPortable.name ? &kPortable : nullptr;
}

void use_kernels(const Kernels* kernels) { current = kernels; }

const Kernels& kernels() {
    if (current == nullptr) current = best_kernels();
    return *current;
}

void run_linear(Linear job) {
    if (job.kind == WeightKind::kInt8 && (job.together == 4) != by_tiles(kernels(), job))
        throw std::invalid_argument("an int8 weight is multiplied by the kind of kernels that it was packed for");
    int64_t out_bytes =
        job.output == Output::kStoreFloat || job.output == Output::kAddFloat ? 4 : element_bytes(job.dtype);
    const char* x = static_cast<const char*>(job.x);
    char* out = static_cast<char*>(job.out);
    // Even chunks, so that none is too small for all threads.
    int chunks = static_cast<int>(ceil_div(job.m, by_tiles(kernels(), job) ? kTileChunkRows : kChunkRows)), m = job.m;
    for (int i = 0; i < chunks; ++i) {
        int first = block_start(m, chunks, i);
        job.m = block_start(m, chunks, i + 1) - first;
        job.x = x + first * job.ldx * element_bytes(job.dtype);
        job.out = out + first * job.ldo * out_bytes;
        run_chunk(job);
    }
}

void multiply(Linear weight, const void* x, int64_t ldx, int m, const void* bias, Output output, void* out,
              int64_t ldo) {
    weight.x = x;
    weight.ldx = ldx;
    weight.m = m;
    weight.bias = bias;
    weight.output = output;
    weight.out = out;
    weight.ldo = ldo;
    run_linear(weight);
}

namespace {

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
    job.partials = static_cast<float*>(
        scratch(5, static_cast<int64_t>(plan.partials) * job.query_rows * (job.head_dim + 2) * sizeof(float)));
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

void run_argmax(const float* rows, int64_t count, int64_t size, float* values, int64_t* places) {
    const Kernels& k = kernels();
    run_rows(static_cast<int>(count), size,
             [&](int row) { places[row] = k.argmax(rows + row * size, size, values + row); });
}

void run_noisy_argmax(const float* rows, int64_t count, int64_t size, const float* temperatures, const int64_t* seeds,
                      const int64_t* counters, float* values, int64_t* places) {
    const Kernels& k = kernels();
    run_rows(static_cast<int>(count), size, [&](int row) {
        places[row] =
            k.noisy_argmax(rows + row * size, size, temperatures[row], seeds[row], counters[row], values + row);
    });
}

void run_block_maxima(const float* rows, int64_t count, int64_t size, int64_t block, float* out) {
    const Kernels& k = kernels();
    const int64_t blocks = ceil_div(size, block);
    run_rows(static_cast<int>(count), size,
             [&](int row) { k.block_maxima(rows + row * size, size, block, out + row * blocks); });
}

double read_rate(int64_t bytes, int repeats) {
    const Kernels& k = kernels();
    int64_t count = bytes / 4, pieces = static_cast<int64_t>(threads()) * 64;
    std::unique_ptr<float, decltype(&std::free)> memory(
        static_cast<float*>(std::aligned_alloc(4096, ceil_div(bytes, 4096) * 4096)), &std::free);
    if (!memory) throw std::bad_alloc();
    auto start_of = [&](int64_t i) { return count * i / pieces; };
    auto touch = [&](int i) {  // no two pages alike: a host may keep those once
        for (int64_t at = start_of(i); at < start_of(i + 1); ++at) memory.get()[at] = static_cast<float>(at);
    };
    parallel(static_cast<int>(pieces), touch);
    double best = 0;
    std::vector<float> sums(pieces);
    auto read = [&](int i) { sums[i] = k.sum(memory.get() + start_of(i), start_of(i + 1) - start_of(i)); };
    for (int repeat = 0; repeat < repeats; ++repeat) {
        auto begin = std::chrono::steady_clock::now();
        parallel(static_cast<int>(pieces), read);
        std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        best = std::max(best, count * 4.0 / seconds.count());
    }
    return best;
}

double multiply_rate(int64_t steps) {
    const Kernels& k = kernels();
    int pieces = threads() * 16;
    std::vector<float> sums(pieces);
    auto body = [&](int i) { sums[i] = k.multiply_add(steps); };
    double best = 0;
    for (int repeat = 0; repeat < 3; ++repeat) {
        auto begin = std::chrono::steady_clock::now();
        parallel(pieces, body);
        std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        best = std::max(best, 2.0 * 32 * 12 * steps * pieces / seconds.count());
    }
    return best;
}

}  // namespace phalanx
