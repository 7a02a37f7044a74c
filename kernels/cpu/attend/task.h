// Attention over the paged cache, with a running softmax (FlashAttention, arXiv:2205.14135; split over the keys as in
// Flash-Decoding). The heads of a group stand below each other as rows, so each key is read once a group. Included
// inside an instruction set's namespace.

// Rows that the micro-kernel takes at once; the first block fetches the next tile's keys for all.
struct RowBlock {
    int start, rows;
    bool fetches;
};

// A tile of keys, and the one that is fetched meanwhile.
struct KeyTile {
    int key, count, width;  // the first key, keys, and these rounded up to whole pieces
    bool first;             // of the task
    const Pieces &pieces, &next;
};

// A task's memory, and what it does with a tile of keys. For each of its row blocks: scores, softmax, sums of values. A
// row block's scores and weights stay in the first cache; the tile's keys and values in the second.
template <class T, class Cache>
struct AttentionTask {
    using S = Stored<T, Cache>;
    using Weight = typename S::Weight;
    static constexpr bool kNumbers = sizeof(Cache) == 1;

    const Attention& job;
    const TaskView task;
    int group, dim, rows, words;  // words of a head
    int before, last_key, blocks;
    uint32_t* q;      // row blocks [words][rows of the block], in as many steps as a word has
    float* scores;    // (kMaxRows, kKeyTile), of the row block that is computed
    Weight* weights;  // the same
    Running running;
    float* q_scales;     // (rows,) of queries that became numbers
    int16_t* q_numbers;  // (kMaxRows, head_dim), those of a row block
    // Of the tile that is computed, of values that are numbers; of the row block, what its sums so far are multiplied
    // by, and the scales of weights that became numbers.
    alignas(64) float value_scales[kKeyTile];
    float shrink[kMaxRows], weight_scales[kMaxRows];

    INLINE AttentionTask(const Attention& job, int number) : job(job), task(view(job, number)) {
        group = job.heads / job.kv_heads;
        dim = job.head_dim;
        rows = task.tokens * group;
        words = dim / S::kPerWord;
        before = keys_before(job, task);
        last_key = end_of_keys(job, task);
        blocks = (rows + kMaxRows - 1) / kMaxRows;

        // All of it in one piece of scratch memory, cut into parts that begin at cache lines: up to 64 bytes more for
        // each.
        const int64_t bytes = rows * 4 * (words * S::kWordSteps + dim + 3) +
                              kMaxRows * ((4 + sizeof(Weight)) * kKeyTile + 2 * dim) + 64 * 10;
        char* memory = static_cast<char*>(scratch(Scratch::kAttentionTask, bytes));
        auto take = [&memory](int64_t size) {
            char* start = memory;
            memory += (size + 63) / 64 * 64;
            return start;
        };
        q = reinterpret_cast<uint32_t*>(take(static_cast<int64_t>(rows) * words * S::kWordSteps * 4));
        scores = reinterpret_cast<float*>(take(kMaxRows * kKeyTile * 4));
        weights = reinterpret_cast<Weight*>(take(kMaxRows * kKeyTile * sizeof(Weight)));
        running.sums = reinterpret_cast<float*>(take(static_cast<int64_t>(rows) * dim * 4));
        running.most = reinterpret_cast<float*>(take(rows * 4));
        running.weight = reinterpret_cast<float*>(take(rows * 4));
        q_scales = reinterpret_cast<float*>(take(rows * 4));
        q_numbers = reinterpret_cast<int16_t*>(take(kNumbers ? 2 * kMaxRows * dim : 0));
    }

    INLINE RowBlock row_block(int b) const {
        const int start = block_start(rows, blocks, b);
        return {start, block_start(rows, blocks, b + 1) - start, b == 0};
    }

    INLINE Pieces locate(const TaskView& of, int key) const {
        return Pieces(job, job.block_table + of.row * job.table_stride, of.kv_head, S{}, key, end_of_keys(job, of));
    }

    INLINE const T* query_at(int row) const {
        const int64_t token = job.cu_q[task.row] + task.first_token + row / group;
        return static_cast<const T*>(job.q) + token * job.ldq +
               (static_cast<int64_t>(task.kv_head) * group + row % group) * dim;
    }

    // How many keys from `key` on a row sees: queries sit at the end of their row's keys, and a query sees those up to
    // its own position.
    INLINE int visible_to(int row, int key) const { return before + task.first_token + row / group + 1 - key; }

    // Bytes from one panel of a block's values, 16 of the dimensions, to the next.
    INLINE int64_t value_panel() const {
        return static_cast<int64_t>(job.block_size) / S::kPerWord * 16 * S::kWordBytes;
    }

    // Where a row block's queries stand.
    INLINE uint32_t* packed_queries(const RowBlock& block) const {
        return q + static_cast<int64_t>(block.start) * words * S::kWordSteps;
    }

