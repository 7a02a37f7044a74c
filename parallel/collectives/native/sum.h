// Sums of the same elements of several buffers: added in the order given, in fp32 for 16-bit floats, rounded once to
// the nearest even. One source compiled for several instruction sets, all of which give the same bits.
//
// The order is what makes every rank's result the same: x0 + x1 + x2 as floats rounds otherwise than x1 + x2 + x0. So
// no rank begins with its own part. Nothing is fused or reordered, so a vector's lanes and one number round alike.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace phalanx {

#define PHALANX_INLINE inline __attribute__((always_inline))

enum class Dtype : int { float32, bfloat16, float16, float64, int32, int64 };

inline size_t item_bytes(Dtype dtype) {
    switch (dtype) {
        case Dtype::bfloat16:
        case Dtype::float16:
            return 2;
        case Dtype::float32:
        case Dtype::int32:
            return 4;
        default:
            return 8;
    }
}

// The same bits as another type.
template <class To, class From>
PHALANX_INLINE To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

// A type of elements: as it is Stored, and as it is summed. Plain: sums of the same type.
template <class Number>
struct Plain {
    using Stored = Number;
    using Sum = Number;
    static PHALANX_INLINE Sum load(Stored value) { return value; }
    static PHALANX_INLINE Stored store(Sum value) { return value; }
};

// The upper half of a float; rounded to nearest, ties to even, and a NaN stays one.
struct BFloat16 {
    using Stored = uint16_t;
    using Sum = float;
    static PHALANX_INLINE float load(uint16_t value) { return bits_as<float>(uint32_t(value) << 16); }
    static PHALANX_INLINE uint16_t store(float value) {
        const uint32_t bits = bits_as<uint32_t>(value);
        const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        return uint16_t(value != value ? 0x7fc0u : rounded);
    }
};

// Free of branches, so that compilers vectorize it, after F. Giesen's half_to_float and float_to_half_fast3_rtne
// (https://gist.github.com/rygorous/2156668).
struct Float16 {
    using Stored = uint16_t;
    using Sum = float;
    static PHALANX_INLINE float load(uint16_t value) {
        const uint32_t shifted = (uint32_t(value) & 0x7fffu) << 13;
        const uint32_t exponent = shifted & 0x0f800000u;
        const uint32_t normal = shifted + (112u << 23);
        const uint32_t infinite = normal + (112u << 23);
        const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(normal + (1u << 23)) - bits_as<float>(113u << 23));
        const uint32_t magnitude = exponent == 0x0f800000u ? infinite : exponent == 0 ? subnormal : normal;
        return bits_as<float>(magnitude | (uint32_t(value) & 0x8000u) << 16);
    }
    static PHALANX_INLINE uint16_t store(float value) {
        const uint32_t all = bits_as<uint32_t>(value);
        const uint32_t bits = all & 0x7fffffffu;
        const uint32_t magic = 126u << 23;
        const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
        const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(bits) + bits_as<float>(magic)) - magic;
        const uint32_t normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
        const uint32_t magnitude = bits >= (143u << 23) ? special : bits < (113u << 23) ? subnormal : normal;
        return uint16_t(magnitude | (all & 0x80000000u) >> 16);
    }
};

// The sources' number is known to the compiler, so one pass reads them all. `out` may be one of the sources.
template <class Type, int Count>
PHALANX_INLINE void sum_few(typename Type::Stored* out, const typename Type::Stored* const* sources, size_t length) {
    const typename Type::Stored* from[Count];
    for (int k = 0; k < Count; ++k) from[k] = sources[k];
#pragma GCC ivdep
    for (size_t i = 0; i < length; ++i) {
        typename Type::Sum total = Type::load(from[0][i]);
        for (int k = 1; k < Count; ++k) total += Type::load(from[k][i]);
        out[i] = Type::store(total);
    }
}

