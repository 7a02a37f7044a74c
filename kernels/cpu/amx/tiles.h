// The eight instructions of AMX, as functions, or plain C++ that does what they do, with the same bits: that is how
// every machine can test what is made of them. Included inside an instruction set's namespace, after vectors.h.
//
// A tile is up to 16 rows of up to 64 bytes. There are eight, named by number; one product takes three:
//
//     C (rows x 16 sums)  +=  A (rows x 16 words)  *  B (16 words x 16 columns)
//
// A word has 32 bits along the summed dimension: two bfloat16, or four 8-bit numbers. Row w of B holds word w of 16
// columns, which is how a panel stands in memory (kernels.h): 16 words of a panel are one B tile, without a copy.

constexpr int kTileWords = 16, kTileBytes = 1024, kTileRowBytes = 64;

// What the tiles' shapes are while they are in use: LDTILECFG's operand (Intel SDM, volume 1, chapter 18).
struct TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int tile_rows, int bytes) {
        rows[tile] = static_cast<uint8_t>(tile_rows);
        row_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};
static_assert(sizeof(TileConfig) == 64, "LDTILECFG reads 64 bytes");

// The emulation: tiles are memory of the thread, and a product is three loops.
#if PHALANX_ISA_EMULATED_TILES

struct EmulatedTiles {
    TileConfig config;
    alignas(64) uint8_t bytes[8][kTileRows][kTileRowBytes];
};

inline EmulatedTiles& emulated() {
    static thread_local EmulatedTiles tiles;
    return tiles;
}

inline void tile_configure(const TileConfig& config) {
    emulated().config = config;
    std::memset(emulated().bytes, 0, sizeof(emulated().bytes));
}
inline void tile_release() { tile_configure(TileConfig{}); }

template <int Tile>
inline void tile_zero() {
    std::memset(emulated().bytes[Tile], 0, kTileBytes);
}
template <int Tile>
inline void tile_load(const void* from, int64_t stride) {
    EmulatedTiles& t = emulated();
    tile_zero<Tile>();
    for (int r = 0; r < t.config.rows[Tile]; ++r)
        std::memcpy(t.bytes[Tile][r], static_cast<const char*>(from) + r * stride, t.config.row_bytes[Tile]);
}
template <int Tile>
inline void tile_store(void* to, int64_t stride) {
    const EmulatedTiles& t = emulated();
    for (int r = 0; r < t.config.rows[Tile]; ++r)
        std::memcpy(static_cast<char*>(to) + r * stride, t.bytes[Tile][r], t.config.row_bytes[Tile]);
}

// Denormal numbers count as zero, as operands and as results.
inline vf flushed(vf x) {
    const vu bits = float_to_bits(x);
    return bits_to_float((bits & 0x7f800000u) == 0 ? bits & 0x80000000u : bits);
}

// The two numbers of a word have sums of their own, rounded once a product, as a product of two bfloat16 is exact in
// float; these two are added, and that to C.
template <int C, int A, int B>
inline void tile_dot_bf16() {
    EmulatedTiles& t = emulated();
    for (int m = 0; m < t.config.rows[C]; ++m) {
        vf low{}, high{};
        for (int w = 0; w < t.config.row_bytes[A] / 4; ++w) {
            uint32_t x;
            std::memcpy(&x, t.bytes[A][m] + 4 * w, 4);
            const vu y = load(reinterpret_cast<const uint32_t*>(t.bytes[B][w]));
            low = flushed(flushed(bits_to_float(splat(x << 16))) * flushed(bits_to_float(y << 16)) + low);
            high = flushed(flushed(bits_to_float(splat(x & 0xffff0000u))) * flushed(bits_to_float(y & 0xffff0000u)) +
                           high);
        }
        float* c = reinterpret_cast<float*>(t.bytes[C][m]);
        store(c, flushed(flushed(load(c)) + flushed(low + high)));
    }
}

// Left: the type of A's bytes. Sums wrap around, as the instruction's do.
template <int C, int A, int B, class Left>
inline void emulate_dot_int8() {
    EmulatedTiles& t = emulated();
    for (int m = 0; m < t.config.rows[C]; ++m) {
        auto* c = reinterpret_cast<uint32_t*>(t.bytes[C][m]);  // wraps around
        for (int i = 0; i < t.config.row_bytes[A]; ++i) {
            const int x = static_cast<Left>(t.bytes[A][m][i]);
            for (int n = 0; n < kTileWords; ++n)
                c[n] += static_cast<uint32_t>(x * static_cast<int8_t>(t.bytes[B][i / 4][4 * n + i % 4]));
        }
    }
}
template <int C, int A, int B>
inline void tile_dot_us8() {
    emulate_dot_int8<C, A, B, uint8_t>();
}
template <int C, int A, int B>
inline void tile_dot_ss8() {
    emulate_dot_int8<C, A, B, int8_t>();
}

#else

// The compiler's own intrinsics take the tile's number as text, so a template could not pass it on; and they do not say
// that a load reads memory, which the stores just before it must have reached.
INLINE void tile_configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
INLINE void tile_release() { asm volatile("tilerelease" ::: "memory"); }

template <int Tile>
INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
INLINE void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
INLINE void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(Tile) : "memory");
}
template <int C, int A, int B>
INLINE void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_dot_us8() {  // A unsigned, B signed
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_dot_ss8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// What the calling thread's tiles are configured for, so that it is done again only for another shape: it takes some
// 100 ns. That holds until release_tiles(): other libraries configure tiles for themselves (oneDNN does), and whoever
// uses them otherwise than they are configured gets an illegal instruction. Tiles 0 to 3 are C, 4 and 5 are A, 6 and 7
// are B.
inline int& configured() {
    static thread_local int shape = 0;
    return shape;
}

INLINE void configure(int rows, int words) {
    const int shape = rows * 256 + words;
    if (configured() == shape) return;
    TileConfig config;
    for (int tile = 0; tile < 4; ++tile) config.set(tile, rows, kTileRowBytes);
    for (int tile = 4; tile < 6; ++tile) config.set(tile, rows, 4 * words);
    for (int tile = 6; tile < 8; ++tile) config.set(tile, words, kTileRowBytes);
    tile_configure(config);
    configured() = shape;
}

// The pool calls it when a thread has nothing to do. Tiles that are in use make a switch to another thread slower, and
// keep a core from its deeper sleep.
inline void release_tiles() {
    if (configured() == 0) return;
    tile_release();
    configured() = 0;
}
