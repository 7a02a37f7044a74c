// Attention over a cache of bfloat16 by tiles: the way of attend/task.h, with both of its products made of tiles.
// Included inside an instruction set's namespace.
//
//     scores (rows x keys)  =  queries (A: rows x head_dim)   *  keys (B: head_dim x 16 keys, as a block has them)
//     sums (rows x head_dim) += weights (A: rows x 32 keys)   *  values (B: 32 keys x 16 dimensions)
//
// A block may have only 16 keys, half a tile of values, so values are put together first, once for all rows of a task.
// Rows are the heads of a group below each other, token by token; two blocks of them are multiplied at once.

// A task's memory, and what it does with a tile of keys. Sums begin anew every kSplitKeys keys, and the pieces are
// merged as merge_partials() merges those of several tasks: so a token's bits are the same in a prompt's chunk and in a
// decode.
struct TileAttention {
    using S = Stored<bf16, bf16>;

    const Attention& job;
    const TaskView task;
    int group, dim, rows, before, last_key;
    int blocks, block_rows;    // of rows
    int segments;              // of keys
    int64_t dim_tiles, width;  // tiles along head_dim; floats of a row of sums, a whole number of panel pairs
    int64_t all_rows;
    float scale;
    char *queries, *values, *keys;  // as tiles
    TileScores tile;                // of the step that is computed
    TileSums first_segment;

    TileAttention(const Attention& job, int number) : job(job), task(view(job, number)) {
        group = job.heads / job.kv_heads;
        dim = job.head_dim;
        rows = task.tokens * group;
        before = keys_before(job, task);
        last_key = end_of_keys(job, task);
        blocks = rows <= kTileRows ? 1 : 2 * static_cast<int>(ceil_div(rows, 2 * kTileRows));
        block_rows = static_cast<int>(ceil_div(rows, blocks));
        dim_tiles = ceil_div(dim, 32);
        width = ceil_div(dim, 32) * 32;
        scale = job.scale * 1.44269504f;
        segments = static_cast<int>(ceil_div(last_key - task.first_key, kSplitKeys));
        all_rows = int64_t{blocks} * block_rows;

        // In this order: queries, values, keys; scores, weights, largest scores and shrinking factors of a step; and
        // each segment's sums, largest scores and weights.
        const int64_t some_rows = std::min(2, blocks) * int64_t{block_rows};
        const int64_t sizes[] = {all_rows * dim_tiles * kTileRowBytes,
                                 kTileKeys * width * 2,
                                 kTileKeys * dim_tiles * 64,
                                 some_rows * kTileKeys * 4,
                                 some_rows * kTileKeys * 2,
                                 some_rows * 4,
                                 some_rows * 4,
                                 segments * all_rows * width * 4,
                                 segments * all_rows * 4,
                                 segments * all_rows * 64};

        constexpr int kParts = sizeof(sizes) / sizeof(sizes[0]);
        int64_t all = 0;
        for (int64_t size : sizes) all += ceil_div(size, 64) * 64;
        char *memory = static_cast<char*>(scratch(Scratch::kAttentionTask, all)), *parts[kParts];
        for (int i = 0; i < kParts; ++i) {
            parts[i] = memory;
            memory += ceil_div(sizes[i], 64) * 64;
        }

        queries = parts[0];
        values = parts[1];
        keys = parts[2];
        tile = {reinterpret_cast<float*>(parts[3]), reinterpret_cast<bf16*>(parts[4]),
                reinterpret_cast<float*>(parts[5]), reinterpret_cast<float*>(parts[6])};
        first_segment = {reinterpret_cast<float*>(parts[7]), reinterpret_cast<float*>(parts[8]),
                         reinterpret_cast<float*>(parts[9])};
        std::fill_n(first_segment.most, segments * all_rows, kMinusInfinity);
        // Rows that see nothing of a segment have weights in it only here. Where there is but one, all see some of it.
        if (segments > 1 || task.partial >= 0) std::fill_n(first_segment.weight, segments * all_rows * 16, 0.0f);
    }

    // What the keys from `key` on are summed up in.
    TileSums segment_of(int key) const {
        const int64_t before_it = (key - task.first_key) / kSplitKeys * all_rows;
        return {first_segment.sums + before_it * width, first_segment.most + before_it,
                first_segment.weight + before_it * 16};
    }

