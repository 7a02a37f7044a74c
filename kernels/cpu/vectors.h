// Vectors of 16 lanes in the compiler's own notation; the instruction set of the including file decides what they
// become. Included inside that file's namespace, after PHALANX_ISA_* says what there is.

// v: vector; f, u, i, h: float, uint32, int32, uint16. Those of `_any` may stand at any address of their elements.
typedef float vf __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2), may_alias));

#define INLINE inline __attribute__((always_inline))

INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
// The words of a vector, for what reads them from memory; of one in a register the compiler makes no copy there.
INLINE const uint32_t* words_in(const vu& v) { return reinterpret_cast<const uint32_t*>(&v); }
INLINE vu load(const uint32_t* p) { return *reinterpret_cast<const vu_any*>(p); }
INLINE void store(float* p, vf v) { *reinterpret_cast<vf_any*>(p) = v; }
// Past the caches to memory, `p` aligned to 64; other threads see it after fence().
INLINE void stream(float* p, vf v) {
#if PHALANX_ISA_AVX512
    _mm512_stream_ps(p, reinterpret_cast<__m512>(v));
#else
    store(p, v);
#endif
}
INLINE void fence() {
#if PHALANX_ISA_AVX512
    _mm_sfence();
#endif
}
// One number in all lanes.
INLINE vf splat(float x) { return x - vf{}; }
INLINE vu splat(uint32_t x) { return x - vu{}; }

INLINE vf bits_to_float(vu v) { return reinterpret_cast<vf>(v); }
INLINE vu float_to_bits(vf v) { return reinterpret_cast<vu>(v); }

// bfloat16 to float: it is the upper half of one.
INLINE vf widen(vh v) { return bits_to_float(__builtin_convertvector(v, vu) << 16); }

// Rounded to nearest, ties to even; a NaN stays one.
INLINE vh narrow(vf v) {
#if PHALANX_ISA_BF16
    return reinterpret_cast<vh>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
    vu bits = float_to_bits(v);
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(v == v ? rounded : splat(uint32_t{0x7fc0}), vh);
#endif
}

INLINE vf load_as_float(const bf16* p) { return widen(*reinterpret_cast<const vh_any*>(p)); }
INLINE vf load_as_float(const float* p) { return load(p); }
INLINE void store_as(bf16* p, vf v) { *reinterpret_cast<vh_any*>(p) = narrow(v); }
INLINE void store_as(float* p, vf v) { store(p, v); }

// 32 numbers at once, rounded by one instruction where there is one.
INLINE void store_pair(bf16* p, vf first, vf second) {
#if PHALANX_ISA_BF16
    const __m512bh both = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(second), reinterpret_cast<__m512>(first));
    std::memcpy(p, &both, sizeof(both));
#else
    store_as(p, first);
    store_as(p + 16, second);
#endif
}

// The first `count` of 16 lanes; what is loaded has zeros behind them. By way of memory: for the ends of rows only.
template <class T>
INLINE vf load_some(const T* p, int64_t count) {
    T lanes[16] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
    return load_as_float(lanes);
}
template <class T>
INLINE void store_some(T* p, vf v, int64_t count) {
    T lanes[16];
    store_as(lanes, v);
    for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
template <class T>
INLINE vf load_up_to(const T* p, int64_t count) {
    return count >= 16 ? load_as_float(p) : load_some(p, count);
}
template <class T>
INLINE void store_up_to(T* p, vf v, int64_t count) {
    count >= 16 ? store_as(p, v) : store_some(p, v, count);
}

// The sum of the lanes.
INLINE float sum_of(vf v) {
#if PHALANX_ISA_AVX512
    return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
    float lanes[16];
    store(lanes, v);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
#endif
}

// a * b + c, rounded once where the instruction set can. The compiler chooses for itself whether to, here and there;
// but what is computed for some rows at once must not differ from what is computed for others.
INLINE vf fused(vf a, vf b, vf c) {
#if PHALANX_ISA_AVX512
    return _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c));
