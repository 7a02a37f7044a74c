// int8 weights of many rows: numbers times scales as tiles of bfloat16. Included inside an instruction set's namespace.
//
// Groups of 32 numbers that are multiplied as integers (grouped.h) take two products and two stores of a tile each, and
// their sums go through vectors: a quarter of the tiles' rate. Here a number times its scale, rounded to bfloat16, is
// the weight, as look_up_int8() has it. A group of a panel is one B tile; it is made in the first cache, and serves all
// row blocks. x is bfloat16 as it came. The panels are the same ones.
//
// A number becomes a float by no conversion: n + 128 in the second byte of a float of 32768 is 32896 + n, of which
// fused() takes 32896 times the scale. A scale has 8 significant bits, so both products are exact.

// Bits of a float that bfloat16 leaves away round the rest up from their half on.
constexpr uint32_t kHalfOfBfloat16 = 0x8000;

// Two floats, rounded to bfloat16, ties away from zero, as a word.
INLINE vu join_rounded(vf low, vf high) {
    const vu first = float_to_bits(low) + kHalfOfBfloat16, second = float_to_bits(high) + kHalfOfBfloat16;
#if PHALANX_ISA_AVX512
    // The upper half of `first` over the lower one of `second`, by one shuffle.
    const __m512i from = _mm512_set4_epi32(0x0f0e, 0x0b0a, 0x0706, 0x0302);
    return reinterpret_cast<vu>(_mm512_mask_shuffle_epi8(reinterpret_cast<__m512i>(second), 0x3333333333333333ull,
                                                         reinterpret_cast<__m512i>(first), from));
#else
    return first >> 16 | (second & 0xffff0000u);
#endif
}

// The I-th number of each word, times its column's scale. `offset` is -32896 scales; `words` are of numbers plus 128.
template <int I>
INLINE vf number_times_scale(vu words, vf scale, vf offset) {
#if PHALANX_ISA_AVX512
    const __m512i base = _mm512_set1_epi32(0x47000000);
    __m512i number;
    if constexpr (I == 1) {  // where it stands already
        number = _mm512_or_si512(_mm512_and_si512(reinterpret_cast<__m512i>(words), _mm512_set1_epi32(0xff00)), base);
    } else {
        const __m512i from = _mm512_set4_epi32((12 + I) << 8, (8 + I) << 8, (4 + I) << 8, I << 8);
        number = _mm512_mask_shuffle_epi8(base, 0x2222222222222222ull, reinterpret_cast<__m512i>(words), from);
    }
    return fused(reinterpret_cast<vf>(number), scale, offset);
#else
    return to_floats(reinterpret_cast<vi>(words >> (8 * I) & 255) - 128) * scale;
#endif
}

struct Int8Panels {
    static constexpr bool kExpands = true;
    static constexpr int64_t kWordBytes = 2 * kPanel;  // of a word of two numbers

    static INLINE int64_t offset(const Linear&, int64_t k) { return k * kWordBytes; }
    static INLINE int64_t panel_bytes(const Linear& job) { return job.words * kWordBytes; }

    // k begins a group. Meanwhile it fetches what stands at `next`, and the scales that belong to it.
    static INLINE const char* tiles(const Linear& job, const char* panel, int64_t k, int64_t words, char* room,
                                    const char* next) {
        constexpr int64_t kScaleBytes = kPanel * sizeof(bf16), kGroupBytes = kTileWords * kWordBytes;
        const char *weight = static_cast<const char*>(job.weight), *from = panel + offset(job, k),
                   *scales = reinterpret_cast<const char*>(job.scales);
        const int64_t number = (panel - weight) / panel_bytes(job);
        const char* next_scales = next ? scales + (next - weight) / kGroupBytes * kScaleBytes : nullptr;
        scales += (number * job.groups + k / kTileWords) * kScaleBytes;
        for (int64_t done = 0; done < words; done += kTileWords, scales += kScaleBytes, from += kGroupBytes) {
            if (next) {
                for (int line = 0; line < kGroupBytes; line += 64) __builtin_prefetch(next + line, 0, 2);
                __builtin_prefetch(next_scales, 0, 2);
                next += kGroupBytes;
                next_scales += kScaleBytes;
            }
            const vf scale = load_as_float(reinterpret_cast<const bf16*>(scales));
            expand_group(from, scale, std::min<int64_t>(kTileWords, words - done), room + done * kPanel * 4);
        }
        zero_past(room, words * kPanel * 4, ceil_div(words, kTileWords) * kTileBytes);
        return room;
    }

    static INLINE void expand_group(const char* from, vf scale, int64_t words, char* room) {
        const vf offset = scale * -32896.0f;
        if (words == kTileWords) {
            for (int k = 0; k < kTileWords; k += 2, from += 64, room += 128) expand_words(from, scale, offset, room);
        } else {
            for (int64_t k = 0; k < words; k += 2, from += 64, room += 128) expand_words(from, scale, offset, room);
        }
    }

    // Four numbers of a column stand side by side: two words of bfloat16.
    static INLINE void expand_words(const char* from, vf scale, vf offset, char* to) {
        const vu words = *reinterpret_cast<const vu_any*>(from) ^ 0x80808080u;
        const vf first = number_times_scale<0>(words, scale, offset),
                 second = number_times_scale<1>(words, scale, offset);
        const vf third = number_times_scale<2>(words, scale, offset),
                 fourth = number_times_scale<3>(words, scale, offset);
        *reinterpret_cast<vu_any*>(to) = join_rounded(first, second);
        *reinterpret_cast<vu_any*>(to + 64) = join_rounded(third, fourth);
    }
};