    Pieces locate(const TaskView& of, int key) const {
        return Pieces(job, job.block_table + of.row * job.table_stride, of.kv_head, S{}, key, end_of_keys(job, of));
    }

    int64_t query_at(int row) const {
        const int64_t token = job.cu_q[task.row] + task.first_token + row / group;
        return token * job.ldq + (static_cast<int64_t>(task.kv_head) * group + row % group) * dim;
    }

    // Missing rows, and what is past head_dim, are zero.
    void pack_queries() {
        std::memset(queries, 0, int64_t{blocks} * block_rows * dim_tiles * kTileRowBytes);
        for (int row = 0; row < rows; ++row) {
            const char* from = reinterpret_cast<const char*>(static_cast<const bf16*>(job.q) + query_at(row));
            char* to =
                queries + row / block_rows * block_rows * dim_tiles * kTileRowBytes + row % block_rows * kTileRowBytes;
            for (int64_t t = 0; t < dim_tiles; ++t)
                std::memcpy(to + t * block_rows * kTileRowBytes, from + t * kTileRowBytes,
                            std::min<int64_t>(kTileRowBytes, dim * 2 - t * kTileRowBytes));
        }
    }

    // [dim / 16][keys / 32] tiles of the pieces' values, zero from key `count` on: what a cache has there is anything.
    void gather_values(const Pieces& pieces, const Pieces& next, int count) {
        constexpr int64_t kPieceBytes = kTileBytes / 2, kPanelBytes = kTileKeys / 32 * kTileBytes;
        const int64_t panel = static_cast<int64_t>(job.block_size) / S::kPerWord * 16 * S::kWordBytes;
        const int all = static_cast<int>(ceil_div(count, 32)) * 2;
        for (int d = 0; d < dim / 16; ++d) {
            for (int i = 0; i < all; ++i) {
                const char *from = pieces.values[i] + d * panel, *ahead = next.values[i] + d * panel;
                char* to = values + d * kPanelBytes + i * kPieceBytes;
                const int64_t filled = std::min<int64_t>(std::max(0, count - 16 * i) + 1, 16) / 2 * 64;
                for (int64_t line = 0; line < filled; line += 64) {
                    __builtin_prefetch(ahead + line, 0, 2);
                    store(reinterpret_cast<float*>(to + line), load(reinterpret_cast<const float*>(from + line)));
                }
                zero_past(to, filled, kPieceBytes);
            }
        }
    }

    // Sixteen keys as tiles: where they stand, or in `keys` if their last tile is not full.
    const char* key_tiles(const Pieces& pieces, int i) {
        if (dim % 32 == 0) return pieces.keys[i];
        char* to = keys + i * dim_tiles * kTileBytes;
        std::memcpy(to, pieces.keys[i], int64_t{dim} * 32);
        zero_past(to, int64_t{dim} * 32, dim_tiles * kTileBytes);
        return to;
    }

    // The keys from `key` on with the row blocks from `first_block` on.
    TileStep step_of(int key, int count, int first_block) const {
        TileStep step;
        step.first_block = first_block;
        step.both = first_block + 1 < blocks ? 2 : 1;
        step.start = first_block * block_rows;
        step.end = std::min(rows, step.start + step.both * block_rows);
        step.key = key;
        step.count = count;
        step.width = static_cast<int>(ceil_div(count, 32)) * 32;
        step.first = (key - task.first_key) % kSplitKeys == 0;
        step.segment = segment_of(key);
        return step;
    }

    // How many keys from `key` on a row sees.
    int visible_to(int row, int key) const { return before + task.first_token + row / group + 1 - key; }

    template <int Panels>
    void multiply_keys(const TileStep& step, const char* const* b, int piece, const Pieces& next) const {
        const int64_t block_bytes = block_rows * dim_tiles * kTileRowBytes;
        const TilesOfA a{queries + step.first_block * block_bytes, int64_t{block_rows} * kTileRowBytes, kTileRowBytes,
                         block_bytes};
        const TilesOfC c{reinterpret_cast<char*>(tile.scores + piece * 16), kTileKeys * 4, block_rows * kTileKeys * 4,
                         128};

        // The first row blocks fetch the next tile's keys for all.
        Ahead ahead;
        if (step.first_block == 0) {
            ahead.bytes = int64_t{dim} * 32;
            ahead.step = ceil_div(ahead.bytes, dim_tiles * 64) * 64;
            for (int p = 0; p < Panels; ++p) ahead.panels[p] = next.keys[piece + p];
        }
        multiply_tiles<Bfloat16Products, Panels>(a, step.both, b + piece, dim_tiles, c, false,
                                                 [&] { ahead.fetch<Panels>(); });
    }

