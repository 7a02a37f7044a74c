// Linear layers whose sums run over all of k: bfloat16, plain, in 12 bits or made of 8 (int8.h), and 8-bit numbers with
// one scale a row. Included inside an instruction set's namespace.
//
// Few rows (up to 32): memory is what they wait for. A task reads its panels one after the other, and multiplies each
// with both row blocks, if there are two, whose sums stay in tiles.
//
// Many rows: a task multiplies two row blocks by two panels at once, four products for four loads, chunk by chunk along
// k. A chunk of 12-bit weights is expanded once for all its row blocks.
//     x's rows fit into the second cache: unit by unit, in each chunk by chunk.
//     They do not: chunk by chunk, in each unit by unit. A's chunk stays in the second cache, and so does C, whose sums
//     go on in the next chunk where they stood.
//
// Either way a sum is made of the same products in the same order, 32 elements of k by themselves first, whatever its
// row is multiplied beside: batches change no bit.
//
// Tried on Emerald Rapids, a noisy machine. Operands from the first cache are multiplied at 2.0 to 2.3 TFLOP/s a core,
// from the second at 1.6; smaller chunks, whose B stays in the first cache, gain nothing: C then travels more often.
// Few rows by four panels at once read memory at about 0.7 of its rate, one panel after the other at 0.9 and more.
// For one row, expanding alone keeps up with memory (0.97 to 1.01 of plain reading's rate). Loading its tiles and their
// products each take some 10 % when a neighbour computes on the same core: 0.67 to 0.75 is left then. Neither two
// accumulators, nor multiplying a group only after the next one is expanded, nor fewer shuffles in expanding (VBMI's
// look-up and a shift across two vectors, 3.5 instructions for 4.5: 1 %) change that.

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
// in C; a panel's tiles stand one behind the other in B. `meanwhile` is called once for each tile along k, before C is
// stored: tiles leave the vectors' units idle, which are as much of the processor.
template <class Products, int Panels, class F>
INLINE void multiply_tiles(const TilesOfA& a, int blocks, const char* const* b, int64_t tiles, const TilesOfC& c,
                           bool add, F&& meanwhile) {
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

    // C is in tiles 0 to 3, A in 4 and 5, B in 6 and 7.
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
        meanwhile();
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

// Panels of 12 bits a number, expanded into `room` before they are multiplied.
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
            expand_group(table, quad, job.apart, std::min<int64_t>(kGroupWords, words - done),
                         reinterpret_cast<uint32_t*>(room + done * kPanel * 4),
                         next ? next + done / 4 * kQuadBytes : nullptr);
        }
        zero_past(room, words * kPanel * 4, ceil_div(words, kTileWords) * kTileBytes);
        return room;
    }
};

// Rows of C, which are done, to where they belong.
INLINE void finish_bfloat16(const Linear& job, int64_t first_row, int rows, int64_t unit, const float* sums) {
    // The usual cases by themselves, with nothing to decide for each row.
    const int64_t ldo = job.ldo, gated = job.n / 2 - unit * kPanel, plain = job.n - 2 * unit * kPanel;
    if (job.output == Output::kSiluMul && !job.bias && gated >= kPanel) {
        for (int r = 0; r < rows; ++r, sums += 32)
            store_as(element<bf16>(job.out, ldo, job.out_tiles, first_row + r, unit * kPanel),
                     silu(load(sums)) * load(sums + 16));
    } else if (job.output == Output::kStore && !job.bias && plain >= 2 * kPanel) {
        bf16* to = static_cast<bf16*>(job.out) + first_row * ldo + 2 * unit * kPanel;
        for (int r = 0; r < rows; ++r, to += ldo, sums += 32) store_pair(to, load(sums), load(sums + 16));
    } else if (job.output == Output::kAddFloat && !job.bias && plain >= 2 * kPanel) {
        float* to = static_cast<float*>(job.out) + first_row * ldo + 2 * unit * kPanel;
        for (int r = 0; r < rows; ++r, to += ldo, sums += 32) {
            store(to, load(to) + load(sums));
            store(to + 16, load(to + 16) + load(sums + 16));
        }
    } else {
        for (int r = 0; r < rows; ++r, sums += 32)
            finish_row<bf16>(job, first_row + r, unit, load(sums), load(sums + 16));
    }
}

// As linear_task_of_numbers: x's offset of 128 added 128 times the sum of a column's weights.
INLINE void finish_int8(const Linear& job, const float* scales, int64_t first_row, int rows, int64_t unit,
                        const int32_t* sums) {
    const Panels panels = panels_of(job, unit);
    const vf o0 = load(job.sums + panels.first * kPanel) * 128.0f,
             o1 = load(job.sums + panels.second * kPanel) * 128.0f;
    const vf s0 = load_as_float(scales_of(job, panels.first, 0)), s1 = load_as_float(scales_of(job, panels.second, 0));
    for (int r = 0; r < rows; ++r) {
        const vi* both = reinterpret_cast<const vi*>(sums + r * 32);
        const float scale = scales[first_row + r];
        const vf sum0 = fused(to_floats(both[0]), s0, vf{}), sum1 = fused(to_floats(both[1]), s1, vf{});
        finish_row<bf16>(job, first_row + r, unit, (sum0 - o0) * scale, (sum1 - o1) * scale);
    }
}

