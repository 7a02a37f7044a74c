// Weights of 8 and 4 bits. Included inside an instruction set's namespace.
//
// kInt4: a word of a panel holds 8 numbers n + 8 of one column; those of its low half are the first numbers of four
// words of bfloat16, those of its high half the second. They become bfloat16 exactly; the scale of a group is applied
// to its sums, in float.
//
//     bits     31..28  27..24  23..20  19..16 | 15..12  11..8  7..4   3..0
//     element  k + 7   k + 5   k + 3   k + 1  | k + 6   k + 4  k + 2  k
//
// kInt8 (and, four by four, kW8A8):
//
//     bytes     0, 1           2, 3           ...   30, 31          32, 33
//     are of    column 0,      column 1,            column 15,      column 0,
//               k and k + 1    k and k + 1          k and k + 1     k + 2 and k + 3
//
// kInt8: two numbers of a column stand together, and are multiplied with x rounded to 16 bits, a scale for each row:
// finer than bfloat16 where x is large, and far finer than the weight. The sums of a group (at most 512 elements, or
// they would leave 32 bits) are integers, and exact. (One scale for a whole row was tried and lost: 96 % of the
// likeliest tokens stay then, not 98 %.)
//
// kW8A8: four numbers of a column stand together, and x has 8 bits as well; the whole column is one group. x is stored
// plus 128, since the instruction multiplies unsigned numbers with signed ones; linear_task_of_numbers() takes that
// out.

INLINE vf to_floats(vi v) { return __builtin_convertvector(v, vf); }

// Two words of bfloat16, of floats that are bfloat16 already.
INLINE vu join(vf low, vf high) { return float_to_bits(low) >> 16 | (float_to_bits(high) & 0xffff0000u); }

// The j-th of the four words of bfloat16 that a vector of words of 4-bit numbers stands for.
struct Nibbles {
#if PHALANX_ISA_AVX512
    __m512i table;

    INLINE Nibbles() {
        alignas(64) bf16 numbers[32];  // twice: the lookup takes five bits, of which only four are the number's
        for (int i = 0; i < 32; ++i) numbers[i] = to_bf16(static_cast<float>(i % 16 - 8));
        table = _mm512_load_si512(numbers);
    }

    INLINE vu operator()(vu v, int j) const {
        return reinterpret_cast<vu>(
            _mm512_permutexvar_epi16(_mm512_srli_epi16(reinterpret_cast<__m512i>(v), 4 * j), table));
    }
#else
    INLINE vu operator()(vu v, int j) const {
        vi bits = reinterpret_cast<vi>(v >> (4 * j));
        return join(to_floats((bits & 15) - 8), to_floats((bits >> 16 & 15) - 8));
    }
#endif
};

// Meanwhile it fetches what stands `ahead` bytes further on.
INLINE void decode(const uint32_t* from, int64_t words, int64_t ahead, uint32_t* to) {
    const Nibbles nibbles;
    for (int64_t k = 0; k < words; k += 4, from += 16, to += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead, 0, 2);
        for (int j = 0; j < 4; ++j) *reinterpret_cast<vu_any*>(to + 16 * j) = nibbles(load(from), j);
    }
}

// The scales of a panel's 16 columns, for the group that begins at word k.
INLINE const bf16* scales_of(const Linear& job, int64_t panel, int64_t k) {
    return job.scales + (panel * job.groups + k / job.word_block) * kPanel;
}