#elif PHALANX_ISA_FMA
    for (int i = 0; i < 16; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// The larger of each lane; b where a is NaN or b is.
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

// The largest lane.
INLINE float max_of(vf v) {
#if PHALANX_ISA_AVX512
    return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
#else
    float lanes[16];
    store(lanes, v);
    float most = lanes[0];
    for (int i = 1; i < 16; ++i) most = lanes[i] > most ? lanes[i] : most;
    return most;
#endif
}

// Whether a lane is not zero.
INLINE bool any_of(vi lanes) {
#if PHALANX_ISA_AVX512
    return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(lanes), reinterpret_cast<__m512i>(lanes)) != 0;
#else
    int32_t any = 0;
    for (int i = 0; i < 16; ++i) any |= lanes[i];
    return any != 0;
#endif
}

// The sign bits of those of a word's numbers that are infinite or NaN: an exponent of ones, plus one, carries into
// them.
template <class T>
INLINE vu not_finite(vu words) {
    constexpr uint32_t kExponent = sizeof(T) == 4 ? 0x7f800000u : 0x7f807f80u;
    constexpr uint32_t kOne = sizeof(T) == 4 ? 0x00800000u : 0x00800080u;
    constexpr uint32_t kSign = kExponent + kOne;
    return ((words & kExponent) + kOne) & kSign;
}

constexpr float kLeastExponent = -87.0f;

// e^x, within 3 units of the last place; 0 below -87, and above 88 the value there, or infinity; NaN of NaN. With
// AVX-512 by way of 2^r, |r| <= 1/2 (of the polynomials of degree 5 with 2^0 = 1 the one with the least relative
// error, 9.1e-8); else by Cody and Waite's reduction and Taylor's series.
INLINE vf exponential(vf x) {
#if PHALANX_ISA_AVX512
    const vf n = reinterpret_cast<vf>(_mm512_roundscale_ps(reinterpret_cast<__m512>(x * 1.44269504f), 0));
    const vf r = fused(x, splat(1.92596299e-8f), fused(x, splat(1.44269502f), -n));  // x log2(e) - n
    vf p = splat(0.00132647272f);
    for (float each : {0.0096715127f, 0.0555073374f, 0.240222421f, 0.693146978f, 1.0f}) p = fused(p, r, splat(each));
    const vi vanishes = x <= kLeastExponent;
    const __m512 power = _mm512_scalef_ps(reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n));
    return vanishes ? vf{} : reinterpret_cast<vf>(power);
#else
    vf bounded = x < 88.0f ? x : splat(88.0f);
    vf shifted = bounded * 1.44269504f + kRounder;  // its low bits are the rounded product
    vf n = shifted - kRounder;
    vf r = bounded - n * 0.693145752f - n * 1.42860677e-6f;
    vf p = splat(1.0f / 5040);
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vf value = bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
    return x > kLeastExponent ? value : x == x ? vf{} : x;
#endif
}

// x / (1 + e^-x), within 5 units of the last place. With AVX-512 the quotient is a reciprocal of 14 bits, refined once.
INLINE vf silu(vf x) {
    const vf divisor = 1.0f + exponential(-x);
#if PHALANX_ISA_AVX512
    const vf bounded = divisor < 8e37f ? divisor : splat(8e37f);  // whose reciprocal is no denormal number
    const vf y = reinterpret_cast<vf>(_mm512_rcp14_ps(reinterpret_cast<__m512>(bounded)));
    return x * fused(y, fused(-bounded, y, splat(1.0f)), y);
#else
    return x / divisor;
#endif
}

// What a word holds of an element type.
template <class T>
constexpr int kPerWord = 4 / sizeof(T);

// In how many steps a word of x and one of B are multiplied. Where no instruction multiplies pairs of bfloat16, or only
// a slow one does, both numbers of a word become floats: those of x when it is packed, those of B in registers, for all
// rows at once. (Emerald Rapids, one core, 12 rows: 89 GFLOP/s with vdpbf16ps, which takes it two cycles; 164 in this
// way; 112 if x becomes floats in registers too.)
template <class T>
constexpr int kSteps = PHALANX_ISA_BF16 ? 1 : kPerWord<T>;