// Rows of C that are done, and still to be finished: some of them while the next ones are multiplied.
struct Unfinished {
    const char* c = nullptr;
    int64_t row = 0, unit = 0;
    int left = 0;
    int step = 0;  // rows that one call of some() finishes

    INLINE void some(const Linear& job, const float* scales) { finish(job, scales, std::min(left, step)); }

    INLINE void finish(const Linear& job, const float* scales, int count) {
        if (count == 0) return;
        if (job.kind == WeightKind::kW8A8) {
            finish_int8(job, scales, row, count, unit, reinterpret_cast<const int32_t*>(c));
        } else {
            finish_bfloat16(job, row, count, unit, reinterpret_cast<const float*>(c));
        }
        c += count * 128;
        row += count;
        left -= count;
    }
};

// Row blocks whose sums all stay in tiles.
constexpr int kMostFewBlocks = 2;
INLINE bool few_rows(const Linear& job) { return job.row_blocks <= kMostFewBlocks; }

// The row blocks and units of a task.
struct TileRange {
    int first_block, last_block;
    int64_t first_unit, last_unit;
};

INLINE TileRange tile_range(const Linear& job, int task) {
    const int64_t column = task / job.m_tiles, row = task % job.m_tiles, first = column * job.units_per_task;
    const int64_t pairs = ceil_div(job.row_blocks, 2);
    return {2 * block_start(pairs, job.m_tiles, row),
            std::min(job.row_blocks, 2 * block_start(pairs, job.m_tiles, row + 1)), first,
            std::min<int64_t>(job.n_units, first + job.units_per_task)};
}

// What a task does, of which the weights' form is all that varies. A row of C has 128 bytes: the 32 sums of a unit's
// two panels.
template <class Source, class Products>
struct TileTask : TileRange {
    const Linear& job;
    const PackedRows& x;
    char *sums, *room;
    int64_t block_bytes, unit_bytes;  // of C
    Unfinished unfinished;
    bool by_units;  // the outer loop goes over units, the inner one over chunks

    TileTask(const Linear& job, const PackedRows& x, int task) : TileRange(tile_range(job, task)), job(job), x(x) {
        block_bytes = int64_t{job.block_rows} * 128;
        unit_bytes = (last_block - first_block) * block_bytes;
        by_units = (last_block - first_block) * job.block_rows * packed_row_bytes(job) <= kCachedBytes;
        sums = static_cast<char*>(scratch(Scratch::kLinearSums, (by_units ? 1 : job.units_per_task) * unit_bytes));
        const int64_t words = few_rows(job) ? 3 * kGroupWords : 2 * job.word_block;
        room =
            static_cast<char*>(scratch(Scratch::kLinearWeights, ceil_div(words, kTileWords) * kTileBytes + kTileBytes));
    }

    void run() {
        configure(job.block_rows, kTileWords);
        if (few_rows(job)) {
            for (int64_t unit = first_unit; unit < last_unit; ++unit)
                last_block == 2 ? stream_unit<2>(unit) : stream_unit<1>(unit);
        } else if (by_units) {
            for (int64_t unit = first_unit; unit < last_unit; ++unit)
                for (int64_t k = 0; k < job.words; k += job.word_block) multiply_chunk(unit, k, sums);
        } else {
            for (int64_t k = 0; k < job.words; k += job.word_block)
                for (int64_t unit = first_unit; unit < last_unit; ++unit)
                    multiply_chunk(unit, k, sums + (unit - first_unit) * unit_bytes);
        }
        unfinished.finish(job, x.scales, unfinished.left);
    }

    // Few rows wait for memory, so the weights are read as memory likes it best: from the first byte to the last, panel
    // by panel, and fetched from 4 KB ahead on. All row blocks' sums stay in tiles.
    template <int Blocks>
    void stream_unit(int64_t unit) {
        const char *panels[2], *following[2];
        panels_at(unit, panels);
        panels_at(std::min<int64_t>(unit + 1, job.n_units - 1), following);
        const int64_t groups = ceil_div(job.words, kGroupWords);
        unfinished.step = static_cast<int>(ceil_div(unfinished.left, 2 * groups));
        stream_panel<Blocks>(panels[0], panels[1]);
        unfinished.finish(job, x.scales, unfinished.left);
        store_sums<Blocks>(0);
        stream_panel<Blocks>(panels[1], following[0]);
        store_sums<Blocks>(64);
        unfinished = {sums, 0, unit, job.m, 0};
    }

    template <int Blocks>
    INLINE void store_sums(int64_t offset) {
        tile_store<0>(sums + offset, 128);
        if constexpr (Blocks > 1) tile_store<1>(sums + offset + block_bytes, 128);
    }