// As multiply_rows, of a whole row of panels of 4 bits: for few rows, which leave no time to store what is decoded.
template <int R>
INLINE void multiply_nibbles(const Linear& job, const uint32_t* a, const uint32_t* b0, const uint32_t* b1,
                             const bf16* s0, const bf16* s1, const FetchAhead& ahead, float* c) {
    const Nibbles nibbles;
    vf t0[R], t1[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) t0[r] = t1[r] = vf{};
    for (int64_t first = 0; first < job.words; first += job.word_block, s0 += kPanel, s1 += kPanel) {
        // A group's sums by themselves; then they join the total, times the group's scales.
        const int64_t last = std::min<int64_t>(job.words, first + job.word_block);
        Part c0[R * kParts], c1[R * kParts];
#pragma GCC unroll 16
        for (int i = 0; i < R * kParts; ++i) c0[i] = c1[i] = Part{};
        const int64_t further = ahead.from(first / 4 * kPanel * 4);
        for (int64_t k = first; k < last; k += 4, b0 += kPanel, b1 += kPanel) {
            const vu v0 = load(b0), v1 = load(b1);
            __builtin_prefetch(reinterpret_cast<const char*>(b0) + further, 0, 2);
            __builtin_prefetch(reinterpret_cast<const char*>(b1) + further, 0, 2);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const vu w0 = nibbles(v0, j), w1 = nibbles(v1, j);
                const uint32_t* x = a + (k + j) * R * kSteps<bf16>;
                add_products<bf16, R>(c0, c1, words_in(w0), words_in(w1),
                                      [&](int step, int r) { return x[step * R + r]; });
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            t0[r] = fused(sums_of(c0, r), load_as_float(s0), t0[r]);
            t1[r] = fused(sums_of(c1, r), load_as_float(s1), t1[r]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        store(c + r * 32, t0[r]);
        store(c + r * 32 + 16, t1[r]);
    }
}

// The scale of `count` numbers that are rounded to -limit - 1..limit: of `steps` from the largest one's to 1 + span
// times that, each rounded to bfloat16, the one with the least squared error. A few numbers of few bits gain by a lower
// one, which cuts off the largest; of a few that have many bits, a higher one happens to leave a fifth less. It is 1
// where a float has no inverse of it: all numbers are 0 then.
inline bf16 choose_scale(const bf16* from, int64_t count, float limit, float span, int steps) {
    vf most{};
    for (int64_t i = 0; i < count; i += 16) {
        vf v = load_up_to(from + i, count - i);
        most = larger(most, larger(v, -v));
    }
    const float first = max_of(most) / limit;
    if (!(first * std::min(1.0f, 1.0f + span) >= std::numeric_limits<float>::min())) return to_bf16(1.0f);

    bf16 best = to_bf16(first), tried{};
    float least = std::numeric_limits<float>::infinity();
    for (int step = 0; steps > 1 && step < steps; ++step) {
        const bf16 next = to_bf16(first * (1.0f + span * step / steps));
        if (step > 0 && next.bits == tried.bits) continue;
        tried = next;
        const float scale = to_float(tried), inverse = 1.0f / scale;
        vf errors{};
        for (int64_t i = 0; i < count; i += 16) {
            vf v = load_up_to(from + i, count - i);
            vf number = v * inverse + kRounder - kRounder;
            number = number > limit ? splat(limit) : number < -limit - 1 ? splat(-limit - 1) : number;
            vf error = v - number * scale;
            errors += error * error;
        }
        if (float error = sum_of(errors); error < least) {
            least = error;
            best = tried;
        }
    }
    return best;
}

// The scale of `count` elements that become numbers of `most` at most, their largest one's; NaN if one is not finite:
// no number says so. Its inverse goes to `inverse`.
template <class T>
INLINE float scale_of(const T* x, int64_t count, int most, float* inverse) {
    vf high{}, nothing{};
    for (int64_t k = 0; k < count; k += 16) {
        vf v = load_up_to(x + k, count - k);
        high = larger(high, larger(v, -v));
        nothing += v - v;  // NaN if v is infinite or NaN, else 0
    }
    const float largest = max_of(high), scale = largest > 0 ? largest / most : 1.0f;
    *inverse = 1.0f / scale;
    return scale + sum_of(nothing);
}

// A row as numbers of 16 bits; returns its scale.
template <class T>
INLINE float to_shorts(const T* x, int64_t count, int16_t* to) {
    typedef int16_t vn __attribute__((vector_size(32)));
    float inverse;
    const float scale = scale_of(x, count, 32767, &inverse);
    for (int64_t k = 0; k < count; k += 16) {
        const vi rounded = __builtin_convertvector(load_as_float(x + k) * inverse + kRounder - kRounder, vi);
        const vn numbers = __builtin_convertvector(rounded, vn);
        std::memcpy(to + k, &numbers, sizeof(numbers));
    }
    return scale;
}

// x as numbers of `Number` plus `Offset`, those of a word side by side; each row has a scale of its own.
template <class T, class Number, int Most, int Offset>
void pack_numbers(const Linear& job, int block, uint32_t* to, float* scales) {
    constexpr int kNumbers = 4 / sizeof(Number);
    int first = block_start(job.m, job.row_blocks, block), last = block_start(job.m, job.row_blocks, block + 1);
    int rows = last - first;
    Number* numbers = reinterpret_cast<Number*>(to + static_cast<int64_t>(first) * job.words);
    for (int r = 0; r < rows; ++r) {
        const T* x = static_cast<const T*>(job.x) + (first + r) * job.ldx;
        float inverse;
        scales[first + r] = scale_of(x, job.k, Most, &inverse);
        for (int64_t k = 0; k < job.k; k += 16) {
            vf v = load_up_to(x + k, job.k - k) * inverse + kRounder - kRounder;
            vi rounded = __builtin_convertvector(v, vi) + Offset;
            // One row needs no interleaving: sixteen numbers are stored at once.
            if (rows == 1 && k + 16 <= job.k) {
                typedef Number vn __attribute__((vector_size(16 * sizeof(Number))));
                vn narrowed = __builtin_convertvector(rounded, vn);
                std::memcpy(numbers + k, &narrowed, sizeof(narrowed));
                continue;
            }
            alignas(64) int32_t lanes[16];
            *reinterpret_cast<vi*>(lanes) = rounded;
            for (int64_t i = 0; i < std::min<int64_t>(16, job.k - k); ++i)
                numbers[((k + i) / kNumbers * rows + r) * kNumbers + (k + i) % kNumbers] =
                    static_cast<Number>(lanes[i]);
        }
    }
}

// What is multiplied in one word: 16-bit numbers of x and 8-bit ones of a weight, two of each; or 8-bit ones, four.
struct Shorts {
    static constexpr int kWeightBytes = 32;  // for a word of 16 columns

    static INLINE vu load_weight(const char* from) {
#if PHALANX_ISA_AVX512
        return reinterpret_cast<vu>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#else
        vh pairs = *reinterpret_cast<const vh_any*>(from);
        vi both = reinterpret_cast<vi>(__builtin_convertvector(pairs, vu));
        return reinterpret_cast<vu>((both << 24 >> 24) & 0xffff) | reinterpret_cast<vu>(both << 16 >> 24 << 16);
#endif
    }

    static INLINE vi multiply_add(vi sum, vu x, vu w) {
#if PHALANX_ISA_VNNI
        return reinterpret_cast<vi>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(x),
                                                        reinterpret_cast<__m512i>(w)));
#else
        vi a = reinterpret_cast<vi>(x), b = reinterpret_cast<vi>(w);
        return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
    }
};

