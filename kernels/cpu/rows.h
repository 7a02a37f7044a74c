// What is done row by row: norms, rotary embedding with the cache's stores, the largest of a row. Included inside an
// instruction set's namespace.

// x / sqrt(mean(x^2) + eps) * weight of one row (arXiv:1910.07467). Sixteen numbers from i on go to at(i).
template <class From, class At>
INLINE void normalise(const From* x, const float* weight, float eps, int size, At&& at) {
    vf squares{};
    for (int i = 0; i < size; i += 16) {
        vf v = load_up_to(x + i, size - i);
        squares += v * v;
    }
    float factor = 1.0f / std::sqrt(sum_of(squares) / size + eps);
    for (int i = 0; i < size; i += 16)
        store_up_to(at(i), load_up_to(x + i, size - i) * factor * load_up_to(weight + i, size - i), size - i);
}

template <class T>
void norm_row(const Norm& job, int row) {
    normalise(job.x + static_cast<int64_t>(row) * job.size, job.weight, job.eps, job.size,
              [&](int i) { return element<T>(job.out, job.size, job.out_tiles, row, i); });
}

// One head, rotated: the halves are the pairs' components (arXiv:2104.09864, in the order of Hugging Face's
// checkpoints).
template <class T>
INLINE void rotate(const T* x, const T* cos, const T* sin, int dim, T* out) {
    if (!cos) {
        std::memmove(out, x, dim * sizeof(T));
        return;
    }
    int half = dim / 2;
    for (int i = 0; i < half; i += 16) {
        int count = half - i;
        vf c = load_up_to(cos + i, count), s = load_up_to(sin + i, count);
        vf a = load_up_to(x + i, count), b = load_up_to(x + half + i, count);
        store_up_to(out + i, a * c - b * s, count);
        store_up_to(out + half + i, b * c + a * s, count);
    }
}

// Writes one of the numbers of a word of a cache block: a float is a word, a bfloat16 half of one.
INLINE void put(float* words, int64_t word, int, float value, bool) { words[word] = value; }

// The first of a pair clears the second, unless that is about to be written, maybe by another thread: what a block held
// before must not reach a product, not even times zero.
INLINE void put(bf16* halves, int64_t word, int half, bf16 value, bool clear) {
    halves[2 * word + half] = value;
    if (half == 0 && clear) halves[2 * word + 1].bits = 0;
}

// A key's or value's head as 8-bit numbers, and its scale. Number i goes to to[index_of(i)].
template <class T, class IndexOf>
INLINE void store_numbers(const T* x, int dim, int8_t* to, float* scale, IndexOf&& index_of) {
    float inverse;
    *scale = scale_of(x, dim, 127, &inverse);
    for (int i = 0; i < dim; i += 16) {
        alignas(64) int32_t lanes[16];
        *reinterpret_cast<vi*>(lanes) =
            __builtin_convertvector(load_as_float(x + i) * inverse + kRounder - kRounder, vi);
        for (int j = 0; j < 16; ++j) to[index_of(i + j)] = static_cast<int8_t>(lanes[j]);
    }
}

