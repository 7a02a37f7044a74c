// Attention over the paged cache, with a running softmax (FlashAttention, arXiv:2205.14135; split over the keys as in
// Flash-Decoding). The heads of a group stand below each other as rows, so each key is read once a group. Included
// inside an instruction set's namespace.

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// What a task has summed up so far, of kQueryRows rows at most.
struct Running {
    float* sums;    // (rows, head_dim)
    float* most;    // (rows,) largest score
    float* weight;  // (rows,) sum of e^(score - most)
};

// One tile's scores to weights e^(score - most), as words for the next product. `visible` keys of `width` count.
template <class T>
INLINE void soften(float* scores, int visible, int width, float scale, Running& running, int row, int head_dim,
                   bool first, T* weights) {
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    vf most = splat(kMinusInfinity);
    for (int i = 0; i < width; i += 16) {
        vf score = lanes + i < visible ? load(scores + i) * scale : splat(kMinusInfinity);
        store(scores + i, score);
        most = larger(most, score);
    }
    float before = first ? kMinusInfinity : running.most[row];
    float now = std::max(before, max_of(most));
    if (now == kMinusInfinity) now = 0.0f;  // nothing visible yet: all weights are zero
    vf total{};
    for (int i = 0; i < width; i += 16) {
        vf weight = exponential(load(scores + i) - now);
        total += weight;
        store_as(weights + i, weight);
    }
    float shrink = first ? 0.0f : std::exp(before - now);
    running.most[row] = now;
    running.weight[row] = (first ? 0.0f : running.weight[row] * shrink) + sum_of(total);
    if (!first && shrink != 1.0f) {
        float* sums = running.sums + static_cast<int64_t>(row) * head_dim;
        for (int i = 0; i < head_dim; i += 16) store(sums + i, load(sums + i) * shrink);
    }
}

