// Linear layers whose weights have a scale for each group of columns along k: int4 (groups of 64), and int8 (of 32) as
// long as it is multiplied in integers.
// Included inside an instruction set's namespace.
//
// A group's sums come out of the tiles by themselves, and are added to the row's sums, times their scales, with
// vectors: while the tiles multiply some groups of a row block, the vectors add those of the one before.
//
// int8: x has 16 bits, tiles multiply 8: 256 * (high bytes) * w + (low bytes) * w, exactly, in two products. A few rows
// leave most of a tile empty and are multiplied by vectors, whose integers are the same.
// int4: the numbers become bfloat16, exactly, in two tiles of B; a chunk of them serves all row blocks.

constexpr int kChunkGroups = 4;  // whose sums of two row blocks stay in the first cache

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

    // Half: of the tiles, which take turns from group to group.
    template <int Half>
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

// The same for 4-bit weights: a group is decoded to two tiles of bfloat16, whose products go to one tile of sums.
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

// Some groups' sums of a row block, still to be added to its rows' sums, or to begin them.
template <class Groups>
struct PendingGroups {
    const char* out = nullptr;     // each group's tiles
    const bf16* scales = nullptr;  // each group's columns'
    int64_t groups = 0;
    float* to = nullptr;
    bool add = false;
    int row = 0, rows = 0;

    // A whole chunk's loop has a constant length, so that the compiler unrolls it.
    INLINE void finish(int count) {
        const int until = std::min(rows, row + count);
        if (groups == kChunkGroups) {
            for (; row < until; ++row) finish_row(std::integral_constant<int, kChunkGroups>{});
        } else {
            for (; row < until; ++row) finish_row(groups);
        }
    }

    template <class Count>
    INLINE void finish_row(Count count) {
        float* sums = to + row * 32;
        vf sum = add ? load(sums) : vf{};
        for (int64_t g = 0; g < count; ++g)
            sum = fused(Groups::sums(out + g * Groups::kSumTiles * kTileBytes, row), load_as_float(scales + g * kPanel),
                        sum);
        store(sums, sum);
    }
};

// A task, of which the kind of groups is all that varies. Chunks of groups go through all of the task's row blocks.
template <class Groups>
struct GroupedTask : TileRange {
    static constexpr int64_t kRoomBytes = kChunkGroups * 2 * kTileBytes;

    const Linear& job;
    const PackedRows& x;
    int64_t panel_bytes, block_bytes, block_sums;  // of a weight's panel, of x's rows, floats of C
    float* sums;
    char *room, *sums_of_groups;  // the latter of two row blocks, which take turns
    int turn = 0;
    PendingGroups<Groups> pending;

    GroupedTask(const Linear& job, const PackedRows& x, int task) : TileRange(tile_range(job, task)), job(job), x(x) {
        panel_bytes = Groups::panel_bytes(job);
        block_bytes = packed_row_bytes(job) * job.block_rows;
        block_sums = int64_t{job.block_rows} * 32;
        sums = static_cast<float*>(scratch(Scratch::kLinearSums, (last_block - first_block) * block_sums * 4));
        room = static_cast<char*>(
            scratch(Scratch::kLinearWeights, kRoomBytes + 2 * kChunkGroups * Groups::kSumTiles * kTileBytes));
        sums_of_groups = room + kRoomBytes;
    }

    const char* panel_at(int64_t panel) const { return static_cast<const char*>(job.weight) + panel * panel_bytes; }

    void run() {
        configure(job.block_rows, Groups::kWords);
        for (int64_t unit = first_unit; unit < last_unit; ++unit) {
            const Panels panels = panels_of(job, unit);
            const Panels next = panels_of(job, std::min<int64_t>(unit + 1, job.n_units - 1));
            multiply_panel(panels.first, panel_at(panels.second), sums);
            multiply_panel(panels.second, panel_at(next.first), sums + kPanel);
            pending.finish(pending.rows);
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
            const bf16* scales = job.scales + (number * job.groups + group) * kPanel;
            for (int block = first_block; block < last_block; ++block) {
                const char* a = reinterpret_cast<const char*>(x.words) + block * block_bytes +
                                group * Groups::kRowBytes * job.block_rows;
                float* to = panel_sums + (block - first_block) * block_sums;
                multiply_groups(a, b, groups, scales, to, group > 0, block == first_block ? fetched : nullptr,
                                group_bytes);
            }
        }
    }

