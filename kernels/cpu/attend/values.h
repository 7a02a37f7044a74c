// Sums of a tile's values, times their weights. Included inside an instruction set's namespace.
//
// It is the micro-kernel of gemm/multiply.h with another B: where a weight's panel is one run of words, the values of a
// tile stand in pieces, as blocks of the cache have them, and each piece has a panel for 16 of the dimensions.

// sums (R rows, 32 or 16 columns), each row multiplied by `shrink` or beginning anew without it, plus weights (R rows
// of kKeyTile) times values, which stand in pieces of 16 keys. Meanwhile it fetches the pieces `ahead`.
template <class T, int R>
INLINE void add_values(const uint32_t* weights, const char* const* pieces, const char* const* ahead, int64_t offset0,
                       int64_t offset1, int words, float* sums, int ld, const float* shrink) {
    constexpr int kPieceWords = 16 / kPerWord<T>;
    constexpr int kStride = kKeyTile / kPerWord<T> * kSteps<T>;
    const bool both = offset1 >= 0;
    Part c0[R * kParts], c1[R * kParts];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        set_sums(c0, r, shrink ? load(sums + r * ld) * shrink[r] : vf{});
        set_sums(c1, r, shrink && both ? load(sums + r * ld + 16) * shrink[r] : vf{});
    }

    const uint32_t* x = weights;
    if (offset1 < 0) offset1 = offset0;  // the second panel is the first again, and its sums are not stored
    for (int done = 0; done < words; done += kPieceWords, ++pieces, ++ahead) {
        const auto* v0 = reinterpret_cast<const uint32_t*>(*pieces + offset0);
        const auto* v1 = reinterpret_cast<const uint32_t*>(*pieces + offset1);
        int count = std::min(kPieceWords, words - done);
        for (int k = 0; k < count; ++k, x += kSteps<T>) {
            __builtin_prefetch(*ahead + offset0 + k * 64, 0, 2);
            __builtin_prefetch(*ahead + offset1 + k * 64, 0, 2);
            add_products<T, R>(c0, c1, v0 + k * 16, v1 + k * 16,
                               [&](int step, int r) { return x[r * kStride + step]; });
        }
    }

#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        store(sums + r * ld, sums_of(c0, r));
        if (both) store(sums + r * ld + 16, sums_of(c1, r));
    }
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
            if (k % 2 == 0) {  // a word of numbers has 32 bytes, a cache line two
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

    // The integers become floats by their row's scale, and join the sums so far.
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        float* to = sums + r * ld;
        const vf scale = splat(scales[r]);
        store(to, fused(to_floats(c0[r]), scale, shrink ? load(to) * shrink[r] : vf{}));
        if (both) store(to + 16, fused(to_floats(c1[r]), scale, shrink ? load(to + 16) * shrink[r] : vf{}));
    }
}
