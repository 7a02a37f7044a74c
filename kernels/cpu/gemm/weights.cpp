#include "weights.h"

#include <algorithm>
#include <cstring>

#include "../runtime/dispatch.h"
#include "../runtime/pool.h"
#include "../runtime/scratch.h"

namespace phalanx {

void pack_weight(DType dtype, void* weight, int64_t n, int64_t k) {
    // A panel takes the memory of its sixteen rows: these are copied away, and come back transposed, word by word: 16
    // words at a time, which are 1 KB of the panel.
    int64_t words = k * element_bytes(dtype) / 4;
    auto* panels = static_cast<uint32_t*>(weight);
    auto body = [&](int panel) {
        auto* rows = static_cast<uint32_t*>(scratch(Scratch::kUnpackedRows, words * kPanel * 4));
        uint32_t* to = panels + panel * words * kPanel;
        std::memcpy(rows, to, words * kPanel * 4);
        for (int64_t first = 0; first < words; first += 16) {
            int64_t last = std::min(words, first + 16);
            for (int row = 0; row < kPanel; ++row)
                for (int64_t w = first; w < last; ++w) to[w * kPanel + row] = rows[row * words + w];
        }
    };
    parallel(static_cast<int>(n / kPanel), body);
}

void copy_panels(DType dtype, const void* panels, int64_t n, int64_t k, void* to) {
    const int64_t bytes = k * element_bytes(dtype) * kPanel;
    parallel(static_cast<int>(n / kPanel), [&](int panel) {
        std::memcpy(static_cast<char*>(to) + panel * bytes, static_cast<const char*>(panels) + panel * bytes, bytes);
    });
}

int64_t compress_weight(const void* weight, int64_t n, int64_t k, void* to, void* apart, int64_t* firsts) {
    const int64_t panels = n / kPanel, words = k / 2;
    const auto* from = static_cast<const uint32_t*>(weight);
    auto body = [&](int panel) {
        uint8_t* there = to ? static_cast<uint8_t*>(to) + panel * compressed_bytes(words) : nullptr;
        const int64_t found = kernels().compress(from + panel * words * kPanel, words, there,
                                                 static_cast<uint32_t*>(apart), to ? firsts[panel] : 0);
        if (!to) firsts[panel] = found;
    };
    parallel(static_cast<int>(panels), body);

    // The panels' counts become the index of each one's first group.
    int64_t all = 0;
    if (!to) {
        for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t found = firsts[panel];
            firsts[panel] = all;
            all += found;
        }
    }
    return all;
}

namespace {

// The nearest integer, ties to even, within bounds.
float round_between(float least, float value, float most) {
    return std::min(most, std::max(least, value + kRounder - kRounder));
}

// Rounded to nearest, ties away from zero: as amx/int8.h does.
bf16 round_away(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return {static_cast<uint16_t>((bits + 0x8000) >> 16)};
}

}  // namespace

// Of a group 32 scales are tried, from the largest number's to 8 % above it: the best leaves a fifth less error than
// the first.
void quantize_int8(const void* weight, int64_t n, int64_t k, int together, int64_t group, void* numbers, bf16* scales,
                   float* sums) {
    const auto* rows = static_cast<const bf16*>(weight);
    auto* to = static_cast<int8_t*>(numbers);
    const int64_t groups = ceil_div(k, group);
    const int tried = group < k ? 32 : 1;  // of a whole row all scales leave about the same error
    auto body = [&](int row) {
        const bf16* from = rows + row * k;
        float sum = 0;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first = g * group, last = std::min(k, first + group);
            const bf16 chosen = kernels().choose_scale(from + first, last - first, 127, 0.08f, tried);
            const float scale = to_float(chosen), inverse = 1.0f / scale;
            scales[scale_index(row, groups, g)] = chosen;
            // The sum is of what the numbers stand for, not of the weights they were.
            for (int64_t i = first; i < last; ++i) {
                float number = round_between(-127, to_float(from[i]) * inverse, 127);
                sum += number * scale;
                to[number_index(row, k, i, together)] = static_cast<int8_t>(number);
            }
        }
        sums[row] = sum;
    };
    parallel(static_cast<int>(n), body);
}

