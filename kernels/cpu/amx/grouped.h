// Linear layers whose weights have a scale for each group of columns along k: int8 (groups of 32) and int4 (of 64).
// Included inside an instruction set's namespace.
//
// A group's sums come out of the tiles by themselves, and are added to the row's sums, times their scales, with
// vectors: while the tiles multiply a group, the vectors add the one before.
//
// int8: x has 16 bits, tiles multiply 8: 256 * (high bytes) * w + (low bytes) * w, exactly, in two products.
// int4: the numbers become bfloat16, exactly, in two tiles of B; a chunk of them serves all row blocks.

constexpr int kChunkGroups = 8;

// One group of a panel, multiplied with one row block, to `out`: one tile of sums, or two.
struct Int8Groups {
    static constexpr int kWords = 8;  // of k in a tile of A
    static constexpr int kSumTiles = 2;
    static constexpr int64_t kRowBytes = 64;  // of x, for a group

    static INLINE int64_t panel_bytes(const Linear& job) { return int64_t{job.words} * kPanel * 4; }

    // The chunk's B tiles, where they stand; a last group that is not full, and what comes before it, in `room`.
    static INLINE const char* tiles(const Linear& job, const char* panel, int64_t group, int64_t groups, char* room,
                                    int64_t) {
        const int64_t words = std::min<int64_t>(groups * kWords, job.words - group * kWords);
        const char* from = panel + group * kWords * kPanel * 4;
        if (words == groups * kWords) return from;
        std::memcpy(room, from, words * kPanel * 4);
        zero_past(room, words * kPanel * 4, groups * kWords * kPanel * 4);
        return room;
    }

    static INLINE void fetch(const char* panel, int64_t group) {
        for (int64_t line = 0; line < kWords; ++line)
            __builtin_prefetch(panel + (group * kWords + line) * kPanel * 4, 0, 2);
    }

    static INLINE void load_rows(const Linear& job, const char* a) {
        tile_load<4>(a, 4 * kWords);
        tile_load<5>(a + int64_t{job.block_rows} * 4 * kWords, 4 * kWords);
    }

    template <int Panel>
    static INLINE void multiply(const char* b, int64_t index, char* out) {
        constexpr int kB = 6 + Panel, kHigh = 2 * Panel, kLow = kHigh + 1;
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

    static INLINE const char* tiles(const Linear& job, const char* panel, int64_t group, int64_t groups, char* room,
                                    int64_t ahead) {
        const int64_t k = group * kGroupTiles * kTileWords, room_words = groups * kGroupTiles * kTileWords;
        const int64_t words = std::min<int64_t>(room_words, job.words - k);
        decode(reinterpret_cast<const uint32_t*>(panel + k * kPanel), words, ahead / 4,
               reinterpret_cast<uint32_t*>(room));
        zero_past(room, words * kPanel * 4, room_words * kPanel * 4);
        return room;
    }

    static INLINE void fetch(const char*, int64_t) {}  // decode() does it

    static INLINE void load_rows(const Linear& job, const char* a) {
        tile_load<4>(a, kTileRowBytes);
        tile_load<5>(a + int64_t{job.block_rows} * kTileRowBytes, kTileRowBytes);
    }

    template <int Panel>
    static INLINE void multiply(const char* b, int64_t index, char* out) {
        constexpr int kC = 2 * Panel;
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

// Adds a group's sums of two panels, times their columns' scales, to those of `rows` rows, or begins them.
template <class Groups>
INLINE void add_group(const char* out, const float* s0, const float* s1, int rows, float* to, bool add) {
    const vf scale0 = load(s0), scale1 = load(s1);
    const char* second = out + Groups::kSumTiles * kTileBytes;
    for (int r = 0; r < rows; ++r, to += 32) {
        store(to, fused(Groups::sums(out, r), scale0, add ? load(to) : vf{}));
        store(to + 16, fused(Groups::sums(second, r), scale1, add ? load(to + 16) : vf{}));
    }
}

template <class Groups>
void grouped_tile_task(const Linear& job, const PackedRows& x, int task) {
    const TileRange range = tile_range(job, task);
    const int64_t panel_bytes = Groups::panel_bytes(job), block_bytes = packed_row_bytes(job) * job.block_rows;
    const int64_t ahead = panels_step(job) * panel_bytes;
    const int64_t block_sums = int64_t{job.block_rows} * 32;
    constexpr int64_t kRoom = kChunkGroups * 2 * kTileBytes;
    float* sums = static_cast<float*>(scratch(0, (range.last_block - range.first_block) * block_sums * 4));
    char* room = static_cast<char*>(scratch(6, 2 * kRoom));
    alignas(64) char out[2][2 * Groups::kSumTiles * kTileBytes];
    configure(job.block_rows, Groups::kWords);
    for (int64_t unit = range.first_unit; unit < range.last_unit; ++unit) {
        const Panels panels = panels_of(job, unit);
        const char* weight = static_cast<const char*>(job.weight);
        const char *p0 = weight + panels.first * panel_bytes, *p1 = weight + panels.second * panel_bytes;
        for (int64_t group = 0; group < job.groups; group += kChunkGroups) {
            const int64_t groups = std::min<int64_t>(kChunkGroups, job.groups - group);
            const char* b0 = Groups::tiles(job, p0, group, groups, room, ahead);
            const char* b1 = Groups::tiles(job, p1, group, groups, room + kRoom, ahead);
            const float* s0 = job.scales + (panels.first * job.groups + group) * kPanel;
            const float* s1 = job.scales + (panels.second * job.groups + group) * kPanel;
            for (int block = range.first_block; block < range.last_block; ++block) {
                const char* a = reinterpret_cast<const char*>(x.words) + block * block_bytes;
                float* to = sums + (block - range.first_block) * block_sums;
                for (int64_t i = 0; i < groups; ++i) {
                    if (block == range.first_block) {
                        Groups::fetch(p0 + ahead, group + i);
                        Groups::fetch(p1 + ahead, group + i);
                    }
                    Groups::load_rows(job, a + (group + i) * Groups::kRowBytes * job.block_rows);
                    Groups::template multiply<0>(b0, i, out[i % 2]);
                    Groups::template multiply<1>(b1, i, out[i % 2] + Groups::kSumTiles * kTileBytes);
                    if (i > 0)
                        add_group<Groups>(out[(i - 1) % 2], s0 + (i - 1) * kPanel, s1 + (i - 1) * kPanel,
                                          job.block_rows, to, group + i > 1);
                }
                const int64_t i = groups - 1;
                add_group<Groups>(out[i % 2], s0 + i * kPanel, s1 + i * kPanel, job.block_rows, to, group + i > 0);
            }
        }
        const float* from = sums;
        for (int block = range.first_block; block < range.last_block; ++block, from += block_sums) {
            for (int r = 0; r < rows_of_block(job, block); ++r) {
                const int64_t row = int64_t{block} * job.block_rows + r;
                const float scale = job.kind == WeightKind::kInt8 ? x.scales[row] : 1.0f;
                finish_row<bf16>(job, row, unit, load(from + r * 32) * scale, load(from + r * 32 + 16) * scale);
            }
        }
    }
}
