// Which keys and values a task of attention reads, and where they stand in the paged cache. Included inside an
// instruction set's namespace.
//
// A row's keys are those of its blocks, in the order of its row of the block table. A piece is 16 of them, and a tile
// of kKeyTile keys is 16 pieces, wherever they stand. Of block b and one KV head, with blocks of 32:
//
//     keys     [words of the head][keys 0-15] | [words of the head][keys 16-31] | scales of 32 keys, if it is int8
//                piece 0                        piece 1
//     values   [words of keys 0-31][dimensions 0-15] | [words of keys 0-31][dimensions 16-31] | ... | scales of 32
//                rows 0-7 are piece 0's, 8-15 piece 1's (two bfloat16 of neighbouring keys are a word)
//
// So a block is multiplied as it stands: keys as a panel of 16 columns, values as a panel for each 16 dimensions.

// A task's row of Attention::tasks, by names. `partial` is -1 if the task sees all keys of its queries.
struct TaskView {
    int row, kv_head, first_token, tokens, first_key, partial;
};

INLINE TaskView view(const Attention& job, int number) {
    const int32_t* t = job.tasks + static_cast<int64_t>(number) * kTaskFields;
    return {t[0], t[1], t[2], t[3], t[4], t[5]};
}

// Keys of a task's row before its step's first token, and the end of those that the task sees.
INLINE int keys_before(const Attention& job, const TaskView& task) {
    return job.seqused_k[task.row] - (job.cu_q[task.row + 1] - job.cu_q[task.row]);
}
INLINE int end_of_keys(const Attention& job, const TaskView& task) {
    const int end = keys_before(job, task) + task.first_token + task.tokens;
    return task.partial >= 0 ? std::min(end, task.first_key + kSplitKeys) : end;
}

// Where a head's numbers from i on go, i a multiple of sixteen.
template <class T>
INLINE T* out_at(const Attention& job, int64_t token, int64_t head, int i) {
    const int64_t dim = job.head_dim;
    return element<T>(job.out, job.heads * dim, job.out_tiles, token, head * dim + i);
}

// What a cache's element is multiplied as, in so many steps a word, and bytes of the cache for a word: its own kind, or
// numbers.
template <class T, class Cache>
struct Stored {
    using Weight = Factor<T>;
    static constexpr int kWordSteps = kSteps<T>;
    static constexpr int kPerWord = 4 / sizeof(T), kWordBytes = 4, kScaleBytes = 0;
};
template <class T>
struct Stored<T, int8_t> {
    using Weight = int16_t;
    static constexpr int kWordSteps = 1;
    static constexpr int kPerWord = 2, kWordBytes = 2, kScaleBytes = 4;
};

// Where 16 keys each, and their values, stand: those of the tile that begins at a key. Beyond the last key the pieces
// are repeated, and count for nothing.
struct Pieces {
    const char* keys[kKeyTile / 16];
    const char* values[kKeyTile / 16];
    const float* key_scales[kKeyTile / 16];  // of numbers
    const float* value_scales[kKeyTile / 16];

    template <class S>
    Pieces(const Attention& job, const int64_t* table, int kv_head, S, int key, int last_key) {
        const int64_t words = job.head_dim / S::kPerWord, elements = job.block_size * words * S::kWordBytes;
        const int last = (last_key - 1) / 16 * 16;
        int block = key / job.block_size, inside = key % job.block_size;
        for (int i = 0; i < kKeyTile / 16; ++i) {
            // The next 16 keys: further on in the block, or at the beginning of the row's next one.
            if (i > 0 && key + 16 * i <= last && (inside += 16) == job.block_size) {
                inside = 0;
                ++block;
            }

            // Heads of a block follow each other: each one's elements, and behind them its scales, if it has some.
            const int64_t start =
                (table[block] * job.kv_heads + kv_head) * (elements + job.block_size * S::kScaleBytes);
            const char* all_keys = static_cast<const char*>(job.keys) + start;
            const char* all_values = static_cast<const char*>(job.values) + start;
            keys[i] = all_keys + inside * words * S::kWordBytes;
            values[i] = all_values + inside / S::kPerWord * 16 * S::kWordBytes;
            key_scales[i] = reinterpret_cast<const float*>(all_keys + elements) + inside;
            value_scales[i] = reinterpret_cast<const float*>(all_values + elements) + inside;
        }
    }
};