    // Some groups with one row block. Meanwhile the sums of what was multiplied before are added.
    INLINE void multiply_groups(const char* a, const char* b, int64_t groups, const bf16* scales, float* to, bool add,
                                const char* fetched, int64_t group_bytes) {
        constexpr int64_t kOutBytes = Groups::kSumTiles * kTileBytes;
        char* out = sums_of_groups + turn * kChunkGroups * kOutBytes;
        turn = 1 - turn;
        const int at_once = static_cast<int>(ceil_div(pending.rows, groups));
        for (int64_t i = 0; i < groups; ++i) {
            if (fetched)
                for (int64_t line = 0; line < group_bytes; line += 64)
                    __builtin_prefetch(fetched + i * group_bytes + line, 0, 2);
            Groups::load_rows(job, a + i * Groups::kRowBytes * job.block_rows);
            i % 2 ? Groups::template multiply<1>(b, i, out + i * kOutBytes)
                  : Groups::template multiply<0>(b, i, out + i * kOutBytes);
            pending.finish(at_once);
        }
        pending = {out, scales, groups, to, add, 0, job.block_rows};
    }

    // A unit's rows to where they belong. x of int8 weights has a scale for each row, still to be applied.
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

// A few rows of int8 weights by vectors. A group's products with the high bytes, which stand 128 too high, the low
// bytes and 1: 256 * (high + 128) * w + low * w - 32768 * w are x * w, whatever overflows meanwhile.
struct Int8Rows : TileRange {
    static constexpr int kWords = Int8Groups::kWords;

    const Linear& job;
    const PackedRows& x;
    float* sums;

    Int8Rows(const Linear& job, const PackedRows& x, int task) : TileRange(tile_range(job, task)), job(job), x(x) {
        sums = static_cast<float*>(scratch(Scratch::kLinearSums, kVectorRows * 32 * 4));
    }

    void run() {
        for (int64_t unit = first_unit; unit < last_unit; ++unit) {
            const Panels panels = panels_of(job, unit);
            const Panels next = panels_of(job, std::min<int64_t>(unit + 1, job.n_units - 1));
            with_rows<kVectorRows>(job.m, [&](auto R) {
                multiply_panel<R>(panels.first, panels.second, sums);
                multiply_panel<R>(panels.second, next.first, sums + kPanel);
            });
            for (int r = 0; r < job.m; ++r)
                finish_row<bf16>(job, r, unit, load(sums + r * 32) * x.scales[r],
                                 load(sums + r * 32 + 16) * x.scales[r]);
        }
    }

    // Memory is read from the first byte of a panel to its last, and the scales beside it; `next` is read after that.
    template <int R>
    INLINE void multiply_panel(int64_t number, int64_t next, float* to) {
        constexpr int64_t kGroupBytes = kWords * kPanel * 4, kScaleBytes = kPanel * sizeof(bf16), kAheadGroups = 8;
        const int64_t panel_bytes = Int8Groups::panel_bytes(job), row_bytes = 4 * kWords;
        const char *panel = static_cast<const char*>(job.weight) + number * panel_bytes,
                   *after = static_cast<const char*>(job.weight) + next * panel_bytes;
        const char* scales = reinterpret_cast<const char*>(job.scales) + number * job.groups * kScaleBytes;
        const char* scales_after = reinterpret_cast<const char*>(job.scales) + next * job.groups * kScaleBytes;
        const char* a = reinterpret_cast<const char*>(x.words);

        vf total[R];
        for (int r = 0; r < R; ++r) total[r] = vf{};
        for (int64_t group = 0; group < job.groups; ++group, a += 2 * R * row_bytes) {
            const int64_t ahead = group + kAheadGroups, past = ahead - job.groups;
            const char* fetched = past < 0 ? panel + ahead * kGroupBytes : after + past * kGroupBytes;
            __builtin_prefetch(past < 0 ? scales + ahead * kScaleBytes : scales_after + past * kScaleBytes, 0, 2);
            const int64_t words = std::min<int64_t>(kWords, job.words - group * kWords);

            vi high[R], low[R], ones{};
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) high[r] = low[r] = vi{};
            for (int64_t k = 0; k < words; ++k) {
                __builtin_prefetch(fetched + k * kPanel * 4, 0, 2);
                const vu w = Bytes::load_weight(panel + (group * kWords + k) * kPanel * 4);
                ones = Bytes::multiply_add(ones, splat(uint32_t{0x01010101}), w);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const uint32_t* row = reinterpret_cast<const uint32_t*>(a + r * row_bytes);
                    high[r] = Bytes::multiply_add(high[r], splat(row[k]), w);
                    low[r] = Bytes::multiply_add(low[r], splat(row[R * kWords + k]), w);
                }
            }

            // `ones` are the sums of the group's weights; times 32768 they are what the high bytes are too high.
            const vf scale = load_as_float(reinterpret_cast<const bf16*>(scales + group * kScaleBytes));
            const vi offset = ones << 15;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) total[r] = fused(to_floats((high[r] << 8) + low[r] - offset), scale, total[r]);
        }
        for (int r = 0; r < R; ++r) store(to + r * 32, total[r]);
    }
};
