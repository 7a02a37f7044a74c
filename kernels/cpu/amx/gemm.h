// Linear layers whose sums run over all of k: bfloat16, plain or in 12 bits, and 8-bit numbers with one scale a row.
// Included inside an instruction set's namespace.
//
// A task multiplies some row blocks of x with some units, which are two panels each, chunk by chunk along k. A unit's
// chunk of B stays in the first cache while all row blocks pass, and 12-bit weights are expanded once for all of them.
//     Few rows: unit by unit, in each chunk by chunk. All of A stays in the second cache.
//     Many rows: chunk by chunk, in each unit by unit. A's chunk stays in the second cache, and so does C, whose sums
//     go on in the next chunk where they stood.
// Two row blocks by two panels are multiplied at once: four products for four loads, as the tiles' registers allow. An
// only row block takes the four panels of two units instead. Either way a sum is made of the same products in the same
// order, 32 elements of k by themselves first, whatever its row is multiplied beside: batches change no bit.
//
// Tried, and slower on Emerald Rapids: one row block by two panels (products then wait for each other, 52 cycles), and
// x where it stands instead of packed.

// What is fetched into the second cache while a chunk is multiplied: the chunk that comes next.
struct Ahead {
    const char* panels[4];
    int64_t bytes = 0, done = 0;  // of each panel
    int64_t step = 0;             // bytes of each panel that one call fetches

    template <int Panels>
    INLINE void fetch() {
        for (const int64_t until = std::min(bytes, done + step); done < until; done += 64)
#pragma GCC unroll 4
            for (int p = 0; p < Panels; ++p) __builtin_prefetch(panels[p] + done, 0, 2);
    }
};

constexpr int64_t kCachedBytes = 1 << 20;  // of x's rows in a task, that they stay in the second cache

struct Bfloat16Products {
    template <int C, int A, int B>
    static INLINE void add() {
        tile_dot_bf16<C, A, B>();
    }
};
struct Int8Products {
    template <int C, int A, int B>
    static INLINE void add() {
        tile_dot_us8<C, A, B>();
    }
};

// A's tiles of a row block, in bytes: from one to the next along k, from row to row, and to the next row block.
struct TilesOfA {
    const char* first;
    int64_t step, row, block;
};

// C, in bytes: from row to row, to the next row block, and to the next two panels.
struct TilesOfC {
    char* first;
    int64_t row, block, pair;
};

// C = or += one row block by two panels or four, or two row blocks by two panels. Panels of a pair stand side by side
// in C; a panel's tiles stand one behind the other in B.
template <class Products, int Panels>
INLINE void multiply_tiles(const TilesOfA& a, int blocks, const char* const* b, int64_t tiles, const TilesOfC& c,
                           bool add, Ahead& ahead) {
    char *c0 = c.first, *c1 = c0 + 64, *c2 = c0 + (Panels == 4 ? c.pair : c.block), *c3 = c2 + 64;
    const char *a0 = a.first, *a1 = a.first + a.block;
    const bool four = Panels == 4 || blocks == 2;
    if (add) {
        tile_load<0>(c0, c.row);
        tile_load<1>(c1, c.row);
        if (four) tile_load<2>(c2, c.row);
        if (four) tile_load<3>(c3, c.row);
    } else {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t at = t * kTileBytes;
        tile_load<4>(a0 + t * a.step, a.row);
        tile_load<6>(b[0] + at, kTileRowBytes);
        Products::template add<0, 4, 6>();
        tile_load<7>(b[1] + at, kTileRowBytes);
        Products::template add<1, 4, 7>();
        if constexpr (Panels == 4) {
            tile_load<6>(b[2] + at, kTileRowBytes);
            Products::template add<2, 4, 6>();
            tile_load<7>(b[3] + at, kTileRowBytes);
            Products::template add<3, 4, 7>();
        } else if (four) {
            tile_load<5>(a1 + t * a.step, a.row);
            Products::template add<2, 5, 6>();
            Products::template add<3, 5, 7>();
        }
        ahead.fetch<Panels>();
    }
    tile_store<0>(c0, c.row);
    tile_store<1>(c1, c.row);
    if (four) tile_store<2>(c2, c.row);
    if (four) tile_store<3>(c3, c.row);
}

// Panels whose words are multiplied as they stand. Behind a panel's last word, and so in its last tile, stands
// another's.
struct StoredPanels {
    static constexpr bool kExpands = false;

    // Where in a panel the words from k on stand.
    static INLINE int64_t offset(const Linear&, int64_t k) { return k * kPanel * 4; }
    static INLINE int64_t panel_bytes(const Linear& job) { return int64_t{job.words} * kPanel * 4; }

