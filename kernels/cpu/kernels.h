// What one operation computes, and the functions that compute its tasks, one set for each instruction set.
//
// Elements are bfloat16 (T = bf16) or float (T = float). Everything that is multiplied stands in *words* of 32 bits:
// two bfloat16 that follow each other along the summed dimension, or one float. A *panel* holds 16 columns of a matrix
// B that is multiplied from the left: for each word along the summed dimension the 16 words of its columns, 64 bytes.
//   weight (N, K):        [N / 16][K words][16]
//   keys of a block:      [kv head][block_size / 16][head_dim words][16 keys]
//   values of a block:    [kv head][head_dim / 16][block_size words][16 dimensions]
// A cache of 8-bit numbers has 16 bits for a word, two numbers; behind what a head has of a block stand block_size
// floats, the scales of its keys or values.
#pragma once

#include <cstdint>
#include <cstring>

namespace phalanx {

// Whether the compiler is new enough for AMX.
#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || __GNUC__ >= 11)
#define PHALANX_HAS_AMX 1
#else
#define PHALANX_HAS_AMX 0
#endif

constexpr int kPanel = 16;  // columns of a panel

struct bf16 {
    uint16_t bits;
};

inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
inline float to_float(float x) { return x; }

// Rounded to nearest, ties to even; a NaN stays one.
inline bf16 to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return {static_cast<uint16_t>(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0)};
}

// 1.5 * 2^23: a float of less than 2^22 that it is added to and subtracted from again is rounded to the nearest
// integer.
constexpr float kRounder = 12582912.0f;

enum class DType : int { kBFloat16 = 0, kFloat32 = 1 };

inline int element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A tiles of bfloat16, see amx/pack.h: rows and columns of one.
constexpr int kTileRows = 16, kTileColumns = 32;

// Where an element of a matrix stands whose rows have `ld` elements: row by row; or as A tiles, blocks of 16 rows, each
// tile after tile along the columns, so that it is multiplied as it stands. Either way sixteen elements, from a
// multiple of sixteen on, stand together.
template <class T>
inline T* element(void* matrix, int64_t ld, bool tiles, int64_t row, int64_t column) {
    T* first = static_cast<T*>(matrix);
    if (!tiles) return first + row * ld + column;
    return first + row / kTileRows * kTileRows * ld + column / kTileColumns * (kTileRows * kTileColumns) +
           row % kTileRows * kTileColumns + column % kTileColumns;
}

enum class Output : int {
    kStore = 0,       // out (M, N) in the element type
    kStoreFloat = 1,  // out (M, N) in float
    kAddFloat = 2,    // out (M, N) in float, added to
    kSiluMul = 3,     // out (M, N / 2): silu of the first half of the columns times the second half
};

// kInt8AsBfloat16 is a kInt8 weight of many rows with tiles, see choose_kind() in runtime/operations.cpp.
enum class WeightKind : int { kPlain = 0, kInt8 = 1, kInt4 = 2, kW8A8 = 3, kCompressed = 4, kInt8AsBfloat16 = 5 };

// A linear layer, x W^T + bias for m rows of x: its weight, what it is multiplied with, and the plan of its tasks.
struct Linear {
    DType dtype;
    WeightKind kind;
    Output output;
    const void* x;  // (m, k) of dtype, rows ldx elements apart
    int64_t ldx;
    bool x_tiles;           // x stands as A tiles, see element()
    int m, k, n;            // n counts columns of the matrix, padding excluded; for kSiluMul of both halves
    int words;              // of k in packed x
    int together;           // kInt8, kW8A8: numbers of a row side by side in a panel, which are one word
    bool deterministic;     // kInt8: multiplied in the same way beside any number of rows
    const void* weight;     // panels
    const uint32_t* apart;  // kCompressed: the groups that are not, (groups, kGroupWords, 16)
    const bf16* scales;     // quantized: (panels, groups, 16)
    const float* sums;      // kInt8, kW8A8: (padded n,) of the weights along k
    int groups;             // quantized: of word_block words each
    const void* bias;       // (n,) of dtype, or null
    void* out;
    int64_t ldo;
    bool out_tiles;  // of kSiluMul with a whole number of tiles: out becomes A tiles
    // The plan of its tasks, see run_chunk() in runtime/operations.cpp: x is cut into row blocks, which the
    // micro-kernel takes, of which m_tiles are made; the columns into units of two panels. A task is one tile by
    // units_per_task units.
    int row_blocks, m_tiles, n_units, units_per_task;
    int word_block;  // words of k that are multiplied in one go
    int block_rows;  // with tiles: rows of a block, also of the last, in which some may be missing
};

