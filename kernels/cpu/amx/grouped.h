// Linear layers whose weights have a scale for each group of columns along k: int8 (groups of 32) and int4 (of 64).
// Included inside an instruction set's namespace.
//
// A group's sums come out of the tiles by themselves, and are added to the row's sums, times their scales, with
// vectors: while the tiles multiply a group, the vectors add the one before.
//
// int8: x has 16 bits, tiles multiply 8: 256 * (high bytes) * w + (low bytes) * w, exactly, in two products.
// int4: the numbers become bfloat16, exactly, in two tiles of B; a chunk of them serves all row blocks.

constexpr int kChunkGroups = 8;
constexpr int kLag = 3;  // groups that the vectors are behind the tiles: what tiles store takes some time to be there

// One group of a panel, multiplied with one row block, to `out`: one tile of sums, or two.
struct Int8Groups {
    static constexpr int kWords = 8;  // of k in a tile of A
    static constexpr int kSumTiles = 2;
    static constexpr int64_t kRowBytes = 64;  // of x, for a group

    static INLINE int64_t panel_bytes(const Linear& job) { return int64_t{job.words} * kPanel * 4; }

    // The chunk's B tiles, where they stand; a last group that is not full, and what comes before it, in `room`.
    static INLINE const char* tiles(const Linear& job, const char* panel, int64_t group, int64_t groups, char* room) {
        const int64_t words = std::min<int64_t>(groups * kWords, job.words - group * kWords);
        const char* from = panel + group * kWords * kPanel * 4;
        if (words == groups * kWords) return from;
        std::memcpy(room, from, words * kPanel * 4);
        zero_past(room, words * kPanel * 4, groups * kWords * kPanel * 4);
        return room;
    }

    static INLINE void load_rows(const Linear& job, const char* a) {
        tile_load<4>(a, 4 * kWords);
        tile_load<5>(a + int64_t{job.block_rows} * 4 * kWords, 4 * kWords);
    }

    template <int Half>  // of the tiles
    static INLINE void multiply(const char* b, int64_t index, char* out) {
        constexpr int kB = 6 + Half, kHigh = 2 * Half, kLow = kHigh + 1;
        tile_load<kB>(b + index * kWords * kPanel * 4, kTileRowBytes);
        tile_zero<kHigh>();
        tile_zero<kLow>();
        tile_dot_ss8<kHigh, 4, kB>();
        tile_dot_us8<kLow, 5, kB>();
        tile_store<kHigh>(out, kTileRowBytes);
        tile_store<kLow>(out + kTileBytes, kTileRowBytes);
    }

    static INLINE vf sums(const char* out, int row) {
        const vi* high = reinterpret_cast<const vi*>(out + row * kTileRowBytes);
        return to_floats((high[0] << 8) + high[kTileBytes / sizeof(vi)]);
    }
};

struct Int4Groups {
    static constexpr int kWords = kTileWords;
    static constexpr int kSumTiles = 1;
    static constexpr int64_t kRowBytes = 128;
    static constexpr int kGroupTiles = 2;

    static INLINE int64_t panel_bytes(const Linear& job) { return int64_t{job.words} * kPanel; }

    static INLINE const char* tiles(const Linear& job, const char* panel, int64_t group, int64_t groups, char* room) {
        const int64_t k = group * kGroupTiles * kTileWords, room_words = groups * kGroupTiles * kTileWords;
        const int64_t words = std::min<int64_t>(room_words, job.words - k);
        decode(reinterpret_cast<const uint32_t*>(panel + k * kPanel), words, 0, reinterpret_cast<uint32_t*>(room));
        zero_past(room, words * kPanel * 4, room_words * kPanel * 4);
        return room;
    }

    static INLINE void load_rows(const Linear& job, const char* a) {
        tile_load<4>(a, kTileRowBytes);
        tile_load<5>(a + int64_t{job.block_rows} * kTileRowBytes, kTileRowBytes);
    }

    template <int Half>
    static INLINE void multiply(const char* b, int64_t index, char* out) {
        constexpr int kC = 2 * Half;
        const char* from = b + index * kGroupTiles * kTileBytes;
        tile_zero<kC>();
        tile_load<6>(from, kTileRowBytes);
        tile_dot_bf16<kC, 4, 6>();
        tile_load<7>(from + kTileBytes, kTileRowBytes);
        tile_dot_bf16<kC, 5, 7>();
        tile_store<kC>(out, kTileRowBytes);
    }

    static INLINE vf sums(const char* out, int row) { return *reinterpret_cast<const vf*>(out + row * kTileRowBytes); }
};