    template <int Blocks>
    INLINE void stream_panel(const char* panel, const char* next) {
        constexpr int64_t kAheadBytes = 4096, kRoomTiles = kGroupWords / kTileWords;
        const int64_t step = int64_t{job.block_rows} * kTileRowBytes,
                      row_block = packed_row_bytes(job) * job.block_rows;
        const char* a = reinterpret_cast<const char*>(x.words);
        tile_zero<0>();
        if constexpr (Blocks > 1) tile_zero<1>();
        for (int64_t k = 0; k < job.words; k += kGroupWords) {
            const int64_t words = std::min<int64_t>(kGroupWords, job.words - k);
            const int64_t ahead = Source::offset(job, k) + kAheadBytes, past = ahead - Source::panel_bytes(job);
            const char* fetched = past < 0 ? panel + ahead : next + past;
            // Of the room there is as much as three groups need: what one has stored must not wait for the next.
            const char* b =
                Source::tiles(job, panel, k, words, room + k / kGroupWords % 3 * kRoomTiles * kTileBytes, fetched);
            unfinished.some(job, x.scales);
            for (int64_t t = 0; t < ceil_div(words, kTileWords); ++t, a += step) {
                if constexpr (!Source::kExpands)
                    for (int line = 0; line < kTileBytes; line += 64)
                        __builtin_prefetch(fetched + t * kTileBytes + line, 0, 2);
                tile_load<6>(b + t * kTileBytes, kTileRowBytes);
                add_block<0>(a);
                if constexpr (Blocks > 1) add_block<1>(a + row_block);
            }
        }
    }

    template <int Block>
    INLINE void add_block(const char* a) {
        tile_load<4 + Block % 2>(a, kTileRowBytes);
        Products::template add<Block, 4 + Block % 2, 6>();
    }

    // A unit's chunk of words from k on, with all row blocks of the task.
    void multiply_chunk(int64_t unit, int64_t k, char* unit_sums) {
        const int64_t words = std::min<int64_t>(job.word_block, job.words - k), tiles = ceil_div(words, kTileWords);
        const int64_t room_each = ceil_div(job.word_block, kTileWords) * kTileBytes;
        const char *from[2], *b[2];
        panels_at(unit, from);
        for (int p = 0; p < 2; ++p) b[p] = Source::tiles(job, from[p], k, words, room + p * room_each, nullptr);

        // Spread over all the calls of `meanwhile`: one for each tile along k of each pair of row blocks.
        Ahead ahead = next_chunk(unit, k);
        ahead.step = ceil_div(ceil_div(ahead.bytes, 64), ceil_div(last_block - first_block, 2) * tiles) * 64;

        const int64_t row_block = packed_row_bytes(job) * job.block_rows,
                      step = int64_t{job.block_rows} * kTileRowBytes;
        TilesOfA a{reinterpret_cast<const char*>(x.words) + first_block * row_block + k / kTileWords * step, step,
                   kTileRowBytes, row_block};
        TilesOfC c{unit_sums, 128, block_bytes, 0};
        const auto meanwhile = [&] {
            ahead.fetch<2>();
            unfinished.some(job, x.scales);
        };
        for (int block = first_block; block < last_block; block += 2, a.first += 2 * a.block, c.first += 2 * c.block) {
            const int both = block + 1 < last_block ? 2 : 1;
            unfinished.step = static_cast<int>(ceil_div(unfinished.left, tiles));
            multiply_tiles<Products, 2>(a, both, b, tiles, c, k > 0, meanwhile);
            const int64_t row = int64_t{block} * job.block_rows;
            const int rows = static_cast<int>(std::min<int64_t>(both * job.block_rows, job.m - row));
            if (k + words == job.words && rows > 0) unfinished = {c.first, row, unit, rows, 0};
        }
    }

    void panels_at(int64_t unit, const char** at) const {
        const Panels both = panels_of(job, unit);
        at[0] = static_cast<const char*>(job.weight) + both.first * Source::panel_bytes(job);
        at[1] = static_cast<const char*>(job.weight) + both.second * Source::panel_bytes(job);
    }

    // The chunk that comes after this one; after a task's last, the first of what stands behind its last unit, which
    // likely is this thread's next task. What is past the weight's end is fetched in vain.
    Ahead next_chunk(int64_t unit, int64_t k) const {
        const int64_t after = k + job.word_block < job.words ? k + job.word_block : 0;
        const bool turns = by_units ? after == 0 : unit + 1 == last_unit;
        const int64_t next_k = by_units || turns ? after : k;
        const int64_t next_unit = by_units ? unit + turns : turns && after ? first_unit : unit + 1;
        Ahead ahead;
        panels_at(next_unit, ahead.panels);
        const int64_t start = Source::offset(job, next_k);
        const int64_t end = next_k + job.word_block < job.words ? Source::offset(job, next_k + job.word_block)
                                                                : Source::panel_bytes(job);
        for (int p = 0; p < 2; ++p) ahead.panels[p] += start;
        ahead.bytes = end - start;
        return ahead;
    }
};