// x as the micro-kernel takes it.
struct PackedRows {
    const uint32_t* words;  // row blocks [k words][rows of the block]; or of floats, see kSteps in vectors.h
    const float* scales;    // kInt8, kW8A8: (m,)
};

// Attention of a step's queries over one layer's pool, cut into tasks (plan_tasks() in runtime/operations.cpp).
struct Attention {
    DType dtype;
    const void* q;  // (tokens, heads, head_dim), tokens ldq elements apart
    int64_t ldq;
    const void* keys;  // the pool
    const void* values;
    bool int8_cache;
    const int64_t* block_table;  // (rows, table_stride)
    int64_t table_stride;
    const int32_t* cu_q;       // (rows + 1,)
    const int32_t* seqused_k;  // (rows,)
    int heads, kv_heads, head_dim, block_size;
    float scale;
    void* out;             // (tokens, heads, head_dim)
    bool out_tiles;        // a token's heads are a whole number of tiles, and out becomes A tiles
    const int32_t* tasks;  // (count, 6): row, kv head, first token, tokens, first key, partial (or -1)
    int count;
    int query_rows;   // query rows (tokens x heads of a group) of a task at most, unless a group has more
    float* partials;  // per partial and query row: head_dim sums, maximum, denominator
};

constexpr int kKeyTile = 256;     // keys whose scores are held at once
constexpr int kSplitKeys = 1024;  // a decode row longer than this is cut into tasks of so many keys
constexpr int kTaskFields = 6;

// RMSNorm of m rows.
struct Norm {
    DType dtype;
    const float* x;  // (m, size)
    const float* weight;
    float eps;
    void* out;  // (m, size) of dtype
    int m, size;
    bool out_tiles;  // a row is a whole number of tiles, and out becomes A tiles
};

// What happens to a projection before attention: head norms, rotary embedding, and storing keys and values.
struct Rope {
    DType dtype;
    void* qkv;  // (tokens, heads + 2 kv_heads, head_dim), tokens ld elements apart; queries are rotated in place
    int64_t ld;
    const void* cos;  // (tokens, head_dim) of dtype, of which the first half is read; null: nothing is rotated
    const void* sin;
    const float* q_norm;  // (head_dim,) or null
    const float* k_norm;
    float eps;
    void* keys;  // the pool
    void* values;
    bool int8_cache;
    const int64_t* slot_mapping;  // (tokens,)
    int tokens, heads, kv_heads, head_dim, block_size;
};

// How `sum` goes through memory. Which is fastest differs between machines, and between one core and all.
enum class ReadPattern : int {
    kOneStream = 0,            // from the first to the last, prefetched by the processor alone
    kOneStreamPrefetched = 1,  // the same, prefetched by instructions too
    kFourStreams = 2,          // from four addresses at once, prefetched by instructions too
};
constexpr int kReadPatterns = 3;

