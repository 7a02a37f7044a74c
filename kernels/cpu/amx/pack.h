// Rows of x as A tiles: for each block of `block_rows` rows, tile after tile along k. Included inside an instruction
// set's namespace.
//
// A tile's rows stand 64 bytes apart. Read where x stands, they would be a row of x apart; where that is a multiple of
// 4 KB, all sixteen would share one set of the first cache. What is past the last row or the last column is zero.
//
//     block 0: [tile 0: row 0 | row 1 | ... ] [tile 1] ...      block 1: ...        each row 64 bytes
//
// kInt8 has two tiles for a group of 32 numbers of 16 bits, 256 * high + low, with rows of 32 bytes: first the high
// bytes, which are signed, then the low ones, which are not.

// Rows of a block that there are; the others are zero.
INLINE int rows_of_block(const Linear& job, int block) {
    return std::max(0, std::min(job.block_rows, job.m - block * job.block_rows));
}

// A whole number of tiles, or of groups' pairs of tiles: bytes of one row of x.
inline int64_t packed_row_bytes(const Linear& job) {
    if (job.kind == WeightKind::kInt8) return int64_t{job.groups} * kTileRowBytes;
    if (job.kind == WeightKind::kInt4) return int64_t{job.groups} * 2 * kTileRowBytes;
    return ceil_div(job.words, kTileWords) * kTileRowBytes;
}

INLINE void zero_past(char* room, int64_t filled, int64_t bytes) { std::memset(room + filled, 0, bytes - filled); }

// x of bfloat16, copied: by vectors where a tile's row is whole, by memcpy where it is not.
inline void pack_tile_rows(const Linear& job, int block, char* to) {
    const int rows = rows_of_block(job, block);
    const int64_t bytes = int64_t{job.words} * 4, tiles = packed_row_bytes(job) / kTileRowBytes;
    const int64_t tile_bytes = int64_t{job.block_rows} * kTileRowBytes;
    for (int r = 0; r < job.block_rows; ++r) {
        char* row = to + r * kTileRowBytes;
        if (r >= rows) {
            for (int64_t t = 0; t < tiles; ++t) std::memset(row + t * tile_bytes, 0, kTileRowBytes);
            continue;
        }
        const char* x = reinterpret_cast<const char*>(static_cast<const bf16*>(job.x) +
                                                      (int64_t{block} * job.block_rows + r) * job.ldx);

        const int64_t whole = bytes / kTileRowBytes;
        for (int64_t t = 0; t < whole; ++t)
            store(reinterpret_cast<float*>(row + t * tile_bytes),
                  load(reinterpret_cast<const float*>(x + t * kTileRowBytes)));
        for (int64_t t = whole; t < tiles; ++t) {
            const int64_t left = std::max<int64_t>(0, bytes - t * kTileRowBytes);
            std::memcpy(row + t * tile_bytes, x + t * kTileRowBytes, left);
            zero_past(row + t * tile_bytes, left, kTileRowBytes);
        }
    }
}

// Rounds a block's rows to numbers of at most `most`, a scale for each row, and calls put(row of the block, k, sixteen
// numbers, how many of them there are).
template <class F>
INLINE void round_rows(const Linear& job, int block, int most, float* scales, F&& put) {
    for (int r = 0; r < rows_of_block(job, block); ++r) {
        const int64_t row = int64_t{block} * job.block_rows + r;
        const bf16* x = static_cast<const bf16*>(job.x) + row * job.ldx;
        float inverse;
        scales[row] = scale_of(x, job.k, most, &inverse);
        for (int64_t k = 0; k < job.k; k += 16) {
            const vf rounded = load_up_to(x + k, job.k - k) * inverse + kRounder - kRounder;
            put(r, k, __builtin_convertvector(rounded, vi), std::min<int64_t>(16, job.k - k));
        }
    }
}

typedef uint8_t vb __attribute__((vector_size(16)));

// x as numbers of 8 bits plus 128.
inline void pack_tile_bytes(const Linear& job, int block, char* to, float* scales) {
    const int64_t tile_bytes = int64_t{job.block_rows} * kTileRowBytes;
    std::memset(to, 0, ceil_div(job.words, kTileWords) * tile_bytes);
    round_rows(job, block, 127, scales, [&](int r, int64_t k, vi numbers, int64_t count) {
        const vb bytes = __builtin_convertvector(numbers + 128, vb);
        std::memcpy(to + k / kTileRowBytes * tile_bytes + r * kTileRowBytes + k % kTileRowBytes, &bytes, count);
    });
}

// Whether rows of int8 weights are so few that vectors multiply them, see grouped.h.
constexpr int kVectorRows = 4;
INLINE bool by_vectors(const Linear& job) { return job.m <= kVectorRows; }

// x as numbers of 16 bits, in their high and their low bytes. Vectors want the high ones plus 128.
inline void pack_tile_shorts(const Linear& job, int block, char* to, float* scales) {
    constexpr int kGroup = 32;
    const int offset = by_vectors(job) ? 128 : 0;
    const int64_t tile_bytes = int64_t{job.block_rows} * kGroup;
    std::memset(to, 0, job.groups * 2 * tile_bytes);
    round_rows(job, block, 32767, scales, [&](int r, int64_t k, vi numbers, int64_t count) {
        const vb high = __builtin_convertvector((numbers >> 8) + offset, vb),
                 low = __builtin_convertvector(numbers & 255, vb);
        char* at = to + k / kGroup * 2 * tile_bytes + r * kGroup + k % kGroup;
        std::memcpy(at, &high, count);
        std::memcpy(at + tile_bytes, &low, count);
    });
}
