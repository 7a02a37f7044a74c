// A bfloat16 weight in 12 bits a number, of which nothing is lost. Included inside an instruction set's namespace.
//
// The upper bytes of a trained model's numbers (sign and most of the exponent) are few: of a group, 64 words of a
// panel, hardly ever more than 16. So a group has a table of them, and each number an index into it, of 4 bits; its
// lower byte stands as it is. A panel is the tables of its groups, 16 bytes each, and for each four words 64 bytes of
// indices and twice 64 lower bytes:
//
//     [table of group 0][table of group 1] ... to whole cache lines
//     [64 bytes: indices of words 0, 1 low, of words 2, 3 high][64 lower bytes of words 0, 1][64 of words 2, 3] ...
//
//     a bfloat16         [s eeeeeee][e mmmmmmm]      becomes   4 bits, its index in the group's table of upper bytes,
//                         upper byte  lower byte               and the lower byte: 12 bits instead of 16
//
// Within 64 bytes, lanes of 16 bytes alternate between the two words, 8 bytes each, so that unpacking indices and lower
// bytes within lanes, which is what the instruction does, leaves each word in its order:
//
//     bytes     0..7          8..15         16..23        24..31        ...
//     are of    word 0,       word 1,       word 0,       word 1,
//               columns 0-3   columns 0-3   columns 4-7   columns 4-7   (two numbers a column)
//
// A group with more than 16 upper bytes stands apart, uncompressed; its table holds its number there. (That exponents
// carry so little is DFloat11's observation, arXiv:2504.11651. Codes of different lengths, as it has them, were not
// taken: those of one length are what a vector can look up.)

// The vectors of words 2 J and 2 J + 1 of the four that 192 bytes stand for.
struct Expander {
#if PHALANX_ISA_AVX512
    __m512i table, mask;

    INLINE explicit Expander(const uint8_t* group)
        : table(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(group)))),
          mask(_mm512_set1_epi8(15)) {}

    template <int J>
    INLINE void operator()(const uint8_t* quad, vu& first, vu& second) const {
        // Indices into the table: those of words 0 and 1 in the low four bits, those of 2 and 3 in the high.
        __m512i indices = _mm512_loadu_si512(quad), lower = _mm512_loadu_si512(quad + 64 * (1 + J));
        if (J) indices = _mm512_srli_epi16(indices, 4);
        const __m512i upper = _mm512_shuffle_epi8(table, _mm512_and_si512(indices, mask));
        first = reinterpret_cast<vu>(_mm512_unpacklo_epi8(lower, upper));
        second = reinterpret_cast<vu>(_mm512_unpackhi_epi8(lower, upper));
    }
#else
    const uint8_t* table;

    INLINE explicit Expander(const uint8_t* group) : table(group) {}

    template <int J>
    INLINE void operator()(const uint8_t* quad, vu& first, vu& second) const {
        uint16_t numbers[64];
        for (int i = 0; i < 64; ++i) {
            const int upper = table[quad[i] >> (4 * J) & 15];
            numbers[i % 16 / 8 * 32 + i / 16 * 8 + i % 8] = static_cast<uint16_t>(quad[64 * (1 + J) + i] | upper << 8);
        }
        first = load(reinterpret_cast<const uint32_t*>(numbers));
        second = load(reinterpret_cast<const uint32_t*>(numbers + 32));
    }
#endif
};

// The words of a group, `words` of them. Meanwhile it fetches as many bytes at `next`, if it is not null.
inline void expand_group(const uint8_t* table, const uint8_t* quad, const uint32_t* apart, int64_t words, uint32_t* to,
                         const char* next = nullptr) {
    if (stands_apart(table)) {
        std::memcpy(to, words_apart(table, apart), words * kPanel * 4);
        return;
    }
    const Expander expand(table);
    for (int64_t k = 0; k < words; k += 4, quad += kQuadBytes, to += 4 * kPanel) {
        if (next) {
            for (int line = 0; line < kQuadBytes; line += 64) __builtin_prefetch(next + line, 0, 2);
            next += kQuadBytes;
        }
        vu w[4];
        expand.template operator()<0>(quad, w[0], w[1]);
        expand.template operator()<1>(quad, w[2], w[3]);
        for (int i = 0; i < 4; ++i) *reinterpret_cast<vu_any*>(to + i * kPanel) = w[i];
    }
}