    // The tiles of `words` words from k on: there, or, if the last is not full, in `room`.
    static INLINE const char* tiles(const Linear& job, const char* panel, int64_t k, int64_t words, char* room,
                                    const char*) {
        const char* from = panel + offset(job, k);
        if (words % kTileWords == 0) return from;
        std::memcpy(room, from, words * kPanel * 4);
        zero_past(room, words * kPanel * 4, ceil_div(words, kTileWords) * kTileBytes);
        return room;
    }
};

struct CompressedPanels {
    static constexpr bool kExpands = true;

    static INLINE int64_t offset(const Linear& job, int64_t k) {
        return k == 0 ? 0 : tables_bytes(job.words) + k / 4 * kQuadBytes;  // the tables come with the first words
    }
    static INLINE int64_t panel_bytes(const Linear& job) { return compressed_bytes(job.words); }

    // k begins a group. Meanwhile it fetches what stands at `next`.
    static INLINE const char* tiles(const Linear& job, const char* panel, int64_t k, int64_t words, char* room,
                                    const char* next) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(panel);
        for (int64_t done = 0; done < words; done += kGroupWords) {
            const uint8_t* table = bytes + (k + done) / kGroupWords * kTableBytes;
            const uint8_t* quad = bytes + tables_bytes(job.words) + (k + done) / 4 * kQuadBytes;
            if (next) {
                const char* line = next + done / 4 * kQuadBytes;
                for (int i = 0; i < kGroupWords / 4 * kQuadBytes; i += 64) __builtin_prefetch(line + i, 0, 2);
            }
            expand_group(table, quad, job.apart, std::min<int64_t>(kGroupWords, words - done),
                         reinterpret_cast<uint32_t*>(room + done * kPanel * 4));
        }
        zero_past(room, words * kPanel * 4, ceil_div(words, kTileWords) * kTileBytes);
        return room;
    }
};

// The rows of C of a row block, which are done, to where they belong.
INLINE void finish_block(const Linear& job, const PackedRows& x, int block, int64_t unit, const char* c) {
    const int64_t first_row = int64_t{block} * job.block_rows;
    if (job.kind != WeightKind::kW8A8) {
        const float* sums = reinterpret_cast<const float*>(c);
        for (int r = 0; r < rows_of_block(job, block); ++r)
            finish_row<bf16>(job, first_row + r, unit, load(sums + r * 32), load(sums + r * 32 + 16));
        return;
    }
    // As linear_task_of_numbers: x's offset of 128 added 128 times the sum of a column's weights.
    const Panels panels = panels_of(job, unit);
    const vf o0 = load(job.sums + panels.first * kPanel) * 128.0f,
             o1 = load(job.sums + panels.second * kPanel) * 128.0f;
    const vf s0 = load(scales_of(job, panels.first, 0)), s1 = load(scales_of(job, panels.second, 0));
    const auto* sums = reinterpret_cast<const int32_t*>(c);
    for (int r = 0; r < rows_of_block(job, block); ++r) {
        const vi* both = reinterpret_cast<const vi*>(sums + r * 32);
        const float scale = x.scales[first_row + r];
        const vf sum0 = fused(to_floats(both[0]), s0, vf{}), sum1 = fused(to_floats(both[1]), s1, vf{});
        finish_row<bf16>(job, first_row + r, unit, (sum0 - o0) * scale, (sum1 - o1) * scale);
    }
}

// The row blocks and units of a task.
struct TileRange {
    int first_block, last_block;
    int64_t first_unit, last_unit;
};

INLINE TileRange tile_range(const Linear& job, int task) {
    const int64_t column = task / job.m_tiles, row = task % job.m_tiles, first = column * job.units_per_task;
    return {block_start(job.row_blocks, job.m_tiles, row), block_start(job.row_blocks, job.m_tiles, row + 1), first,
            std::min<int64_t>(job.n_units, first + job.units_per_task)};
}

// What a task does, of which the weights' form is all that varies.
template <class Source, class Products>
struct TileTask : TileRange {
    const Linear& job;
    const PackedRows& x;
    char *sums, *room;
    int64_t block_bytes, unit_bytes;  // of C
    bool by_units;                    // the outer loop goes over units, the inner one over chunks

    TileTask(const Linear& job, const PackedRows& x, int task) : TileRange(tile_range(job, task)), job(job), x(x) {
        block_bytes = int64_t{job.block_rows} * 128;
        unit_bytes = (last_block - first_block) * block_bytes;
        by_units = (last_block - first_block) * job.block_rows * packed_row_bytes(job) <= kCachedBytes;
        sums = static_cast<char*>(scratch(0, (by_units ? 2 : job.units_per_task) * unit_bytes));
        room = static_cast<char*>(scratch(6, 4 * (ceil_div(job.word_block, kTileWords) * kTileBytes)));
    }

