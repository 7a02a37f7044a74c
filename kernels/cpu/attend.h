// Attention over the paged cache, with a running softmax (FlashAttention, arXiv:2205.14135; split over the keys as in
// Flash-Decoding). The heads of a group stand below each other as rows, so each key is read once a group. Included
// inside an instruction set's namespace.

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// What a task has summed up so far.
struct Running {
    float* sums;    // (rows, head_dim)
    float* most;    // (rows,) largest score, scaled
    float* weight;  // (rows,) sum of e^(score - most)
};

// One row's scores of a tile, to be scaled, to weights e^(score - most), which `put` takes by 16 keys with the place of
// the first. `visible` keys of `width` count. Returns what the row's sums so far have to be multiplied by.
template <class F>
INLINE float soften(float* scores, int visible, int width, float scale, Running& running, int row, bool first,
                    F&& put) {
    if (visible < width) {
        const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        for (int i = std::max(visible, 0) / 16 * 16; i < width; i += 16)
            store(scores + i, lanes + i < visible ? load(scores + i) : splat(kMinusInfinity));
    }
    vf most = load(scores);
    for (int i = 16; i < width; i += 16) most = larger(most, load(scores + i));
    const float before = first ? kMinusInfinity : running.most[row];
    const float largest = std::max(before, max_of(most) * scale);
    const float now = largest > kMinusInfinity ? largest : 0.0f;  // nothing visible yet: all weights are zero
    vf total{};
    for (int i = 0; i < width; i += 16) {
        const vf weight = exponential(fused(load(scores + i), splat(scale), splat(-now)));
        total += weight;
        put(i, weight);
    }
    const float shrink = first ? 0.0f : exponential(splat(before - now))[0];
    running.most[row] = largest;
    running.weight[row] = (first ? 0.0f : running.weight[row] * shrink) + sum_of(total);
    return shrink;
}