struct Bytes {
    static constexpr int kWeightBytes = 64;

    static INLINE vu load_weight(const char* from) { return *reinterpret_cast<const vu_any*>(from); }

    static INLINE vi multiply_add(vi sum, vu x, vu w) {
#if PHALANX_ISA_VNNI
        return reinterpret_cast<vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(x),
                                                        reinterpret_cast<__m512i>(w)));
#else
        for (int shift = 0; shift < 32; shift += 8)
            sum += reinterpret_cast<vi>((x >> shift) & 255) * (reinterpret_cast<vi>(w) << (24 - shift) >> 24);
        return sum;
#endif
    }
};

// As multiply_rows, of one group of numbers: its sums become floats by the columns' scales. Meanwhile what stands at
// next0 and next1 is fetched, as much as is multiplied; null fetches nothing.
template <class N, int R, class Scale>
INLINE void multiply_group(const uint32_t* a, const char* b0, const char* b1, int64_t words, const Scale* s0,
                           const Scale* s1, float* c, int64_t ldc, bool add, const char* next0, const char* next1) {
    vi c0[R], c1[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) c0[r] = c1[r] = vi{};
    for (int64_t k = 0; k < words; ++k) {
        const int64_t at = k * N::kWeightBytes;
        const vu w0 = N::load_weight(b0 + at), w1 = N::load_weight(b1 + at);
        if (next0 && at % 64 == 0) {
            __builtin_prefetch(next0 + at, 0, 2);
            __builtin_prefetch(next1 + at, 0, 2);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const vu x = splat(a[k * R + r]);
            c0[r] = N::multiply_add(c0[r], x, w0);
            c1[r] = N::multiply_add(c1[r], x, w1);
        }
    }
    const vf scale0 = load_as_float(s0), scale1 = load_as_float(s1);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        float* to = c + r * ldc;
        store(to, fused(to_floats(c0[r]), scale0, add ? load(to) : vf{}));
        store(to + 16, fused(to_floats(c1[r]), scale1, add ? load(to + 16) : vf{}));
    }
}

// All groups of two panels. With `fetches` it fetches what `ahead` says meanwhile.
template <class N, int R>
__attribute__((noinline)) void multiply_numbers(const Linear& job, const uint32_t* a, const char* b0, const char* b1,
                                                const bf16* s0, const bf16* s1, const FetchAhead& ahead, bool fetches,
                                                float* c) {
    for (int64_t first = 0; first < job.words; first += job.word_block, s0 += kPanel, s1 += kPanel) {
        const int64_t words = std::min<int64_t>(job.word_block, job.words - first);
        const char *w0 = b0 + first * N::kWeightBytes, *w1 = b1 + first * N::kWeightBytes;
        const int64_t further = ahead.from(first * N::kWeightBytes);
        multiply_group<N, R>(a + first * R, w0, w1, words, s0, s1, c, 32, first > 0, fetches ? w0 + further : nullptr,
                             fetches ? w1 + further : nullptr);
    }
}
