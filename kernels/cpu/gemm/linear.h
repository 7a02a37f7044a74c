// A linear layer's tasks. Included inside an instruction set's namespace.

// Each task computes some units of two panels for some row blocks (Tile in multiply.h), and finishes a unit's rows
// before it begins the next: the sums of one unit are all that it keeps.

constexpr int kFewRows = kMaxRows < 4 ? kMaxRows : 4;  // of 4-bit weights, that multiply_nibbles() takes

// Few rows of 4-bit weights: decoded in registers, see multiply_nibbles().
inline void linear_task_of_nibbles(const Linear& job, const PackedRows& x, int task) {
    const Tile tile = tile_of(job, task);
    const int64_t panel_words = static_cast<int64_t>(job.words) * kPanel / words_per_stored(job.kind);
    const uint32_t* weight = static_cast<const uint32_t*>(job.weight);
    const FetchAhead ahead(panel_words * 4, panels_step(job) * panel_words * 4);
    float sums[kFewRows * 32];
    for (int64_t unit = tile.first_unit; unit < tile.last_unit; ++unit) {
        const Panels panels = panels_of(job, unit);
        with_rows<kFewRows>(job.m, [&](auto R) {
            multiply_nibbles<R>(job, x.words, weight + panels.first * panel_words, weight + panels.second * panel_words,
                                scales_of(job, panels.first, 0), scales_of(job, panels.second, 0), ahead, sums);
        });
        for (int r = 0; r < job.m; ++r) finish_row<bf16>(job, r, unit, load(sums + r * 32), load(sums + r * 32 + 16));
    }
}

// So many rows leave an AMD EPYC, with vdpbf16ps, time to fetch what it does not foresee. Emerald Rapids, in two steps,
// gains by it from one row on: 19 %, and 17 % of three.
constexpr int kRowsThatWait = PHALANX_ISA_BF16 ? 4 : 1;

// Weights in 12 bits a number. Runs of groups of which none stands apart are multiplied in one go.
inline void linear_task_of_compressed(const Linear& job, const PackedRows& x, int task) {
    const Tile tile = tile_of(job, task);
    const int64_t panel_bytes = compressed_bytes(job.words);
    const auto* weight = static_cast<const uint8_t*>(job.weight);
    float* sums = static_cast<float*>(scratch(Scratch::kLinearSums, tile.rows * 32 * sizeof(float)));
    const FetchAhead ahead(panel_bytes - tables_bytes(job.words), panels_step(job) * panel_bytes);
    for (int64_t unit = tile.first_unit; unit < tile.last_unit; ++unit) {
        const Panels panels = panels_of(job, unit);
        const uint8_t *first = weight + panels.first * panel_bytes, *second = weight + panels.second * panel_bytes;
        for (int64_t k = 0, words; k < job.words; k += words) {
            const int64_t table = k / kGroupWords * kTableBytes, quad = tables_bytes(job.words) + k / 4 * kQuadBytes;
            const uint8_t* tables[2] = {first + table, second + table};
            const uint8_t* quads[2] = {first + quad, second + quad};
            // A group that stands apart is multiplied by itself, whatever the row: so a row's sum is always the same.
            const auto apart = [&](int64_t i) {
                return stands_apart(tables[0] + i * kTableBytes) || stands_apart(tables[1] + i * kTableBytes);
            };
            const int64_t left = std::min<int64_t>(job.word_block, job.words - k);

            words = std::min<int64_t>(left, kGroupWords);
            uint32_t expanded[2 * kGroupWords * kPanel];
            const bool is_apart = apart(0);
            if (is_apart) {
                expand_group(tables[0], quads[0], job.apart, words, expanded);
                expand_group(tables[1], quads[1], job.apart, words, expanded + words * kPanel);
            } else {
                while (words < left && !apart(words / kGroupWords)) words = std::min(left, words + kGroupWords);
            }

            for (int block = tile.first_block; block < tile.last_block; ++block) {
                const int64_t row = block_start(job.m, job.row_blocks, block);
                const int block_rows = block_start(job.m, job.row_blocks, block + 1) - row;
                const uint32_t* a = packed_at<bf16>(job, x, row, k, block_rows);
                float* to = sums + (row - tile.first_row) * 32;
                // Of the two panels each of the first two row blocks fetches one, an only row block both.
                const int nth = block - tile.first_block, blocks = tile.last_block - tile.first_block;
                const bool fetch0 = nth == 0 && job.m >= kRowsThatWait;
                const bool fetch1 = (nth == 1 || blocks == 1) && job.m >= kRowsThatWait;
                with_rows(block_rows, [&](auto R) {
                    if (is_apart) {
                        multiply_rows<bf16, R, 0>(a, expanded, expanded + words * kPanel, words, to, 32, k > 0, nullptr,
                                                  nullptr);
                    } else {
                        multiply_compressed<R>(a, tables, quads, words, to, k > 0, ahead, k / 4 * kQuadBytes, fetch0,
                                               fetch1);
                    }
                });
            }
        }
        for (int64_t r = 0; r < tile.rows; ++r)
            finish_row<bf16>(job, tile.first_row + r, unit, load(sums + r * 32), load(sums + r * 32 + 16));
    }
}

