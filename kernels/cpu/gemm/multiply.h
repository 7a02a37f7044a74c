// The micro-kernel, and linear layers made of it. Included inside an instruction set's namespace.
//
// A unit of work is R rows of x by two panels of the weight. All of its sums stay in registers, two vectors of 16
// columns for each row; a word of x is spread over a vector and meets the same word of the panels' columns:
//
//     c0[r] += splat(a[k][r]) * b0[k][0..15]        c1[r] += splat(a[k][r]) * b1[k][0..15]
//
//                        b0[k] (16 columns)   b1[k] (16 columns)
//     splat(a[k][0])     c0[0]                c1[0]
//     splat(a[k][1])     c0[1]                c1[1]               2 R sums, 2 words of B and 1 of x have to fit:
//     ...                ...                  ...                 kMaxRows is how many rows leave no sum in memory
//     splat(a[k][R-1])   c0[R-1]              c1[R-1]             (targets/ say so of each instruction set).
//
// Where a word of bfloat16 takes two steps, see kSteps, a has the floats of both, a[k][step][r].
//
// R is a template's argument, so that the compiler keeps the sums in registers: see with_rows().

// R rows of 32 columns, in registers, to or onto those of c.
template <int R>
INLINE void put_sums(const Part* c0, const Part* c1, float* c, int64_t ldc, bool add) {
    if (add) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            store(c + r * ldc, load(c + r * ldc) + sums_of(c0, r));
            store(c + r * ldc + 16, load(c + r * ldc + 16) + sums_of(c1, r));
        }
    } else {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            store(c + r * ldc, sums_of(c0, r));
            store(c + r * ldc + 16, sums_of(c1, r));
        }
    }
}

// C (R rows of ldc, 32 columns) = or += A B, for R packed rows of A and two panels of B of `words` each. The product is
// summed up by itself first: a sum of sums is more precise than one long sum. It is scaled by column where there are
// scales. Meanwhile what Lines pointers of `ahead` show is fetched, as much as the panels have.
template <class T, int R, int Lines>
INLINE void multiply_rows(const uint32_t* a, const uint32_t* b0, const uint32_t* b1, int64_t words, float* c,
                          int64_t ldc, bool add, const bf16* const* scales, const char* const* ahead) {
    Part c0[R * kParts], c1[R * kParts];
#pragma GCC unroll 16
    for (int i = 0; i < R * kParts; ++i) c0[i] = c1[i] = Part{};
    for (int64_t k = 0; k < words; ++k) {
        if constexpr (Lines > 0) __builtin_prefetch(ahead[0] + k * 64, 0, 2);
        if constexpr (Lines > 1) __builtin_prefetch(ahead[1] + k * 64, 0, 2);
        add_products<T, R>(c0, c1, b0 + k * 16, b1 + k * 16,
                           [&](int step, int r) { return a[(k * kSteps<T> + step) * R + r]; });
    }
    if (!scales) return put_sums<R>(c0, c1, c, ldc, add);
    const vf s0 = load_as_float(scales[0]), s1 = load_as_float(scales[1]);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        float* to = c + r * ldc;
        store(to, fused(sums_of(c0, r), s0, add ? load(to) : vf{}));
        store(to + 16, fused(sums_of(c1, r), s1, add ? load(to + 16) : vf{}));
    }
}

// multiply_rows() with the number of `lines` known at run time, by a function of its own for each R.
template <class T, int R>
__attribute__((noinline)) void multiply_packed(const uint32_t* a, const uint32_t* b0, const uint32_t* b1, int64_t words,
                                               float* c, int64_t ldc, bool add, const bf16* const* scales,
                                               const char* const* ahead, int lines) {
    if (lines == 2) {
        multiply_rows<T, R, 2>(a, b0, b1, words, c, ldc, add, scales, ahead);
    } else if (lines == 1) {
        multiply_rows<T, R, 1>(a, b0, b1, words, c, ldc, add, scales, ahead);
    } else {
        multiply_rows<T, R, 0>(a, b0, b1, words, c, ldc, add, scales, ahead);
    }
}

// Calls f(std::integral_constant<int, rows>) for rows in 1..kMaxRows.
template <int R = kMaxRows, class F>
INLINE void with_rows(int rows, F&& f) {
    if constexpr (R > 1) {
        if (rows != R) return with_rows<R - 1>(rows, f);
    }
    f(std::integral_constant<int, R>{});
}