    // A row block's queries, interleaved as the micro-kernel reads them; over an int8 cache they become 16-bit numbers.
    INLINE void pack_queries(const RowBlock& block) {
        const uint32_t* from[kMaxRows];
        for (int r = 0; r < block.rows; ++r) {
            const T* query = query_at(block.start + r);
            from[r] = reinterpret_cast<const uint32_t*>(query);
            if constexpr (kNumbers) {
                int16_t* numbers = q_numbers + static_cast<int64_t>(r) * dim;
                q_scales[block.start + r] = to_shorts(query, dim, numbers);
                from[r] = reinterpret_cast<const uint32_t*>(numbers);
            }
        }
        uint32_t* to = packed_queries(block);
        kNumbers ? interleave(from, block.rows, words, to) : interleave_factors<T>(from, block.rows, words, to);
    }

    // Of keys past the last one the values count for nothing, whatever their scales are.
    INLINE void load_value_scales(const KeyTile& tile) {
        for (int i = 0; i < tile.width; ++i)
            value_scales[i] = i < tile.count ? tile.pieces.value_scales[i / 16][i % 16] : 0.0f;
    }

    // scores (rows of the block x keys) = queries * keys, by two pieces of 16 keys.
    INLINE void multiply_keys(const KeyTile& tile, const RowBlock& block) const {
        const uint32_t* x = packed_queries(block);
        const Pieces& pieces = tile.pieces;
        for (int k = 0; k < tile.width; k += 32) {
            const int i = k / 16, second = k + 16 < tile.width ? i + 1 : i;
            const char* ahead[2] = {tile.next.keys[i], tile.next.keys[second]};
            if constexpr (kNumbers) {
                with_rows(block.rows, [&](auto R) {
                    multiply_group<Shorts, R>(x, pieces.keys[i], pieces.keys[second], words, pieces.key_scales[i],
                                              pieces.key_scales[second], scores + k, kKeyTile, false,
                                              block.fetches ? ahead[0] : nullptr, ahead[1]);
                });
            } else {
                kMultiply<T>[block.rows - 1](x, reinterpret_cast<const uint32_t*>(pieces.keys[i]),
                                             reinterpret_cast<const uint32_t*>(pieces.keys[second]), words, scores + k,
                                             kKeyTile, false, nullptr, ahead, block.fetches ? 2 : 0);
            }
        }
    }

    // Scores to weights, and what the sums so far are to be multiplied by.
    INLINE void soften_scores(const KeyTile& tile, const RowBlock& block) {
        for (int r = 0; r < block.rows; ++r) {
            const int row = block.start + r, visible = visible_to(row, tile.key);
            float* row_scores = scores + r * kKeyTile;
            Weight* row_weights = weights + r * kKeyTile;
            if constexpr (kNumbers) {  // multiplied with their values' scales, and as numbers of 16 bits
                shrink[r] = soften(row_scores, visible, tile.width, job.scale * q_scales[row], running, row, tile.first,
                                   [&](int i, vf w) { store(row_scores + i, w * load(value_scales + i)); });
                hide(row_scores, visible, tile.width, 0.0f);  // a scale may be infinite, and 0 times it is NaN
                weight_scales[r] = to_shorts(row_scores, tile.width, row_weights);
            } else {
                shrink[r] = soften(row_scores, visible, tile.width, job.scale, running, row, tile.first,
                                   [&](int i, vf w) { store_as(row_weights + i, w); });
            }
        }
    }

    // sums (rows of the block x head_dim) = or += weights * values, by 32 dimensions.
    INLINE void accumulate(const KeyTile& tile, const RowBlock& block) {
        const int value_words = (tile.count + S::kPerWord - 1) / S::kPerWord;
        const int64_t panel = value_panel();
        const uint32_t* p = reinterpret_cast<const uint32_t*>(weights);
        for (int d = 0; d < dim; d += 32) {
            const int64_t offset0 = d / 16 * panel, offset1 = d + 16 < dim ? offset0 + panel : -1;
            float* sums = running.sums + static_cast<int64_t>(block.start) * dim + d;
            with_rows(block.rows, [&](auto R) {
                if constexpr (kNumbers) {
                    add_numbers<R>(p, weight_scales, tile.pieces.values, tile.next.values, offset0, offset1,
                                   value_words, sums, dim, tile.first ? nullptr : shrink);
                } else {
                    add_values<T, R>(p, tile.pieces.values, tile.next.values, offset0, offset1, value_words, sums, dim,
                                     tile.first ? nullptr : shrink);
                }
            });
        }
    }