// An element of x as it is multiplied in these steps.
template <class T>
using Factor = std::conditional_t<kSteps<T> == 1, T, float>;

// A Part is what one register holds of a vector of 16 lanes: with AVX2 half of it. Sums over a loop are arrays of
// parts, for a vector that no register holds is computed piece by piece in memory. (Emerald Rapids, one core, with
// AVX2's instructions: 22 GFLOP/s with vectors of 16 lanes, 51 with parts, of 81.)
#if PHALANX_ISA_FMA && !PHALANX_ISA_AVX512
constexpr int kParts = 2;
using Part = __m256;
INLINE vf sums_of(const Part* c, int row) {
    alignas(64) float lanes[16];
    _mm256_store_ps(lanes, c[2 * row]);
    _mm256_store_ps(lanes + 8, c[2 * row + 1]);
    return load(lanes);
}
INLINE void set_sums(Part* c, int row, vf v) {
    alignas(64) float lanes[16];
    store(lanes, v);
    c[2 * row] = _mm256_load_ps(lanes);
    c[2 * row + 1] = _mm256_load_ps(lanes + 8);
}
#else
constexpr int kParts = 1;
using Part = vf;
INLINE vf sums_of(const Part* c, int row) { return c[row]; }
INLINE void set_sums(Part* c, int row, vf v) { c[row] = v; }
#endif

// What a step multiplies of words: the words, or the floats of their first or of their second numbers.
template <class T, int Step, class V>
INLINE V factors_of(V words) {
    if constexpr (kSteps<T> == 1) return words;
    return Step == 0 ? words << 16 : words & 0xffff0000u;
}

// sum + x * w of one step.
template <class T>
INLINE vf multiply_add(vf sum, vu x, vu w) {
#if PHALANX_ISA_BF16
    if constexpr (sizeof(T) == 2)
        return reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(x),
                                                     reinterpret_cast<__m512bh>(w)));
#endif
    return bits_to_float(x) * bits_to_float(w) + sum;
}

// Adds to the sums of R rows the products of one step of a word of x, x_at(row), and of two panels' words.
template <class T, int R, int Step, class X>
INLINE void add_step(Part* c0, Part* c1, const uint32_t* w0, const uint32_t* w1, X&& x_at) {
#if PHALANX_ISA_FMA && !PHALANX_ISA_AVX512
    // Panel by panel: beside 12 parts of sums there is room for one panel's words and one of x.
    const auto add_panel = [&](Part* c, const uint32_t* w) __attribute__((always_inline)) {
        typedef uint32_t v8 __attribute__((vector_size(32)));
        typedef uint32_t v8_any __attribute__((vector_size(32), aligned(4), may_alias));
        const v8 low = factors_of<T, Step, v8>(*reinterpret_cast<const v8_any*>(w));
        const v8 high = factors_of<T, Step, v8>(*reinterpret_cast<const v8_any*>(w + 8));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Part x = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(x_at(r))));
            c[2 * r] = _mm256_fmadd_ps(x, reinterpret_cast<Part>(low), c[2 * r]);
            c[2 * r + 1] = _mm256_fmadd_ps(x, reinterpret_cast<Part>(high), c[2 * r + 1]);
        }
    };
    add_panel(c0, w0);
    add_panel(c1, w1);
#else
    const vu b0 = factors_of<T, Step>(load(w0)), b1 = factors_of<T, Step>(load(w1));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        const vu x = splat(x_at(r));
        c0[r] = multiply_add<T>(c0[r], x, b0);
        c1[r] = multiply_add<T>(c1[r], x, b1);
    }
#endif
}

// Adds the products of a word of x, x_at(step, row), and of the words of two panels.
template <class T, int R, class X>
INLINE void add_products(Part* c0, Part* c1, const uint32_t* w0, const uint32_t* w1, X&& x_at) {
    add_step<T, R, 0>(c0, c1, w0, w1, [&](int r) __attribute__((always_inline)) { return x_at(0, r); });
    if constexpr (kSteps<T> > 1)
        add_step<T, R, 1>(c0, c1, w0, w1, [&](int r) __attribute__((always_inline)) { return x_at(1, r); });
}