    void run() {
        configure(job.block_rows, kTileWords);
        if (by_units) {
            int64_t unit = first_unit;
            if (last_block - first_block == 1)
                for (; unit + 2 <= last_unit; unit += 2) multiply_all_chunks<4>(unit);
            for (; unit < last_unit; ++unit) multiply_all_chunks<2>(unit);
            return;
        }
        for (int64_t k = 0; k < job.words; k += job.word_block)
            for (int64_t unit = first_unit; unit < last_unit; ++unit)
                multiply_chunk<2>(unit, k, sums + (unit - first_unit) * unit_bytes);
    }

    template <int Panels>
    void multiply_all_chunks(int64_t unit) {
        for (int64_t k = 0; k < job.words; k += job.word_block) multiply_chunk<Panels>(unit, k, sums);
    }

    // A unit's chunk of words from k on, or two units' chunks, with all row blocks of the task.
    template <int Panels>
    void multiply_chunk(int64_t unit, int64_t k, char* unit_sums) {
        const int64_t words = std::min<int64_t>(job.word_block, job.words - k), tiles = ceil_div(words, kTileWords);
        const int64_t room_each = ceil_div(job.word_block, kTileWords) * kTileBytes;
        const int blocks = last_block - first_block;
        const char *from[4], *b[4];
        panels_at<Panels>(unit, from);
        Ahead ahead = next_chunk<Panels>(unit, k);
        // With few rows there is hardly time to fetch while multiplying, so it is done while expanding.
        const bool early = Source::kExpands && blocks <= 2;
        for (int p = 0; p < Panels; ++p)
            b[p] = Source::tiles(job, from[p], k, words, room + p * room_each, early ? ahead.panels[p] : nullptr);
        const int64_t steps = ceil_div(blocks, 2) * tiles;
        ahead.step = early ? 0 : ceil_div(ceil_div(ahead.bytes, 64), steps) * 64;

        const int64_t row_block = packed_row_bytes(job) * job.block_rows,
                      step = int64_t{job.block_rows} * kTileRowBytes;
        TilesOfA a{reinterpret_cast<const char*>(x.words) + first_block * row_block + k / kTileWords * step, step,
                   kTileRowBytes, row_block};
        TilesOfC c{unit_sums, 128, block_bytes, unit_bytes};
        const bool last = k + words == job.words;
        for (int block = first_block; block < last_block; block += 2, a.first += 2 * a.block, c.first += 2 * c.block) {
            const int both = Panels == 2 && block + 1 < last_block ? 2 : 1;
            multiply_tiles<Products, Panels>(a, both, b, tiles, c, k > 0, ahead);
            if (!last) continue;
            finish_block(job, x, block, unit, c.first);
            if (Panels == 4) finish_block(job, x, block, unit + 1, c.first + c.pair);
            if (both == 2) finish_block(job, x, block + 1, unit, c.first + c.block);
        }
    }

    template <int Panels>
    void panels_at(int64_t unit, const char** at) {
        const auto* weight = static_cast<const char*>(job.weight);
        for (int i = 0; i < Panels / 2; ++i) {
            const phalanx::PHALANX_ISA_NAME::Panels both = panels_of(job, unit + i);
            at[2 * i] = weight + both.first * Source::panel_bytes(job);
            at[2 * i + 1] = weight + both.second * Source::panel_bytes(job);
        }
    }

    // The chunk that comes after this one; after a task's last, the first of what stands behind its last unit, which
    // likely is this thread's next task. What is past the weight's end is fetched in vain.
    template <int Panels>
    Ahead next_chunk(int64_t unit, int64_t k) {
        const int64_t step = Panels / 2, after = k + job.word_block < job.words ? k + job.word_block : 0;
        const bool turns = by_units ? after == 0 : unit + step >= last_unit;
        int64_t next_unit = unit, next_k = k;
        if (by_units) {
            next_k = after;
            if (turns) next_unit += step;
        } else {
            if (turns) next_k = after;
            next_unit = turns && after ? first_unit : unit + step;
        }
        Ahead ahead;
        panels_at<Panels>(next_unit, ahead.panels);
        const int64_t start = Source::offset(job, next_k);
        const int64_t end = next_k + job.word_block < job.words ? Source::offset(job, next_k + job.word_block)
                                                                : Source::panel_bytes(job);
        for (int p = 0; p < Panels; ++p) ahead.panels[p] += start;
        ahead.bytes = end - start;
        return ahead;
    }
};