// One token's heads: queries are rotated where they stand, keys and values go to the token's position in the cache, in
// the layout that attention multiplies (kernels.h).
template <class T>
void rope_token(const Rope& job, int token) {
    const int dim = job.head_dim, words = dim / kPerWord<T>;
    T* row = static_cast<T*>(job.qkv) + token * job.ld;
    const T* cos = job.cos ? static_cast<const T*>(job.cos) + static_cast<int64_t>(token) * dim : nullptr;
    const T* sin = static_cast<const T*>(job.sin) + static_cast<int64_t>(token) * dim;
    T* buffer = static_cast<T*>(scratch(Scratch::kRotatedHead, 2 * dim * sizeof(T)));
    T* rotated = buffer + dim;

    for (int h = 0; h < job.heads; ++h) {
        T* head = row + static_cast<int64_t>(h) * dim;
        if (job.q_norm) normalise(head, job.q_norm, job.eps, dim, [&](int i) { return head + i; });
        rotate(head, cos, sin, dim, head);
    }

    // `offset` is the token's inside its block. Without a next token in the next position, put() clears the rest of a
    // word that this one begins.
    const int64_t block = job.slot_mapping[token] / job.block_size;
    const int offset = static_cast<int>(job.slot_mapping[token] % job.block_size);
    const bool is_last = token + 1 == job.tokens || job.slot_mapping[token + 1] != job.slot_mapping[token] + 1;
    const int64_t head_words = static_cast<int64_t>(job.block_size) * words;
    for (int h = 0; h < job.kv_heads; ++h) {
        const T* k = row + static_cast<int64_t>(job.heads + h) * dim;
        const T* v = k + static_cast<int64_t>(job.kv_heads) * dim;
        if (job.k_norm) {
            normalise(k, job.k_norm, job.eps, dim, [&](int i) { return buffer + i; });
            k = buffer;
        }
        rotate(k, cos, sin, dim, rotated);

        if (job.int8_cache) {
            const int64_t numbers = static_cast<int64_t>(job.block_size) * dim;
            const int64_t at = (block * job.kv_heads + h) * (numbers + job.block_size * 4);
            auto *keys = static_cast<int8_t*>(job.keys) + at, *values = static_cast<int8_t*>(job.values) + at;
            store_numbers(rotated, dim, keys, reinterpret_cast<float*>(keys + numbers) + offset, [&](int i) {
                return static_cast<int64_t>(offset / 16) * 16 * dim + i / 2 * 32 + offset % 16 * 2 + i % 2;
            });
            store_numbers(v, dim, values, reinterpret_cast<float*>(values + numbers) + offset, [&](int i) {
                return static_cast<int64_t>(i / 16) * 16 * job.block_size + offset / 2 * 32 + i % 16 * 2 + offset % 2;
            });
            continue;
        }

        // A key is a column of its panel: word after word, 16 words apart. A value's numbers are spread over the panels
        // of 16 dimensions, in which tokens are the summed dimension.
        const int64_t start = (block * job.kv_heads + h) * head_words;
        uint32_t* to =
            static_cast<uint32_t*>(job.keys) + start + static_cast<int64_t>(offset / 16) * 16 * words + offset % 16;
        const uint32_t* from = reinterpret_cast<const uint32_t*>(rotated);
        for (int w = 0; w < words; ++w) to[w * 16] = from[w];
        T* values = reinterpret_cast<T*>(static_cast<uint32_t*>(job.values) + start);
        const int block_words = job.block_size / kPerWord<T>;
        for (int i = 0; i < dim; ++i)
            put(values, static_cast<int64_t>(i / 16) * 16 * block_words + offset / kPerWord<T> * 16 + i % 16,
                offset % kPerWord<T>, v[i], is_last);
    }
}

// The largest of a piece of a row; NaN, of whatever sign, if there is one.
INLINE float largest_of(const float* from, int64_t size) {
    constexpr int kChains = 4;  // of instructions that wait for one another
    vf high[kChains];
    vi odd{};
    for (auto& part : high) part = splat(-std::numeric_limits<float>::infinity());
    int64_t i = 0;
    for (; i + 16 * kChains <= size; i += 16 * kChains) {
        for (int j = 0; j < kChains; ++j) {
            vf v = load(from + i + 16 * j);
            odd |= v != v;
            high[j] = larger(high[j], v);
        }
    }
    for (; i + 16 <= size; i += 16) {
        vf v = load(from + i);
        odd |= v != v;
        high[0] = larger(high[0], v);
    }

    float most = max_of(larger(larger(high[0], high[1]), larger(high[2], high[3])));
    bool is_nan = any_of(odd);
    for (; i < size; ++i) {
        is_nan |= from[i] != from[i];
        most = from[i] > most ? from[i] : most;
    }
    return is_nan ? std::numeric_limits<float>::quiet_NaN() : most;
}

// The index of the first of the largest values; a NaN counts as larger than everything, as torch has it. One pass: only
// the piece that has it is looked through again.
inline int64_t argmax(const float* row, int64_t size, float* value) {
    constexpr int64_t kPiece = 1024;
    float most = -std::numeric_limits<float>::infinity();
    int64_t piece = 0;
    for (int64_t first = 0; first < size; first += kPiece) {
        const float high = largest_of(row + first, std::min(kPiece, size - first));
        if (high <= most) continue;
        most = high;
        piece = first;
        if (high != high) break;
    }

    *value = most;
    if (size == 0) return 0;
    int64_t i = piece;
    while (most != most ? row[i] == row[i] : row[i] != most) ++i;
    *value = row[i];
    return i;
}

typedef uint64_t vq __attribute__((vector_size(64)));