// Any number of sources, a block of elements at a time, whose sums are kept beside: 2 or 4 KB, which stay in the first
// cache. Source after source over the whole length would round 16-bit sums in between, or take a message's size again.
template <class Type>
PHALANX_INLINE void sum_many(typename Type::Stored* out, const typename Type::Stored* const* sources, int count,
                             size_t length) {
    constexpr size_t kBlock = 512;
    typename Type::Sum total[kBlock];
    for (size_t start = 0; start < length; start += kBlock) {
        const size_t n = length - start < kBlock ? length - start : kBlock;
        for (size_t i = 0; i < n; ++i) total[i] = Type::load(sources[0][start + i]);
        for (int k = 1; k < count; ++k) {
            const typename Type::Stored* from = sources[k] + start;
            for (size_t i = 0; i < n; ++i) total[i] += Type::load(from[i]);
        }
        for (size_t i = 0; i < n; ++i) out[start + i] = Type::store(total[i]);
    }
}

template <class Type>
PHALANX_INLINE void sum_of(void* out, const void* const* sources, int count, size_t length) {
    using Stored = typename Type::Stored;
    auto* to = static_cast<Stored*>(out);
    auto* from = reinterpret_cast<const Stored* const*>(sources);
    switch (count) {
        case 2:
            return sum_few<Type, 2>(to, from, length);
        case 3:
            return sum_few<Type, 3>(to, from, length);
        case 4:
            return sum_few<Type, 4>(to, from, length);
        default:
            return sum_many<Type>(to, from, count, length);
    }
}

PHALANX_INLINE void sum_by_dtype(Dtype dtype, void* out, const void* const* sources, int count, size_t length) {
    switch (dtype) {
        case Dtype::float32:
            return sum_of<Plain<float>>(out, sources, count, length);
        case Dtype::bfloat16:
            return sum_of<BFloat16>(out, sources, count, length);
        case Dtype::float16:
            return sum_of<Float16>(out, sources, count, length);
        case Dtype::float64:
            return sum_of<Plain<double>>(out, sources, count, length);
        // Unsigned: an overflow wraps around, as torch's does.
        case Dtype::int32:
            return sum_of<Plain<uint32_t>>(out, sources, count, length);
        case Dtype::int64:
            return sum_of<Plain<uint64_t>>(out, sources, count, length);
    }
}

template <class Type>
PHALANX_INLINE void add_of(float* total, const void* x, size_t length) {
    const auto* from = static_cast<const typename Type::Stored*>(x);
    for (size_t i = 0; i < length; ++i) total[i] += static_cast<float>(Type::load(from[i]));
}

// Floats of some dtype, added to floats.
PHALANX_INLINE void add_by_dtype(Dtype dtype, float* total, const void* x, size_t length) {
    switch (dtype) {
        case Dtype::float32:
            return add_of<Plain<float>>(total, x, length);
        case Dtype::bfloat16:
            return add_of<BFloat16>(total, x, length);
        case Dtype::float16:
            return add_of<Float16>(total, x, length);
        case Dtype::float64:
            return add_of<Plain<double>>(total, x, length);
        case Dtype::int32:
        case Dtype::int64:
            return;  // not floats: the caller has refused them
    }
}

using Sum = void (*)(Dtype, void*, const void* const*, int, size_t);
using Add = void (*)(Dtype, float*, const void*, size_t);

inline void add_portable(Dtype dtype, float* total, const void* x, size_t length) {
    add_by_dtype(dtype, total, x, length);
}

inline void sum_portable(Dtype dtype, void* out, const void* const* sources, int count, size_t length) {
    sum_by_dtype(dtype, out, sources, count, length);
}

// The same source for each instruction set: the attribute is what makes the difference.
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"))) inline void sum_avx2(Dtype dtype, void* out, const void* const* sources, int count,
                                                     size_t length) {
    sum_by_dtype(dtype, out, sources, count, length);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) inline void sum_avx512(Dtype dtype, void* out,
                                                                                     const void* const* sources,
                                                                                     int count, size_t length) {
    sum_by_dtype(dtype, out, sources, count, length);
}

__attribute__((target("avx2"))) inline void add_avx2(Dtype dtype, float* total, const void* x, size_t length) {
    add_by_dtype(dtype, total, x, length);
}

inline Add fastest_add() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") ? add_avx2 : add_portable;
}

inline Sum fastest_sum() {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return sum_avx512;
    return __builtin_cpu_supports("avx2") ? sum_avx2 : sum_portable;
}
#else
inline Sum fastest_sum() { return sum_portable; }
inline Add fastest_add() { return add_portable; }
#endif

}  // namespace phalanx