    // Whether a value that one of the rows does not see is infinite or NaN: the weight 0 times it would be NaN. Only
    // the keys after the first token's own are looked at, to the end of the last one's word: next to nothing beside
    // what is computed with them. (8-bit numbers are finite, and soften_scores() sees to their scales.)
    INLINE bool hides_not_finite(const KeyTile& tile) const {
        if constexpr (kNumbers) return false;
        constexpr int kPieceWords = 16 / S::kPerWord;
        const int first = std::max(0, visible_to(0, tile.key)) / S::kPerWord;
        const int last = (tile.count + S::kPerWord - 1) / S::kPerWord;
        vu found{};
        for (int w = first; w < last; ++w) {
            const char* line = tile.pieces.values[w / kPieceWords] + w % kPieceWords * 64;
            for (int d = 0; d < dim; d += 16, line += value_panel())
                found |= not_finite<T>(load(reinterpret_cast<const uint32_t*>(line)));
        }
        return any_of(reinterpret_cast<vi>(found));
    }

    // As accumulate(), with the same bits for what is finite, but each row by itself, up to the last value it sees.
    void accumulate_visible(const KeyTile& tile, const RowBlock& block) const {
        constexpr int kPieceWords = 16 / S::kPerWord;
        const uint32_t* p = reinterpret_cast<const uint32_t*>(weights);
        for (int r = 0; r < block.rows; ++r) {
            const int row = block.start + r, count = std::min(std::max(0, visible_to(row, tile.key)), tile.count);
            const int value_words = (count + S::kPerWord - 1) / S::kPerWord;
            for (int d = 0; d < dim; d += 16) {
                const char* values[kKeyTile / 16];
                for (int i = 0; i < kKeyTile / 16; ++i) values[i] = tile.pieces.values[i] + d / 16 * value_panel();

                // A last word that has a value too many is multiplied without it.
                alignas(64) uint32_t piece[kPieceWords * 16];
                if (count % S::kPerWord != 0) {
                    std::memcpy(piece, values[count / 16], sizeof(piece));
                    for (int i = 0; i < 16; ++i) piece[(value_words - 1) % kPieceWords * 16 + i] &= 0xffffu;
                    values[count / 16] = reinterpret_cast<const char*>(piece);
                }

                add_values<T, 1>(p + r * (kKeyTile / S::kPerWord * S::kWordSteps), values, values, 0, -1, value_words,
                                 running.sums + static_cast<int64_t>(row) * dim + d, dim,
                                 tile.first ? nullptr : shrink + r);
            }
        }
    }

    // To where merge_partials() reads it.
    INLINE void store_partial() const {
        float* to = job.partials + static_cast<int64_t>(task.partial) * job.query_rows * (dim + 2);
        std::memcpy(to, running.sums, sizeof(float) * rows * dim);
        std::memcpy(to + static_cast<int64_t>(rows) * dim, running.most, sizeof(float) * rows);
        std::memcpy(to + static_cast<int64_t>(rows) * (dim + 1), running.weight, sizeof(float) * rows);
    }

    // The weighted means, each row's sums over the sum of its weights.
    INLINE void store_result() const {
        for (int r = 0; r < rows; ++r) {
            const int64_t token = job.cu_q[task.row] + task.first_token + r / group;
            const int head = task.kv_head * group + r % group;
            const float share = 1.0f / running.weight[r];
            for (int i = 0; i < dim; i += 16)
                store_as(out_at<T>(job, token, head, i),
                         load(running.sums + static_cast<int64_t>(r) * dim + i) * share);
        }
    }
};

// One task: tile after tile of its keys, and each tile with all of its row blocks.
template <class T, class Cache>
void attention_task(const Attention& job, int number) {
    AttentionTask<T, Cache> work(job, number);
    const TaskView& task = work.task;
    for (int b = 0; b < work.blocks; ++b) work.pack_queries(work.row_block(b));

    Pieces pieces = work.locate(task, task.first_key);
    for (int key = task.first_key; key < work.last_key; key += kKeyTile) {
        // What is fetched meanwhile: the next tile, or the first of the next task, which likely is this thread's too.
        const bool more = key + kKeyTile < work.last_key;
        const TaskView following = more ? task : view(job, std::min(number + 1, job.count - 1));
        const Pieces next = work.locate(following, more ? key + kKeyTile : following.first_key);
        const int count = std::min(kKeyTile, work.last_key - key);
        const KeyTile tile{key, count, (count + 15) / 16 * 16, key == task.first_key, pieces, next};

        if constexpr (AttentionTask<T, Cache>::kNumbers) work.load_value_scales(tile);
        const bool careful = work.hides_not_finite(tile);
        for (int b = 0; b < work.blocks; ++b) {
            const RowBlock block = work.row_block(b);
            work.multiply_keys(tile, block);
            work.soften_scores(tile, block);
            if constexpr (!AttentionTask<T, Cache>::kNumbers) {
                if (careful) {
                    work.accumulate_visible(tile, block);
                    continue;
                }
            }
            work.accumulate(tile, block);
        }
        pieces = next;
    }

    task.partial >= 0 ? work.store_partial() : work.store_result();
}