    void multiply_scores(const TileStep& step, const char* const* b, const Pieces& next) const {
        int piece = 0;
        if (step.both == 1)
            for (; piece + 4 <= step.width / 16; piece += 4) multiply_keys<4>(step, b, piece, next);
        for (; piece < step.width / 16; piece += 2) multiply_keys<2>(step, b, piece, next);
    }

    // Scores to weights, in two passes over the rows: see amx/softmax.h.
    void soften(const TileStep& step) const {
        for (int row = step.start; row < step.end; ++row)
            find_largest(step, tile, row, std::min(visible_to(row, step.key), step.count), scale);
        for (int row = step.start; row < step.end; ++row) make_weights(step, tile, row, scale);
    }

    // Adds the values times the step's weights to its rows' sums.
    void add_values(const TileStep& step) const {
        constexpr int64_t kPanelBytes = kTileKeys / 32 * kTileBytes;
        float* sums = step.segment.sums + step.start * width;
        for (int i = 0; !step.first && i < step.end - step.start; ++i) {
            if (tile.shrink[i] == 1.0f) continue;
            for (int64_t d = i * width; d < (i + 1) * width; d += 16) store(sums + d, load(sums + d) * tile.shrink[i]);
        }

        const TilesOfA a{reinterpret_cast<const char*>(tile.weights), 64, kTileKeys * 2, block_rows * kTileKeys * 2};
        const auto nothing = [] {};
        const int panels = dim / 16;

        // Two panels at once, or four with one row block while there are so many. An odd last one is multiplied twice;
        // the second product goes to the padding of `width`.
        for (int d = 0; d < panels;) {
            const char* b[4];
            for (int p = 0; p < 4; ++p) b[p] = values + std::min(d + p, panels - 1) * kPanelBytes;
            const TilesOfC c{reinterpret_cast<char*>(sums + d * 16), width * 4, block_rows * width * 4, 128};
            const bool four = step.both == 1 && d + 4 <= panels;
            four ? multiply_tiles<Bfloat16Products, 4>(a, step.both, b, step.width / 32, c, !step.first, nothing)
                 : multiply_tiles<Bfloat16Products, 2>(a, step.both, b, step.width / 32, c, !step.first, nothing);
            d += four ? 4 : 2;
        }
    }

    // Whether a value that one of the rows does not see is infinite or NaN, as AttentionTask::hides_not_finite().
    bool hides_not_finite(int key, int count) const {
        vu found{};
        for (int word = std::max(0, visible_to(0, key)) / 2; word < ceil_div(count, 2); ++word)
            for (int d = 0; d < dim / 16; ++d) found |= not_finite<bf16>(load(values_at(d, word)));
        return any_of(reinterpret_cast<vi>(found));
    }

    // The values of two keys, 16 dimensions of them.
    uint32_t* values_at(int d, int word) const {
        return reinterpret_cast<uint32_t*>(values + d * (kTileKeys / 32 * kTileBytes)) + word * 16;
    }

    // Whether all values of the tile's key `k` are finite.
    bool is_finite(int k) const {
        uint32_t found = 0;
        for (int i = 0; i < dim; ++i) {
            const uint32_t value = values_at(i / 16, k / 2)[i % 16] >> k % 2 * 16;
            found |= static_cast<uint32_t>((value & 0x7f80u) == 0x7f80u);
        }
        return found == 0;
    }

    void clear(int k) {
        for (int i = 0; i < dim; ++i) values_at(i / 16, k / 2)[i % 16] &= k % 2 == 0 ? 0xffff0000u : 0x0000ffffu;
    }