void quantize_int4(const void* weight, int64_t n, int64_t k, int64_t group, void* numbers, bf16* scales) {
    const auto* rows = static_cast<const bf16*>(weight);
    auto* to = static_cast<uint32_t*>(numbers);
    int64_t groups = ceil_div(k, group);
    auto body = [&](int row) {
        const bf16* from = rows + row * k;
        uint32_t* panel = to + row / kPanel * k / 8 * kPanel;
        for (int64_t g = 0; g < groups; ++g) {
            int64_t first = g * group, last = std::min(k, first + group);
            const bf16 chosen = kernels().choose_scale(from + first, last - first, 7, -0.5f, 16);
            const float inverse = 1.0f / to_float(chosen);
            scales[scale_index(row, groups, g)] = chosen;
            for (int64_t i = first; i < last; i += 8) {
                // Even numbers go to the low half of the word, odd ones to the high half (quantized.h).
                uint32_t word = 0;
                for (int64_t j = 0; j < 8; ++j) {
                    float number = round_between(-8, to_float(from[i + j]) * inverse, 7);
                    word |= static_cast<uint32_t>(static_cast<int>(number) + 8) << (4 * (j / 2) + 16 * (j % 2));
                }
                panel[i / 8 * kPanel + row % kPanel] = word;
            }
        }
    };
    parallel(static_cast<int>(n), body);
}

namespace {

// Calls one(to, row) for each row that there is, and clears the others; a row of `to` has `bytes`.
template <class F>
void look_up_each(const int64_t* rows, int64_t count, int64_t n, void* out, int64_t bytes, const F& one) {
    parallel(static_cast<int>(count), [&](int i) {
        char* to = static_cast<char*>(out) + i * bytes;
        if (rows[i] < 0 || rows[i] >= n) {
            std::memset(to, 0, bytes);
        } else {
            one(to, rows[i]);
        }
    });
}

}  // namespace

void look_up(DType dtype, const void* weight, int64_t n, int64_t k, const int64_t* rows, int64_t count, void* out) {
    const int64_t words = k * element_bytes(dtype) / 4;
    look_up_each(rows, count, n, out, words * 4, [&](char* out_row, int64_t row) {
        auto* to = reinterpret_cast<uint32_t*>(out_row);
        const auto* from = static_cast<const uint32_t*>(weight) + row / kPanel * words * kPanel + row % kPanel;
        for (int64_t w = 0; w < words; ++w) to[w] = from[w * kPanel];
    });
}

void look_up_compressed(const void* weight, const void* apart, int64_t n, int64_t k, const int64_t* rows, int64_t count,
                        void* out) {
    const int64_t words = k / 2;
    const auto* groups = static_cast<const uint32_t*>(apart);
    look_up_each(rows, count, n, out, words * 4, [&](char* out_row, int64_t row) {
        auto* to = reinterpret_cast<uint32_t*>(out_row);
        const int64_t lane = row % kPanel;
        const auto* panel = static_cast<const uint8_t*>(weight) + row / kPanel * compressed_bytes(words);
        for (int64_t w = 0; w < words; ++w) {
            const uint8_t* table = panel + w / kGroupWords * kTableBytes;
            if (stands_apart(table)) {
                to[w] = words_apart(table, groups)[w % kGroupWords * kPanel + lane];
                continue;
            }

            // See compress_group() for where a number's bytes stand.
            const uint8_t* quad = panel + tables_bytes(words) + w / 4 * kQuadBytes;
            const int64_t second = w % 4 / 2;  // of two pairs of words
            const int64_t offset = lane / 4 * 16 + w % 2 * 8 + lane % 4 * 2;
            uint32_t word = 0;
            for (int half = 0; half < 2; ++half) {
                const uint32_t upper = table[quad[offset + half] >> (4 * second) & 15];
                word |= (quad[64 * (1 + second) + offset + half] | upper << 8) << (16 * half);
            }
            to[w] = word;
        }
    });
}

void look_up_int8(const void* numbers, const bf16* scales, int64_t n, int64_t k, int together, int64_t group,
                  const int64_t* rows, int64_t count, void* out) {
    const auto* from = static_cast<const int8_t*>(numbers);
    const int64_t groups = ceil_div(k, group);
    look_up_each(rows, count, n, out, k * 2, [&](char* out_row, int64_t row) {
        auto* to = reinterpret_cast<bf16*>(out_row);
        for (int64_t j = 0; j < k; ++j)
            to[j] = round_away(from[number_index(row, k, j, together)] *
                               to_float(scales[scale_index(row, groups, j / group)]));
    });
}

}  // namespace phalanx
