// What the tiles can do at best, for runtime/rates.cpp. Included inside an instruction set's namespace.

// Two tiles of A by two of B, in the order of loads and products that multiply_tiles() has.
template <class Products>
INLINE void multiply_four(const char* a, const char* b) {
    tile_load<4>(a, kTileRowBytes);
    tile_load<6>(b, kTileRowBytes);
    Products::template add<0, 4, 6>();
    tile_load<7>(b + kTileBytes, kTileRowBytes);
    Products::template add<1, 4, 7>();
    tile_load<5>(a + kTileBytes, kTileRowBytes);
    Products::template add<2, 5, 6>();
    Products::template add<3, 5, 7>();
}

// Random numbers: zeros take less power, and so are multiplied faster.
inline float tile_products(bool int8, int64_t steps) {
    constexpr int kSteps = 8;  // four tiles each, 32 KB in all
    alignas(64) static thread_local uint16_t operands[kSteps * 4 * kTileBytes / 2];
    uint64_t state = 1;
    for (auto& number : operands) {
        state = mix_bits(state + 0x9E3779B97F4A7C15ull);
        number = static_cast<uint16_t>(0x3c00 + state % 0x300 + (state >> 63) * 0x8000);  // of bfloat16: 0.008 to 2
    }

    const char* from = reinterpret_cast<const char*>(operands);
    configure(kTileRows, kTileWords);
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t i = 0; i < steps; ++i) {
        const char* at = from + i % kSteps * 4 * kTileBytes;
        int8 ? multiply_four<Int8Products>(at, at + 2 * kTileBytes)
             : multiply_four<Bfloat16Products>(at, at + 2 * kTileBytes);
    }
    alignas(64) float sums[kTileBytes / 4];
    tile_store<0>(sums, kTileRowBytes);
    return sums[0];
}