// As add_values, of values that are numbers, and weights of 16 bits with a scale for each row.
template <int R>
INLINE void add_numbers(const uint32_t* weights, const float* scales, const char* const* pieces,
                        const char* const* ahead, int64_t offset0, int64_t offset1, int words, float* sums, int ld,
                        const float* shrink) {
    static_assert(int64_t{kKeyTile} * 127 * 32767 <= std::numeric_limits<int32_t>::max(), "a sum may overflow");
    constexpr int kPieceWords = 8, kStride = kKeyTile / 2;
    const bool both = offset1 >= 0;
    if (!both) offset1 = offset0;
    vi c0[R], c1[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) c0[r] = c1[r] = vi{};
    const uint32_t* x = weights;
    for (int done = 0; done < words; done += kPieceWords, ++pieces, ++ahead) {
        const char *v0 = *pieces + offset0, *v1 = *pieces + offset1;
        const int count = std::min(kPieceWords, words - done);
        for (int k = 0; k < count; ++k, ++x) {
            const vu w0 = Shorts::load_weight(v0 + k * Shorts::kWeightBytes);
            const vu w1 = Shorts::load_weight(v1 + k * Shorts::kWeightBytes);
            if (k % 2 == 0) {
                __builtin_prefetch(*ahead + offset0 + k * Shorts::kWeightBytes, 0, 2);
                __builtin_prefetch(*ahead + offset1 + k * Shorts::kWeightBytes, 0, 2);
            }
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const vu p = splat(x[r * kStride]);
                c0[r] = Shorts::multiply_add(c0[r], p, w0);
                c1[r] = Shorts::multiply_add(c1[r], p, w1);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        float* to = sums + r * ld;
        const vf scale = splat(scales[r]);
        store(to, fused(to_floats(c0[r]), scale, shrink ? load(to) * shrink[r] : vf{}));
        if (both) store(to + 16, fused(to_floats(c1[r]), scale, shrink ? load(to + 16) * shrink[r] : vf{}));
    }
}

// sums (R rows, 32 or 16 columns), each row multiplied by `shrink` or beginning anew without it, plus weights (R rows
// of kKeyTile) times values, which stand in pieces of 16 keys. Meanwhile it fetches the pieces `ahead`.
template <class T, int R>
INLINE void add_values(const uint32_t* weights, const char* const* pieces, const char* const* ahead, int64_t offset0,
                       int64_t offset1, int words, float* sums, int ld, const float* shrink) {
    constexpr int kPieceWords = 16 / kPerWord<T>;
    constexpr int kStride = kKeyTile / kPerWord<T>;
    const bool both = offset1 >= 0;
    vf c0[R], c1[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        c0[r] = shrink ? load(sums + r * ld) * shrink[r] : vf{};
        c1[r] = shrink && both ? load(sums + r * ld + 16) * shrink[r] : vf{};
    }
    const uint32_t* x = weights;
    if (offset1 < 0) offset1 = offset0;
    for (int done = 0; done < words; done += kPieceWords, ++pieces, ++ahead) {
        const auto* v0 = reinterpret_cast<const uint32_t*>(*pieces + offset0);
        const auto* v1 = reinterpret_cast<const uint32_t*>(*pieces + offset1);
        int count = std::min(kPieceWords, words - done);
        for (int k = 0; k < count; ++k, ++x) {
            vu w0 = load(v0 + k * 16), w1 = load(v1 + k * 16);
            __builtin_prefetch(*ahead + offset0 + k * 64, 0, 2);
            __builtin_prefetch(*ahead + offset1 + k * 64, 0, 2);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                vu p = splat(x[r * kStride]);
                c0[r] = multiply_add<T>(c0[r], p, w0);
                c1[r] = multiply_add<T>(c1[r], p, w1);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        store(sums + r * ld, c0[r]);
        if (both) store(sums + r * ld + 16, c1[r]);
    }
}

// What a cache's element is multiplied as, and bytes of the cache for a word: its own kind, or numbers.
template <class T, class Cache>
struct Stored {
    using Weight = T;
    static constexpr int kPerWord = 4 / sizeof(T), kWordBytes = 4, kScaleBytes = 0;
};
template <class T>
struct Stored<T, int8_t> {
    using Weight = int16_t;
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
            if (i > 0 && key + 16 * i <= last && (inside += 16) == job.block_size) {
                inside = 0;
                ++block;
            }
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

template <class T, class Cache>
void attention_task(const Attention& job, int number) {
    using S = Stored<T, Cache>;
    using Weight = typename S::Weight;
    constexpr bool kNumbers = sizeof(Cache) == 1;
    const TaskView task = view(job, number);
    const int group = job.heads / job.kv_heads, dim = job.head_dim, rows = task.tokens * group;
    const int words = dim / S::kPerWord;
    const int before = keys_before(job, task), last_key = end_of_keys(job, task);
    const int blocks = (rows + kMaxRows - 1) / kMaxRows;
    char* memory = static_cast<char*>(
        scratch(1, rows * 4 * (words + dim + 3) + kMaxRows * ((4 + sizeof(Weight)) * kKeyTile + 2 * dim) + 64 * 10));
    auto take = [&memory](int64_t bytes) {
        char* start = memory;
        memory += (bytes + 63) / 64 * 64;
        return start;
    };
    uint32_t* q = reinterpret_cast<uint32_t*>(take(static_cast<int64_t>(rows) * words * 4));
    float* scores = reinterpret_cast<float*>(take(kMaxRows * kKeyTile * 4));
    Weight* weights = reinterpret_cast<Weight*>(take(kMaxRows * kKeyTile * sizeof(Weight)));
    Running running{reinterpret_cast<float*>(take(static_cast<int64_t>(rows) * dim * 4)),
                    reinterpret_cast<float*>(take(rows * 4)), reinterpret_cast<float*>(take(rows * 4))};
    float* q_scales = reinterpret_cast<float*>(take(rows * 4));
    int16_t* q_numbers = reinterpret_cast<int16_t*>(take(kNumbers ? 2 * kMaxRows * dim : 0));

    const int64_t first_query = job.cu_q[task.row] + task.first_token;
    auto at = [&](int row) {
        return (first_query + row / group) * job.ldq + (static_cast<int64_t>(task.kv_head) * group + row % group) * dim;
    };
    for (int b = 0; b < blocks; ++b) {
        int start = block_start(rows, blocks, b), end = block_start(rows, blocks, b + 1);
        const uint32_t* from[kMaxRows];
        for (int r = start; r < end; ++r) {
            const T* query = static_cast<const T*>(job.q) + at(r);
            from[r - start] = reinterpret_cast<const uint32_t*>(query);
            if constexpr (kNumbers) {
                int16_t* numbers = q_numbers + static_cast<int64_t>(r - start) * dim;
                q_scales[r] = to_shorts(query, dim, numbers);
                from[r - start] = reinterpret_cast<const uint32_t*>(numbers);
            }
        }
        interleave(from, end - start, words, q + static_cast<int64_t>(start) * words);
    }

    const auto locate = [&](const TaskView& of, int key) {
        return Pieces(job, job.block_table + of.row * job.table_stride, of.kv_head, S{}, key, end_of_keys(job, of));
    };
    Pieces pieces = locate(task, task.first_key);
    for (int key = task.first_key; key < last_key; key += kKeyTile) {
        const bool first = key == task.first_key;
        const int count = std::min(kKeyTile, last_key - key), width = (count + 15) / 16 * 16;
        // What is fetched meanwhile: the next tile, or the first of the next task, which likely is this thread's too.
        const TaskView following = key + kKeyTile < last_key ? task : view(job, std::min(number + 1, job.count - 1));
        const Pieces next = locate(following, key + kKeyTile < last_key ? key + kKeyTile : following.first_key);
        alignas(64) float value_scales[kKeyTile];
        if constexpr (kNumbers) {
            for (int i = 0; i < width; ++i) value_scales[i] = i < count ? pieces.value_scales[i / 16][i % 16] : 0.0f;
        }
        // A row block's scores and weights stay in the first cache; the tile's keys and values in the second.
        for (int b = 0; b < blocks; ++b) {
            const int start = block_start(rows, blocks, b), block_rows = block_start(rows, blocks, b + 1) - start;
            const uint32_t* x = q + static_cast<int64_t>(start) * words;
            for (int k = 0; k < width; k += 32) {
                const int i = k / 16, second = k + 16 < width ? i + 1 : i;
                const char* ahead[2] = {next.keys[i], next.keys[second]};
                if constexpr (kNumbers) {
                    with_rows(block_rows, [&](auto R) {
                        multiply_group<Shorts, R>(x, pieces.keys[i], pieces.keys[second], words, pieces.key_scales[i],
                                                  pieces.key_scales[second], scores + k, kKeyTile, false,
                                                  b == 0 ? ahead[0] : nullptr, ahead[1]);
                    });
                } else {
                    kMultiply<T>[block_rows - 1](x, reinterpret_cast<const uint32_t*>(pieces.keys[i]),
                                                 reinterpret_cast<const uint32_t*>(pieces.keys[second]), words,
                                                 scores + k, kKeyTile, false, nullptr, ahead, b == 0 ? 2 : 0);
                }
            }
            float shrink[kMaxRows], weight_scales[kMaxRows];
            for (int r = 0; r < block_rows; ++r) {
                const int row = start + r, visible = before + task.first_token + row / group + 1 - key;
                float* row_scores = scores + r * kKeyTile;
                Weight* row_weights = weights + r * kKeyTile;
                if constexpr (kNumbers) {  // multiplied with their values' scales, and as numbers of 16 bits
                    shrink[r] = soften(row_scores, visible, width, job.scale * q_scales[row], running, row, first,
                                       [&](int i, vf w) { store(row_scores + i, w * load(value_scales + i)); });
                    weight_scales[r] = to_shorts(row_scores, width, row_weights);
                } else {
                    shrink[r] = soften(row_scores, visible, width, job.scale, running, row, first,
                                       [&](int i, vf w) { store_as(row_weights + i, w); });
                }
            }
            const int value_words = (count + S::kPerWord - 1) / S::kPerWord;
            const uint32_t* p = reinterpret_cast<const uint32_t*>(weights);
            for (int d = 0; d < dim; d += 32) {
                const int64_t panel = static_cast<int64_t>(job.block_size) / S::kPerWord * 16 * S::kWordBytes;
                const int64_t offset0 = d / 16 * panel, offset1 = d + 16 < dim ? offset0 + panel : -1;
                float* sums = running.sums + static_cast<int64_t>(start) * dim + d;
                with_rows(block_rows, [&](auto R) {
                    if constexpr (kNumbers) {
                        add_numbers<R>(p, weight_scales, pieces.values, next.values, offset0, offset1, value_words,
                                       sums, dim, first ? nullptr : shrink);
                    } else {
                        add_values<T, R>(p, pieces.values, next.values, offset0, offset1, value_words, sums, dim,
                                         first ? nullptr : shrink);
                    }
                });
            }
        }
        pieces = next;
    }

    if (task.partial >= 0) {
        float* to = job.partials + static_cast<int64_t>(task.partial) * job.query_rows * (dim + 2);
        std::memcpy(to, running.sums, sizeof(float) * rows * dim);
        std::memcpy(to + static_cast<int64_t>(rows) * dim, running.most, sizeof(float) * rows);
        std::memcpy(to + static_cast<int64_t>(rows) * (dim + 1), running.weight, sizeof(float) * rows);
        return;
    }
    for (int r = 0; r < rows; ++r) {
        int64_t token = first_query + r / group;
        const int head = task.kv_head * group + r % group;
        float share = 1.0f / running.weight[r];
        for (int i = 0; i < dim; i += 16)
            store_as(out_at<T>(job, token, head, i), load(running.sums + static_cast<int64_t>(r) * dim + i) * share);
    }
}

// One row of partial results to a head's place: `splits` of them, `stride` floats apart, each of `rows` rows' sums,
// then their largest scores, then their denominators. A split in which the row saw nothing counts for nothing.
template <class T>
INLINE void merge_row(const Attention& job, const float* from, int64_t stride, int splits, int rows, int r,
                      int64_t token, int64_t head) {
    const int dim = job.head_dim;
    const float *largest = from + static_cast<int64_t>(rows) * dim + r, *weights = largest + rows;
    float most = kMinusInfinity, total = 0.0f;
    for (int s = 0; s < splits; ++s) most = std::max(most, largest[s * stride]);
    for (int s = 0; s < splits; ++s)
        if (largest[s * stride] > kMinusInfinity) total += weights[s * stride] * std::exp(largest[s * stride] - most);
    for (int i = 0; i < dim; i += 16) {
        vf sum{};
        for (int s = 0; s < splits; ++s) {
            if (!(largest[s * stride] > kMinusInfinity)) continue;
            const float share = std::exp(largest[s * stride] - most) / total;
            sum = fused(load(from + s * stride + static_cast<int64_t>(r) * dim + i), splat(share), sum);
        }
        store_as(out_at<T>(job, token, head, i), sum);
    }
}

// The tasks of one row and kv head, which each saw some of its keys, into the row's result.
template <class T>
void merge_partials(const Attention& job, int row, int kv_head, int splits, int partial) {
    const int group = job.heads / job.kv_heads, dim = job.head_dim;
    const int rows = (job.cu_q[row + 1] - job.cu_q[row]) * group;
    const int64_t stride = static_cast<int64_t>(job.query_rows) * (dim + 2);
    for (int r = 0; r < rows; ++r) {
        const int64_t token = job.cu_q[row] + r / group;
        merge_row<T>(job, job.partials + partial * stride, stride, splits, rows, r, token, kv_head * group + r % group);
    }
}