// SplitMix64's finaliser (see kernels/noise.py).
template <class V>
INLINE V mix_bits(V x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

// kernels/noise.py's uniform number of 64 mixed bits, and the Gumbel noise made of it.
INLINE float uniform_of(uint64_t bits) {
    return std::min((static_cast<float>(bits >> 24) + 0.5f) * 0x1p-40f, 1.0f - 0x1p-24f);
}
INLINE float gumbel_of(uint64_t bits) { return -std::log(-std::log1p(-uniform_of(bits))); }

// The largest of row / temperature + noise. Noise above g is an exponential number below e^-g, so below that must lie
// the uniform number it is made of: few do, and the logarithms are for those alone.
inline int64_t gumbel_argmax(const float* row, int64_t size, float temperature, uint64_t seed, uint64_t counter,
                             float* value) {
    constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
    const uint64_t key = mix_bits(seed) + kGolden;
    auto score = [&](int64_t i) { return row[i] / temperature + gumbel_of(mix_bits(key + (counter + i) * kGolden)); };
    int64_t best = argmax(row, size, value);
    if (!(std::fabs(*value) < std::numeric_limits<float>::infinity())) return best;
    float most = score(best);

    const vq steps = {0, 1, 2, 3, 4, 5, 6, 7};
    for (int64_t first = 0; first < size; first += 16) {
        const vf x = load_up_to(row + first, size - first) / temperature;
        alignas(64) uint64_t bits[16];
        for (int half = 0; half < 2; ++half) {
            const vq counters = counter + static_cast<uint64_t>(first + 8 * half) + steps;
            *reinterpret_cast<vq*>(bits + 8 * half) = mix_bits(key + counters * kGolden);
        }
        // The high 32 bits alone, rounded down: the bound is a little generous, never too strict.
        vu high;
        for (int i = 0; i < 16; ++i) high[i] = static_cast<uint32_t>(bits[i] >> 32);
        const vf low = __builtin_convertvector(reinterpret_cast<vi>(high >> 1), vf) * 0x1.fffffep-32f;
        const vi near = low <= exponential(x - most) * 1.00001f + 0x1p-30f;
        if (!any_of(near)) continue;

        for (int64_t i = first; i < std::min(size, first + 16); ++i) {
            if (!near[i - first]) continue;
            const float mine = score(i);
            if (mine > most || (mine == most && i < best)) {
                most = mine;
                best = i;
            }
        }
    }
    *value = most;
    return best;
}

// The largest of each `block` of a row, a multiple of 16; NaN if there is one.
inline void block_maxima(const float* row, int64_t size, int64_t block, float* out) {
    for (int64_t first = 0; first < size; first += block, ++out) {
        const int64_t last = std::min(size, first + block);
        *out = largest_of(row + first, last - first);
    }
}

// -inf where a bit is not set: those of `bits` from number `offset` on, the lowest of a word first. Most words of a
// grammar's mask allow all or nothing, so few numbers are compared.
inline void mask_row(float* row, int64_t size, const uint32_t* bits, int64_t offset) {
    const vf lowest = splat(-INFINITY);
    vu lane_bits;
    for (int i = 0; i < 16; ++i) lane_bits[i] = 1u << i;

    for (int64_t first = 0; first < size; first += 16) {
        const int64_t count = std::min<int64_t>(16, size - first);
        const int64_t bit = offset + first;
        const uint32_t* word = bits + bit / 32;
        const int shift = static_cast<int>(bit % 32);
        uint32_t allowed = word[0] >> shift;
        if (shift + count > 32) allowed |= word[1] << (32 - shift);

        allowed &= 0xffff;
        if (allowed == 0xffff) continue;
        const vf kept = (splat(allowed) & lane_bits) != 0 ? load_up_to(row + first, count) : lowest;
        store_up_to(row + first, kept, count);
    }
}

// The sums of `size` numbers, a multiple of 128, added to 8 others. Each of kStreams equal parts is fetched so many
// bytes ahead of what is added; 0 leaves that to the processor.
template <int kStreams, int kBytesAhead>
INLINE void add_all(const float* from, int64_t size, vf* sums) {
    constexpr int kLines = 8 / kStreams;  // of a stream, one after another
    const int64_t part = size / kStreams;
    for (int64_t i = 0; i < part; i += 16 * kLines) {
        for (int j = 0; j < 8; ++j) {
            const float* line = from + j / kLines * part + i + j % kLines * 16;
            if (kBytesAhead) __builtin_prefetch(line + kBytesAhead / 4, 0, 3);
            sums[j] += load(line);
        }
    }
}

// The sum of `size` numbers, a multiple of 128, so many times over.
inline float sum_all(const float* from, int64_t size, int64_t times, ReadPattern pattern) {
    vf sums[8] = {};
    for (int64_t i = 0; i < times; ++i) {
        switch (pattern) {
            case ReadPattern::kOneStream:
                add_all<1, 0>(from, size, sums);
                break;
            case ReadPattern::kOneStreamPrefetched:
                add_all<1, 32768>(from, size, sums);
                break;
            case ReadPattern::kFourStreams:
                add_all<4, 4096>(from, size, sums);
                break;
        }
        asm volatile("" : : : "memory");  // each time it is read again
    }
    vf sum{};
    for (auto& part : sums) sum += part;
    return sum_of(sum);
}

// As many times 24 multiply-adds of vectors of bfloat16 words; nothing but registers is used.
inline float multiply_adds(int64_t steps) {
    vf sums[12] = {};
    for (int j = 0; j < 12; ++j) sums[j] = splat(static_cast<float>(j));
    vu x = splat(uint32_t{0x3f803f80}), w = splat(uint32_t{0x38803880});
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 24
        for (int j = 0; j < 12 * kSteps<bf16>; ++j) sums[j % 12] = multiply_add<bf16>(sums[j % 12], x, w);
        asm volatile("" : "+r"(i));
    }
    vf sum{};
    for (auto& part : sums) sum += part;
    return sum_of(sum);
}