// One instruction set's functions (targets/isa.h).
struct Kernels {
    const char* name;
    int max_rows;                         // rows of x that the micro-kernel takes
    int query_rows;                       // of a task of attention
    void (*release)();                    // gives up the calling thread's tiles; null where there are none
    int64_t (*row_bytes)(const Linear&);  // of packed x
    void (*pack_x)(const Linear&, int row_block, uint32_t* to, float* scales);
    void (*linear)(const Linear&, const PackedRows& x, int task);
    void (*attention)(const Attention&, int task);
    void (*merge)(const Attention&, int row, int kv_head, int splits, int partial);
    void (*norm)(const Norm&, int row);
    void (*rope)(const Rope&, int token);
    int64_t (*argmax)(const float* row, int64_t size, float* value);
    int64_t (*gumbel_argmax)(const float* row, int64_t size, float temperature, uint64_t seed, uint64_t counter,
                             float* value);
    void (*block_maxima)(const float* row, int64_t size, int64_t block, float* out);
    void (*mask)(float* row, int64_t size, const uint32_t* bits, int64_t offset);
    // What runtime/rates.cpp measures the machine with.
    float (*sum)(const float* from, int64_t size, int64_t times, ReadPattern pattern);
    float (*multiply_add)(int64_t steps);
    int64_t (*compress)(const uint32_t* panel, int64_t words, uint8_t* to, uint32_t* apart, int64_t number);
    bf16 (*choose_scale)(const bf16* from, int64_t count, float limit, float span, int steps);
    // 4 * steps products of tiles, 2x2 blocks of 16x16x32 bfloat16 or 16x16x64 int8, whose operands are loaded again
    // from the first cache each time and are random numbers. Null where there are no tiles.
    float (*tile_products)(bool int8, int64_t steps);
};

// kCompressed: a panel is cut into groups of so many words, or what is left; see gemm/compressed.h.
constexpr int kGroupWords = 64, kTableBytes = 16, kQuadBytes = 192;

// Bytes of a panel's tables, padded to whole cache lines, and of the whole panel.
inline int64_t tables_bytes(int64_t words) {
    return ((words + kGroupWords - 1) / kGroupWords * kTableBytes + 63) / 64 * 64;
}
inline int64_t compressed_bytes(int64_t words) { return tables_bytes(words) + words / 4 * kQuadBytes; }

// Whether a group is kept uncompressed, and where it stands among those. A table of upper bytes is in ascending order
// (compress_group() in gemm/compressed.h), so a first byte above the second marks such a group; its number follows.
inline bool stands_apart(const uint8_t* table) { return table[0] > table[1]; }
inline const uint32_t* words_apart(const uint8_t* table, const uint32_t* apart) {
    uint32_t number;
    std::memcpy(&number, table + 4, sizeof(number));
    return apart + static_cast<int64_t>(number) * kGroupWords * kPanel;
}

// Whether a set of kernels multiplies this by tiles, for which x is packed and the tasks are planned in another way.
inline bool by_tiles(const Kernels& kernels, const Linear& job) {
    return kernels.release != nullptr && job.dtype == DType::kBFloat16;
}

// Words of x that a word of the weight stands for.
inline int words_per_stored(WeightKind kind) { return kind == WeightKind::kInt4 ? 4 : 1; }

// The index of a row's group among the scales (panels, groups, 16), and of a row's number i among panels that hold
// `together` numbers of a row side by side, k in all.
inline int64_t scale_index(int64_t row, int64_t groups, int64_t group) {
    return (row / kPanel * groups + group) * kPanel + row % kPanel;
}
inline int64_t number_index(int64_t row, int64_t k, int64_t i, int together) {
    return row / kPanel * k * kPanel + (i / together * kPanel + row % kPanel) * together + i % together;
}

// The first row of block `i` when m rows are cut into `blocks` even ones.
inline int block_start(int64_t m, int64_t blocks, int64_t i) { return static_cast<int>(m * i / blocks); }

extern const Kernels kAvx512Amx, kEmulatedAmx, kAvx512Bf16, kAvx512Vnni, kAvx512, kAvx2, kPortable;

}  // namespace phalanx