    // As add_values(), with the same bits for what is finite, but without values that a row does not see and that are
    // not finite: from the last key to the first, the rows that see such a key are finished, and then it is cleared.
    void add_visible_values(const TileStep& step) {
        const int64_t some_rows = int64_t{step.both} * block_rows;
        float* sums = step.segment.sums + step.start * width;
        float* before_step = static_cast<float*>(scratch(Scratch::kSumsBefore, 2 * some_rows * width * 4));
        float* after_step = before_step + some_rows * width;
        if (!step.first) std::memcpy(before_step, sums, some_rows * width * 4);

        TileStep all = step;
        all.segment.sums = after_step - step.start * width;
        for (int k = static_cast<int>(ceil_div(step.count, 2) * 2), end = step.end; end > step.start;) {
            const bool seen_by_all = --k < std::max(0, visible_to(step.start, step.key));
            if (!seen_by_all && is_finite(k)) continue;
            const int first_to_see = (step.key + k - before - task.first_token) * group;
            const int start = seen_by_all ? step.start : std::min(std::max(first_to_see, step.start), end);
            if (start < end) {
                if (!step.first) std::memcpy(after_step, before_step, some_rows * width * 4);
                add_values(all);
                std::memcpy(sums + (start - step.start) * width, after_step + (start - step.start) * width,
                            (end - start) * width * 4);
                end = start;
            }
            if (!seen_by_all) clear(k);
        }
    }

    // Each segment as merge_row() takes it, its largest score in powers of e again (times ln 2).
    void store_partial(int segment, float* to) const {
        const TileSums from = segment_of(task.first_key + segment * kSplitKeys);
        for (int r = 0; r < rows; ++r) {
            if (from.most[r] > kMinusInfinity)
                std::memcpy(to + static_cast<int64_t>(r) * dim, from.sums + r * width, sizeof(float) * dim);
            to[static_cast<int64_t>(rows) * dim + r] = from.most[r] * 0.693147181f;
            to[static_cast<int64_t>(rows) * (dim + 1) + r] = sum_of(load(from.weight + r * 16));
        }
    }

    // The task's result: a partial one for merge_partials(), its merged segments, or its only segment's weighted means.
    void finish() const {
        const int64_t stride = static_cast<int64_t>(rows) * (dim + 2);
        float* partials = nullptr;
        if (task.partial >= 0)
            return store_partial(0, job.partials + static_cast<int64_t>(task.partial) * job.query_rows * (dim + 2));
        if (segments > 1) {
            partials = static_cast<float*>(scratch(Scratch::kSegmentPartials, segments * stride * 4));
            for (int s = 0; s < segments; ++s) store_partial(s, partials + s * stride);
        }

        for (int r = 0; r < rows; ++r) {
            const int64_t token = job.cu_q[task.row] + task.first_token + r / group;
            const int64_t head = task.kv_head * group + r % group;
            if (segments > 1) {
                merge_row<bf16>(job, partials, stride, segments, rows, r, token, head);
                continue;
            }
            const float share = 1.0f / sum_of(load(first_segment.weight + r * 16));
            for (int i = 0; i < dim; i += 16)
                store_as(out_at<bf16>(job, token, head, i), load(first_segment.sums + r * width + i) * share);
        }
    }
};

// One task: tile after tile of its keys, and each tile with all of its row blocks, two at a time.
inline void tile_attention_task(const Attention& job, int number) {
    TileAttention work(job, number);
    configure(work.block_rows, kTileWords);
    work.pack_queries();
    Pieces pieces = work.locate(work.task, work.task.first_key);
    for (int key = work.task.first_key; key < work.last_key; key += kTileKeys) {
        const int count = std::min(kTileKeys, work.last_key - key);
        // What is fetched meanwhile: the next tile, or the first of the next task, which likely is this thread's too.
        const bool more = key + kTileKeys < work.last_key;
        const TaskView following = more ? work.task : view(job, std::min(number + 1, job.count - 1));
        const Pieces next = work.locate(following, more ? key + kTileKeys : following.first_key);
        work.gather_values(pieces, next, count);
        const bool careful = work.hides_not_finite(key, count);
        const char* keys[kTileKeys / 16];
        for (int i = 0; i < kTileKeys / 16; ++i) keys[i] = work.key_tiles(pieces, i);
        for (int block = 0; block < work.blocks; block += 2) {
            const TileStep step = work.step_of(key, count, block);
            if (step.end <= step.start || work.visible_to(step.end - 1, key) <= 0) continue;  // nothing is visible
            work.multiply_scores(step, keys, next);
            work.soften(step);
            if (careful) {
                work.add_visible_values(step);
                work.gather_values(pieces, next, count);  // some were cleared, which later rows see
            } else {
                work.add_values(step);
            }
        }
        pieces = next;
    }
    work.finish();
}