// As multiply_rows, of two compressed panels: their tables and four-word pieces, from a whole group on, of which none
// stands apart. Expanding hides behind the products, so every row block does it anew. The pieces begin at byte `at` of
// those of their panels; what `ahead` says is fetched meanwhile, of the panels for which `fetch0` and `fetch1` ask.
template <int R>
__attribute__((noinline)) void multiply_compressed(const uint32_t* a, const uint8_t* const* tables,
                                                   const uint8_t* const* quads, int64_t words, float* c, bool add,
                                                   const FetchAhead& ahead, int64_t at, bool fetch0, bool fetch1) {
    Part c0[R * kParts], c1[R * kParts];
#pragma GCC unroll 16
    for (int i = 0; i < R * kParts; ++i) c0[i] = c1[i] = Part{};
    const uint8_t *t0 = tables[0], *t1 = tables[1], *q0 = quads[0], *q1 = quads[1];
    while (words > 0) {
        const Expander expand0(t0), expand1(t1);
        const auto pair = [&](auto J) __attribute__((always_inline)) {
            vu w0[2], w1[2];
            expand0.template operator()<J>(q0, w0[0], w0[1]);
            expand1.template operator()<J>(q1, w1[0], w1[1]);
            for (int i = 0; i < 2; ++i) {
                const uint32_t* x = a + (2 * J + i) * R * kSteps<bf16>;
                add_products<bf16, R>(c0, c1, words_in(w0[i]), words_in(w1[i]),
                                      [&](int step, int r) { return x[step * R + r]; });
            }
        };

        const int64_t count = words < kGroupWords ? words : kGroupWords, further = ahead.from(at);
        for (int64_t k = 0; k < count; k += 4) {
            for (int line = 0; fetch0 && line < kQuadBytes; line += 64) __builtin_prefetch(q0 + further + line, 0, 2);
            for (int line = 0; fetch1 && line < kQuadBytes; line += 64) __builtin_prefetch(q1 + further + line, 0, 2);
            pair(std::integral_constant<int, 0>{});
            pair(std::integral_constant<int, 1>{});
            a += 4 * R * kSteps<bf16>;
            q0 += kQuadBytes;
            q1 += kQuadBytes;
        }

        words -= count;
        at += count / 4 * kQuadBytes;
        t0 += kTableBytes;
        t1 += kTableBytes;
    }
    put_sums<R>(c0, c1, c, 32, add);
}

// A group of a packed panel to its table and its pieces, or, with too many upper bytes, to index `number` of `apart`.
// Without a `table` nothing is written. Returns whether the group stands apart.
inline bool compress_group(const uint32_t* words, int64_t count, uint8_t* table, uint8_t* quad, uint32_t* apart,
                           uint32_t number) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(words);
    bool seen[256] = {};
    for (int64_t i = 0; i < count * kPanel * 2; ++i) seen[bytes[2 * i + 1]] = true;

    // Of each upper byte its index in the table, and the table, in ascending order.
    uint8_t index_of[256], found[256];
    int different = 0;
    for (int i = 0; i < 256; ++i) {
        found[different] = static_cast<uint8_t>(i);
        index_of[i] = static_cast<uint8_t>(different);
        different += seen[i];
    }
    const bool apart_too = different > kTableBytes;
    if (table == nullptr) return apart_too;

    if (apart_too) {
        // A first byte above the second is what stands_apart() looks for; the number is behind it.
        std::memset(table, 0, kTableBytes);
        table[0] = 1;
        std::memcpy(table + 4, &number, sizeof(number));
        std::memset(quad, 0, count / 4 * kQuadBytes);
        std::memcpy(apart + static_cast<int64_t>(number) * kGroupWords * kPanel, words, count * kPanel * 4);
        return true;
    }

    // A shorter table repeats its last byte, which keeps it in order.
    for (int i = 0; i < kTableBytes; ++i) table[i] = found[std::min(i, different - 1)];
    for (int64_t k = 0; k < count; k += 4, bytes += 256, quad += kQuadBytes) {
        for (int i = 0; i < 64; ++i) {
            // Of two words the 16-byte lanes alternate: the lower half is of the first, the upper half of the second.
            const uint8_t *first = bytes + 2 * (i % 16 / 8 * 32 + i / 16 * 8 + i % 8), *second = first + 128;
            quad[i] = static_cast<uint8_t>(index_of[first[1]] | index_of[second[1]] << 4);
            quad[64 + i] = first[0];
            quad[128 + i] = second[0];
        }
    }
    return false;
}

// A panel to `to`, its groups that stand apart to `apart` from index `number` on. Returns how many these are; they are
// only counted if there is no `to`.
inline int64_t compress(const uint32_t* panel, int64_t words, uint8_t* to, uint32_t* apart, int64_t number) {
    int64_t found = 0;
    for (int64_t k = 0; k < words; k += kGroupWords) {
        uint8_t* table = to ? to + k / kGroupWords * kTableBytes : nullptr;
        uint8_t* quad = to ? to + tables_bytes(words) + k / 4 * kQuadBytes : nullptr;
        found += compress_group(panel + k * kPanel, std::min<int64_t>(kGroupWords, words - k), table, quad, apart,
                                static_cast<uint32_t>(number + found));
    }
    return found;
}