template <class T>
using Multiply = void (*)(const uint32_t*, const uint32_t*, const uint32_t*, int64_t, float*, int64_t, bool,
                          const bf16* const*, const char* const*, int);

template <class T, int... I>
constexpr std::array<Multiply<T>, sizeof...(I)> multiply_table(std::integer_sequence<int, I...>) {
    return {{multiply_packed<T, I + 1>...}};
}

// multiply_packed() by rows - 1.
template <class T>
constexpr auto kMultiply = multiply_table<T>(std::make_integer_sequence<int, kMaxRows>{});

// Rows of words, interleaved: to[k * rows + r] = from[r][k].
INLINE void interleave(const uint32_t* const* from, int rows, int64_t words, uint32_t* to) {
    int64_t k = 0;
#if PHALANX_ISA_AVX512
    // Four rows of 16 words become 16 times four words: lane L of four[j] is of word 4 L + j. Of the last rows, which
    // may be fewer than four, too much is stored; the next word's and the rows before overwrite it, and the loop below.
    for (; k + 32 <= words; k += 16) {
        for (int first = (rows - 1) / 4 * 4; first >= 0; first -= 4) {
            __m512i v[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                v[i] = first + i < rows ? _mm512_loadu_si512(from[first + i] + k) : _mm512_setzero_si512();
            const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]);
            const __m512i c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
            const __m512i four[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c),
                                     _mm512_unpacklo_epi64(b, d), _mm512_unpackhi_epi64(b, d)};
#pragma GCC unroll 16
            for (int word = 0; word < 16; ++word)
                _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (k + word) * rows + first),
                                 reinterpret_cast<const __m128i*>(&four[word % 4])[word / 4]);
        }
    }
#endif
    for (; k < words; ++k)
        for (int r = 0; r < rows; ++r) to[k * rows + r] = from[r][k];
}

// The same as the micro-kernel reads them: to[(k * kSteps<T> + step) * rows + r].
template <class T>
INLINE void interleave_factors(const uint32_t* const* from, int rows, int64_t words, uint32_t* to) {
    if constexpr (kSteps<T> == 1) return interleave(from, rows, words, to);

    // The words stand in the second half of what they become, and none is overwritten before it has been read. Of a
    // vector of 16 the lanes from `rows` on are the next word's: what is stored of them is overwritten in turn.
    const uint32_t* half = to + words * rows;
    interleave(from, rows, words, to + words * rows);
    int64_t k = 0;
    for (; k + 16 <= words; ++k) {
        const vu both = load(half + k * rows);
        *reinterpret_cast<vu_any*>(to + 2 * k * rows) = factors_of<T, 0>(both);
        *reinterpret_cast<vu_any*>(to + (2 * k + 1) * rows) = factors_of<T, 1>(both);
    }
    for (; k < words; ++k) {
        for (int r = 0; r < rows; ++r) {
            const uint32_t both = half[k * rows + r];
            to[2 * k * rows + r] = both << 16;
            to[(2 * k + 1) * rows + r] = both & 0xffff0000u;
        }
    }
}

// Bytes of a packed row of x, as pack_x() makes it without tiles.
INLINE int64_t vector_row_bytes(const Linear& job) {
    const bool numbers = job.kind == WeightKind::kInt8 || job.kind == WeightKind::kW8A8;
    return int64_t{job.words} * 4 * (numbers || job.dtype == DType::kFloat32 ? 1 : kSteps<bf16>);
}

// Row block `row`, of `rows`, of packed x, from word k on.
template <class T>
INLINE const uint32_t* packed_at(const Linear& job, const PackedRows& x, int64_t row, int64_t k, int rows) {
    return x.words + (row * job.words + k * rows) * kSteps<T>;
}

// A row block of x, interleaved word by word: the micro-kernel reads it from the first byte to the last.
template <class T>
void pack_rows(const Linear& job, int block, uint32_t* to) {
    int first = block_start(job.m, job.row_blocks, block), last = block_start(job.m, job.row_blocks, block + 1);
    const uint32_t* rows[kMaxRows];
    for (int r = first; r < last; ++r)
        rows[r - first] = reinterpret_cast<const uint32_t*>(static_cast<const T*>(job.x) + r * job.ldx);
    interleave_factors<T>(rows, last - first, job.words, to + static_cast<int64_t>(first) * job.words * kSteps<T>);
}