// Plain weights, and 4-bit ones of many rows, which are decoded once for all row blocks.
template <class T>
void linear_task(const Linear& job, const PackedRows& x, int task) {
    const Tile tile = tile_of(job, task);
    const int64_t panel_words = static_cast<int64_t>(job.words) * kPanel / words_per_stored(job.kind);
    float* sums = static_cast<float*>(scratch(Scratch::kLinearSums, tile.rows * 32 * sizeof(float)));
    const uint32_t* weight = static_cast<const uint32_t*>(job.weight);
    const bool plain = job.kind == WeightKind::kPlain;
    uint32_t* decoded =
        plain ? nullptr : static_cast<uint32_t*>(scratch(Scratch::kLinearWeights, 2 * 64 * job.word_block));
    for (int64_t unit = tile.first_unit; unit < tile.last_unit; ++unit) {
        const Panels panels = panels_of(job, unit);
        for (int64_t k = 0; k < job.words; k += job.word_block) {
            const int64_t words = std::min<int64_t>(job.word_block, job.words - k);
            const int64_t at = k * kPanel / words_per_stored(job.kind);
            const uint32_t* b0 = weight + panels.first * panel_words + at;
            const uint32_t* b1 = weight + panels.second * panel_words + at;

            // What comes next: the rest of these panels, or the beginning of the next unit's.
            const int64_t unit_step = panels_step(job) * panel_words;
            const int64_t ahead = k + job.word_block < job.words ? job.word_block * kPanel : unit_step - at;
            const char* next[2] = {reinterpret_cast<const char*>(b0 + ahead),
                                   reinterpret_cast<const char*>(b1 + ahead)};
            const bf16* scales[2];
            if (!plain) {
                scales[0] = scales_of(job, panels.first, k);
                scales[1] = scales_of(job, panels.second, k);
                const int64_t further = FetchAhead(panel_words * 4, unit_step * 4).from(at * 4);
                decode(b0, words, further, decoded);
                decode(b1, words, further, decoded + words * kPanel);
                b0 = decoded;
                b1 = decoded + words * kPanel;
            }

            for (int block = tile.first_block; block < tile.last_block; ++block) {
                const int64_t row = block_start(job.m, job.row_blocks, block);
                const int block_rows = block_start(job.m, job.row_blocks, block + 1) - row;
                // Of the two panels each of the first two row blocks fetches one, an only row block both.
                const int nth = block - tile.first_block, blocks = tile.last_block - tile.first_block;
                const int lines = !plain || nth > 1 ? 0 : blocks == 1 ? 2 : 1;
                kMultiply<T>[block_rows - 1](packed_at<T>(job, x, row, k, block_rows), b0, b1, words,
                                             sums + (row - tile.first_row)* 32, 32, k > 0, plain ? nullptr : scales,
                                             nth == 1 ? next + 1 : next, lines);
            }
        }
        for (int64_t r = 0; r < tile.rows; ++r)
            finish_row<T>(job, tile.first_row + r, unit, load(sums + r * 32), load(sums + r * 32 + 16));
    }
}

// Weights of 8-bit numbers: N is how many of x and of the weight are multiplied in a word (Shorts, Bytes).
template <class T, class N>
void linear_task_of_numbers(const Linear& job, const PackedRows& x, int task) {
    const Tile tile = tile_of(job, task);
    const int64_t panel_bytes = static_cast<int64_t>(job.words) * N::kWeightBytes;
    const char* weight = static_cast<const char*>(job.weight);
    const FetchAhead ahead(panel_bytes, panels_step(job) * panel_bytes);
    float* sums = static_cast<float*>(scratch(Scratch::kLinearSums, tile.rows * 32 * sizeof(float)));
    for (int64_t unit = tile.first_unit; unit < tile.last_unit; ++unit) {
        const Panels panels = panels_of(job, unit);
        for (int block = tile.first_block; block < tile.last_block; ++block) {
            const int64_t row = block_start(job.m, job.row_blocks, block);
            with_rows(block_start(job.m, job.row_blocks, block + 1) - row, [&](auto R) {
                multiply_numbers<N, R>(job, x.words + row * job.words, weight + panels.first * panel_bytes,
                                       weight + panels.second * panel_bytes, scales_of(job, panels.first, 0),
                                       scales_of(job, panels.second, 0), ahead, block == tile.first_block,
                                       sums + (row - tile.first_row) * 32);
            });
        }

        // What x's offset added to a column's sum is 128 times the sum of its weights.
        const float offset = job.kind == WeightKind::kW8A8 ? 128.0f : 0.0f;
        const vf o0 = load(job.sums + panels.first * kPanel) * offset,
                 o1 = load(job.sums + panels.second * kPanel) * offset;
        for (int64_t r = 0; r < tile.rows; ++r) {
            const int64_t row = tile.first_row + r;
            const float scale = x.scales[row];
            finish_row<T>(job, row, unit, (load(sums + r * 32) - o0) * scale, (load(sums + r * 32 + 16) - o1) * scale);
        }
    }
}