// Adds a group's sums, times their columns' scales, to those of `rows` rows, or begins them.
template <class Groups>
INLINE void add_group(const char* out, const float* scales, int rows, float* to, bool add) {
    const vf scale = load(scales);
    if (add) {
        for (int r = 0; r < rows; ++r, to += 32) store(to, fused(Groups::sums(out, r), scale, load(to)));
    } else {
        for (int r = 0; r < rows; ++r, to += 32) store(to, fused(Groups::sums(out, r), scale, vf{}));
    }
}

template <class Groups>
struct GroupedTask : TileRange {
    static constexpr int64_t kRoomBytes = kChunkGroups * 2 * kTileBytes;

    const Linear& job;
    const PackedRows& x;
    int64_t panel_bytes, block_bytes, block_sums;  // of a weight's panel, of x's rows, floats of C
    float* sums;
    char* room;

    GroupedTask(const Linear& job, const PackedRows& x, int task) : TileRange(tile_range(job, task)), job(job), x(x) {
        panel_bytes = Groups::panel_bytes(job);
        block_bytes = packed_row_bytes(job) * job.block_rows;
        block_sums = int64_t{job.block_rows} * 32;
        sums = static_cast<float*>(scratch(0, (last_block - first_block) * block_sums * 4));
        room = static_cast<char*>(scratch(6, kRoomBytes));
    }

    const char* panel_at(int64_t panel) const { return static_cast<const char*>(job.weight) + panel * panel_bytes; }

    void run() {
        configure(job.block_rows, Groups::kWords);
        for (int64_t unit = first_unit; unit < last_unit; ++unit) {
            const Panels panels = panels_of(job, unit);
            const Panels next = panels_of(job, std::min<int64_t>(unit + 1, job.n_units - 1));
            multiply_panel(panels.first, panel_at(panels.second), sums);
            multiply_panel(panels.second, panel_at(next.first), sums + kPanel);
            finish(unit);
        }
    }

    // Memory is read as in gemm.h, from the first byte of a panel to its last; `next` is read after that.
    void multiply_panel(int64_t number, const char* next, float* panel_sums) {
        constexpr int64_t kAheadBytes = 4096;
        const char* panel = panel_at(number);
        const int64_t group_bytes = ceil_div(panel_bytes, job.groups);
        for (int64_t group = 0; group < job.groups; group += kChunkGroups) {
            const int64_t groups = std::min<int64_t>(kChunkGroups, job.groups - group);
            const int64_t ahead = group * group_bytes + kAheadBytes, past = ahead - panel_bytes;
            const char* fetched = past < 0 ? panel + ahead : next + past;
            const char* b = Groups::tiles(job, panel, group, groups, room);
            const float* scales = job.scales + (number * job.groups + group) * kPanel;
            for (int block = first_block; block < last_block; ++block) {
                const char* a = reinterpret_cast<const char*>(x.words) + block * block_bytes +
                                group * Groups::kRowBytes * job.block_rows;
                float* to = panel_sums + (block - first_block) * block_sums;
                multiply_groups(a, b, groups, scales, to, group > 0, block == first_block ? fetched : nullptr,
                                group_bytes);
            }
        }
    }

    // Some groups with one row block.
    INLINE void multiply_groups(const char* a, const char* b, int64_t groups, const float* scales, float* to, bool add,
                                const char* fetched, int64_t group_bytes) {
        alignas(64) char out[kLag + 1][Groups::kSumTiles * kTileBytes];
        for (int64_t i = 0; i < groups + kLag; ++i) {
            if (i < groups) {
                if (fetched)
                    for (int64_t line = 0; line < group_bytes; line += 64)
                        __builtin_prefetch(fetched + i * group_bytes + line, 0, 2);
                Groups::load_rows(job, a + i * Groups::kRowBytes * job.block_rows);
                char* sums_of_group = out[i % (kLag + 1)];
                i % 2 ? Groups::template multiply<1>(b, i, sums_of_group)
                      : Groups::template multiply<0>(b, i, sums_of_group);
            }
            if (const int64_t done = i - kLag; done >= 0)
                add_group<Groups>(out[done % (kLag + 1)], scales + done * kPanel, job.block_rows, to, add || done > 0);
        }
    }

    void finish(int64_t unit) {
        const float* from = sums;
        for (int block = first_block; block < last_block; ++block, from += block_sums) {
            for (int r = 0; r < rows_of_block(job, block); ++r) {
                const int64_t row = int64_t{block} * job.block_rows + r;
                const float scale = job.kind == WeightKind::kInt8 ? x.scales[row] : 1.0f;
                finish_row<bf16>(job, row, unit, load(from + r * 32) * scale, load(from + r * 32 + 16) * scale);
            }
        }
    }
};