// Whether what comes out is more than caches keep, as the logits of many rows are, and can go past them.
INLINE bool streams(const Linear& job) {
    constexpr int64_t kLeastBytes = 4 << 20;
    return job.output == Output::kStoreFloat && static_cast<int64_t>(job.m) * job.n * 4 >= kLeastBytes &&
           job.ldo % kPanel == 0 && reinterpret_cast<uintptr_t>(job.out) % 64 == 0;
}

// One row's 32 sums to where they belong; `unit` is the pair of panels they are of.
template <class T>
INLINE void finish_row(const Linear& job, int64_t row, int64_t unit, vf sum0, vf sum1) {
    const T* bias = static_cast<const T*>(job.bias);
    if (job.output == Output::kSiluMul) {
        int64_t half = job.n / 2, column = unit * kPanel, count = half - column;
        if (bias) {
            sum0 += load_up_to(bias + column, count);
            sum1 += load_up_to(bias + half + column, count);
        }
        store_up_to(element<T>(job.out, job.ldo, job.out_tiles, row, column), silu(sum0) * sum1, count);
        return;
    }

    for (int half = 0; half < 2; ++half) {
        int64_t column = (2 * unit + half) * kPanel, count = job.n - column;
        if (count <= 0) return;
        vf sum = half ? sum1 : sum0;
        if (bias) sum += load_up_to(bias + column, count);
        if (job.output == Output::kStore) {
            store_up_to(static_cast<T*>(job.out) + row * job.ldo + column, sum, count);
        } else {
            float* out = static_cast<float*>(job.out) + row * job.ldo + column;
            if (job.output == Output::kAddFloat) sum += load_up_to(out, count);
            streams(job) && count >= kPanel ? stream(out, sum) : store_up_to(out, sum, count);
        }
    }
}

// The two panels of a unit: neighbours, or of the two halves of a gated layer. The last may have no neighbour.
struct Panels {
    int64_t first, second;
};

INLINE Panels panels_of(const Linear& job, int64_t unit) {
    if (job.output == Output::kSiluMul) return {unit, unit + job.n_units};
    int64_t last = (job.n + kPanel - 1) / kPanel - 1;
    return {2 * unit, 2 * unit + 1 > last ? last : 2 * unit + 1};
}

// From a unit's panels to those of the next.
INLINE int64_t panels_step(const Linear& job) { return job.output == Output::kSiluMul ? 1 : 2; }

// What is fetched while a panel is multiplied: what stands so many bytes further on, or, past the panel's end, the
// beginning of the unit that comes next, whose panel stands elsewhere, so that the processor does not foresee it.
//
//     panel of this unit   [ ... multiplied | fetched ... ]          [ ... mult. ]
//                                 `near` bytes                        panel of the next unit  [ fetched | ... ]
//
// (Emerald Rapids, two threads, one row, GB/s of 33 that reading alone gives: weights of 12 bits and of 0.5 billion
// parameters 26 by 18 KiB, as by a whole unit; of 32 billion parameters, whose units leave the second cache, 28.5
// instead of 24.5. 3 KiB are too few, 24.)
struct FetchAhead {
    int64_t near, far, turn;

    // `bytes` of a panel are multiplied in order, and those of the next unit's begin `to_next` bytes further on.
    INLINE FetchAhead(int64_t bytes, int64_t to_next) {
        near = std::min(kBytesAhead, bytes);
        far = to_next + near - bytes;
        turn = bytes - near;
    }

    // How far on from byte `at` of a panel what is to be fetched stands.
    INLINE int64_t from(int64_t at) const { return at < turn ? near : far; }

    static constexpr int64_t kBytesAhead = 18 << 10;
};

// What one task of a linear layer computes.
struct Tile {
    int first_block, last_block;  // of x's rows
    int64_t first_row, rows;
    int64_t first_unit, last_unit;  // of the columns
};

INLINE Tile tile_of(const Linear& job, int task) {
    Tile t;
    int64_t column = task / job.m_tiles, row = task % job.m_tiles;
    t.first_block = block_start(job.row_blocks, job.m_tiles, row);
    t.last_block = block_start(job.row_blocks, job.m_tiles, row + 1);
    t.first_row = block_start(job.m, job.row_blocks, t.first_block);
    t.rows = block_start(job.m, job.row_blocks, t.last_block) - t.first_row;
    t.first_unit = column * job.units_per_task;
    t.last_unit = std::min<int64_t>(job.n_units, t.first_unit + job.units_per_task);
    return t;
}