// sums (R rows, 32 or 16 columns) += weights (R rows of kKeyTile) times values, which stand in pieces of 16 keys.
// Meanwhile it fetches the pieces `ahead`, if there are any.
template <class T, int R>
INLINE void add_values(const uint32_t* weights, const uint32_t* const* pieces, const uint32_t* const* ahead,
                       int64_t offset0, int64_t offset1, int words, float* sums, int ld, bool add) {
    constexpr int kPieceWords = 16 / kPerWord<T>;
    constexpr int kStride = kKeyTile / kPerWord<T>;
    const bool both = offset1 >= 0;
    vf c0[R], c1[R];
    for (int r = 0; r < R; ++r) {
        c0[r] = add ? load(sums + r * ld) : vf{};
        c1[r] = add && both ? load(sums + r * ld + 16) : vf{};
    }
    const uint32_t* x = weights;
    if (offset1 < 0) offset1 = offset0;
    for (int done = 0; done < words; done += kPieceWords, ++pieces, ++ahead) {
        const uint32_t* v0 = *pieces + offset0;
        const uint32_t* v1 = *pieces + offset1;
        int count = std::min(kPieceWords, words - done);
        for (int k = 0; k < count; ++k, ++x) {
            vu w0 = load(v0 + k * 16), w1 = load(v1 + k * 16);
            __builtin_prefetch(*ahead + offset0 + k * 16, 0, 2);
            __builtin_prefetch(*ahead + offset1 + k * 16, 0, 2);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                vu p = splat(x[r * kStride]);
                c0[r] = multiply_add<T>(c0[r], p, w0);
                c1[r] = multiply_add<T>(c1[r], p, w1);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        store(sums + r * ld, c0[r]);
        if (both) store(sums + r * ld + 16, c1[r]);
    }
}

// Where 16 keys each, and their values, stand: those of the tile that begins at a key. Beyond the last key the pieces
// are repeated, and count for nothing.
struct Pieces {
    const uint32_t* keys[kKeyTile / 16];
    const uint32_t* values[kKeyTile / 16];

    Pieces(const Attention& job, const int64_t* table, int kv_head, int64_t head_words, int words, int per_word,
           int key, int last_key) {
        for (int i = 0; i < kKeyTile / 16; ++i) {
            const int k = std::min(key + 16 * i, (last_key - 1) / 16 * 16), inside = k % job.block_size;
            const int64_t start = (table[k / job.block_size] * job.kv_heads + kv_head) * head_words;
            keys[i] = static_cast<const uint32_t*>(job.keys) + start + static_cast<int64_t>(inside) * words;
            values[i] = static_cast<const uint32_t*>(job.values) + start + static_cast<int64_t>(inside) / per_word * 16;
        }
    }
};

struct TaskView {
    int row, kv_head, first_token, tokens, first_key, partial;
};

INLINE TaskView view(const int32_t* t) { return {t[0], t[1], t[2], t[3], t[4], t[5]}; }

template <class T>
void attention_task(const Attention& job, int number) {
    const TaskView task = view(job.tasks + static_cast<int64_t>(number) * kTaskFields);
    const int group = job.heads / job.kv_heads, dim = job.head_dim, rows = task.tokens * group;
    const int words = dim / kPerWord<T>, block_words = job.block_size / kPerWord<T>;
    const int keys_before = job.seqused_k[task.row] - (job.cu_q[task.row + 1] - job.cu_q[task.row]);
    int last_key = keys_before + task.first_token + task.tokens;
    if (task.partial >= 0) last_key = std::min(last_key, task.first_key + kSplitKeys);
    const int64_t head_words = static_cast<int64_t>(job.block_size) * words;
    const int64_t* table = job.block_table + task.row * job.table_stride;
    const int blocks = (rows + kMaxRows - 1) / kMaxRows;
    char* memory =
        static_cast<char*>(scratch(1, rows * (4 * (words + kKeyTile + dim + 2) + sizeof(T) * kKeyTile) + 64 * 8));
    auto take = [&memory](int64_t bytes) {
        char* start = memory;
        memory += (bytes + 63) / 64 * 64;
        return start;
    };
    uint32_t* q = reinterpret_cast<uint32_t*>(take(static_cast<int64_t>(rows) * words * 4));
    float* scores = reinterpret_cast<float*>(take(static_cast<int64_t>(rows) * kKeyTile * 4));
    T* weights = reinterpret_cast<T*>(take(static_cast<int64_t>(rows) * kKeyTile * sizeof(T)));
    Running running{reinterpret_cast<float*>(take(static_cast<int64_t>(rows) * dim * 4)),
                    reinterpret_cast<float*>(take(rows * 4)), reinterpret_cast<float*>(take(rows * 4))};

    const int64_t first_query = job.cu_q[task.row] + task.first_token;
    auto at = [&](int row) {
        return (first_query + row / group) * job.ldq + (static_cast<int64_t>(task.kv_head) * group + row % group) * dim;
    };
    for (int b = 0; b < blocks; ++b) {
        int start = block_start(rows, blocks, b), end = block_start(rows, blocks, b + 1);
        const uint32_t* from[kMaxRows];
        for (int r = start; r < end; ++r)
            from[r - start] = reinterpret_cast<const uint32_t*>(static_cast<const T*>(job.q) + at(r));
        interleave(from, end - start, words, q + static_cast<int64_t>(start) * words);
    }

    auto locate = [&](int key) {
        return Pieces(job, table, task.kv_head, head_words, words, kPerWord<T>, key, last_key);
    };
    Pieces pieces = locate(task.first_key);
    for (int key = task.first_key; key < last_key; key += kKeyTile) {
        const bool first = key == task.first_key;
        const int count = std::min(kKeyTile, last_key - key), width = (count + 15) / 16 * 16;
        const Pieces next = locate(key + kKeyTile < last_key ? key + kKeyTile : key);
        for (int k = 0; k < width; k += 32) {
            const int i = k / 16, second = k + 16 < width ? i + 1 : i;
            const char* ahead[2] = {reinterpret_cast<const char*>(next.keys[i]),
                                    reinterpret_cast<const char*>(next.keys[second])};
            for (int b = 0; b < blocks; ++b) {
                int start = block_start(rows, blocks, b), end = block_start(rows, blocks, b + 1);
                kMultiply<T>[end - start - 1](q + static_cast<int64_t>(start)* words, pieces.keys[i],
                                              pieces.keys[second], words,
                                              scores + static_cast<int64_t>(start)* kKeyTile + k, kKeyTile, false,
                                              nullptr, ahead, b == 0 ? 2 : 0);
            }
        }
        for (int r = 0; r < rows; ++r) {
            int visible = std::min(count, keys_before + task.first_token + r / group + 1 - key);
            soften<T>(scores + static_cast<int64_t>(r) * kKeyTile, visible, width, job.scale, running, r, dim, first,
                      weights + static_cast<int64_t>(r) * kKeyTile);
        }
        const int value_words = (count + kPerWord<T> - 1) / kPerWord<T>;
        for (int b = 0; b < blocks; ++b) {
            int start = block_start(rows, blocks, b), end = block_start(rows, blocks, b + 1);
            const uint32_t* p = reinterpret_cast<const uint32_t*>(weights + static_cast<int64_t>(start) * kKeyTile);
            for (int d = 0; d < dim; d += 32) {
                int64_t offset0 = static_cast<int64_t>(d) * block_words;
                int64_t offset1 = d + 16 < dim ? offset0 + 16 * block_words : -1;
                with_rows(end - start, [&](auto R) {
                    add_values<T, R>(p, pieces.values, next.values, offset0, offset1, value_words,
                                     running.sums + static_cast<int64_t>(start) * dim + d, dim, !first);
                });
            }
        }
        pieces = next;
    }

    if (task.partial >= 0) {
        float* to = job.partials + static_cast<int64_t>(task.partial) * kQueryRows * (dim + 2);
        std::memcpy(to, running.sums, sizeof(float) * rows * dim);
        std::memcpy(to + static_cast<int64_t>(rows) * dim, running.most, sizeof(float) * rows);
        std::memcpy(to + static_cast<int64_t>(rows) * (dim + 1), running.weight, sizeof(float) * rows);
        return;
    }
    for (int r = 0; r < rows; ++r) {
        int64_t token = first_query + r / group;
        T* out = static_cast<T*>(job.out) + (token * job.heads + task.kv_head * group + r % group) * dim;
        float share = 1.0f / running.weight[r];
        for (int i = 0; i < dim; i += 16)
            store_as(out + i, load(running.sums + static_cast<int64_t>(r) * dim + i) * share);
    }
}

// The tasks of one row and kv head, which each saw some of its keys, into the row's result.
template <class T>
void merge_partials(const Attention& job, int row, int kv_head, int splits, int partial) {
    const int group = job.heads / job.kv_heads, dim = job.head_dim;
    const int rows = (job.cu_q[row + 1] - job.cu_q[row]) * group;
    const float* from = job.partials + static_cast<int64_t>(partial) * kQueryRows * (dim + 2);
    const int64_t stride = static_cast<int64_t>(kQueryRows) * (dim + 2);
    for (int r = 0; r < rows; ++r) {
        float most = kMinusInfinity;
        for (int s = 0; s < splits; ++s) most = std::max(most, from[s * stride + rows * dim + r]);
        float total = 0.0f;
        for (int s = 0; s < splits; ++s)
            total += from[s * stride + rows * (dim + 1) + r] * std::exp(from[s * stride + rows * dim + r] - most);
        int64_t token = job.cu_q[row] + r / group;
        T* out = static_cast<T*>(job.out) + (token * job.heads + kv_head * group + r % group) * dim;
        for (int i = 0; i < dim; i += 16) {
            vf sum{};
            for (int s = 0; s < splits; ++s) {
                float share = std::exp(from[s * stride + rows * dim + r] - most) / total;
                sum += load(from + s * stride + static_cast<int64_t>(r) * dim + i) * share;
            }
            store_as(out + i, sum);
        }
    }
}
