// The micro-kernel, and linear layers made of it. Included inside an instruction set's namespace.

// C (R rows, 32 columns) = or += A B (summed up by itself first: a sum of sums is more precise than one long sum), for R rows of A and two panels of B of `words` each. A's words stand row_stride
// apart in a row, step apart from one word to the next; C's rows ldc apart. While it multiplies it fetches `ahead`.
template <class T, int R, int Step, int RowStride>
INLINE void multiply_rows(const uint32_t* a, const uint32_t* b0, const uint32_t* b1, int64_t words, float* c,
                          int64_t ldc, bool add, const char* ahead, int ahead_step) {
    vf c0[R], c1[R];
    for (int r = 0; r < R; ++r) c0[r] = c1[r] = vf{};
    for (int64_t k = 0; k < words; ++k) {
        vu w0 = load(b0 + k * 16), w1 = load(b1 + k * 16);
        if (ahead_step) {
            __builtin_prefetch(ahead, 0, 2);
            ahead += ahead_step;
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            vu x = splat(a[k * Step + r * RowStride]);
            c0[r] = multiply_add<T>(c0[r], x, w0);
            c1[r] = multiply_add<T>(c1[r], x, w1);
        }
    }
    for (int r = 0; r < R; ++r) {
        float* to = c + r * ldc;
        store(to, add ? load(to) + c0[r] : c0[r]);
        store(to + 16, add ? load(to + 16) + c1[r] : c1[r]);
    }
}

template <class T, int R>
__attribute__((noinline)) void multiply_packed(const uint32_t* a, const uint32_t* b0, const uint32_t* b1,
                                               int64_t words, float* c, int64_t ldc, bool add, const char* ahead) {
    if (ahead) {
        multiply_rows<T, R, R, 1>(a, b0, b1, words, c, ldc, add, ahead, 64);
    } else {
        multiply_rows<T, R, R, 1>(a, b0, b1, words, c, ldc, add, ahead, 0);
    }
}

// Calls f(std::integral_constant<int, rows>) for rows in 1..kMaxRows.
template <int R = kMaxRows, class F>
INLINE void with_rows(int rows, F&& f) {
    if constexpr (R > 1) {
        if (rows != R) return with_rows<R - 1>(rows, f);
    }
    f(std::integral_constant<int, R>{});
}

template <class T>
using Multiply = void (*)(const uint32_t*, const uint32_t*, const uint32_t*, int64_t, float*, int64_t, bool,
                          const char*);

template <class T, int... I>
constexpr std::array<Multiply<T>, sizeof...(I)> multiply_table(std::integer_sequence<int, I...>) {
    return {{multiply_packed<T, I + 1>...}};
}

// By rows - 1.
template <class T>
constexpr auto kMultiply = multiply_table<T>(std::make_integer_sequence<int, kMaxRows>{});

// Rows of words, interleaved: to[k * rows + r] = from[r][k].
INLINE void interleave(const uint32_t* const* from, int rows, int64_t words, uint32_t* to) {
    for (int r = 0; r < rows; ++r) {
        const uint32_t* row = from[r];
        for (int64_t k = 0; k < words; ++k) to[k * rows + r] = row[k];
    }
}

template <class T>
void pack_rows(const Linear& job, int block, uint32_t* to) {
    int first = block_start(job.m, job.row_blocks, block), last = block_start(job.m, job.row_blocks, block + 1);
    const uint32_t* rows[kMaxRows];
    for (int r = first; r < last; ++r)
        rows[r - first] = reinterpret_cast<const uint32_t*>(static_cast<const T*>(job.x) + r * job.ldx);
    interleave(rows, last - first, job.words, to + static_cast<int64_t>(first) * job.words);
}

// One row's 32 sums to where they belong; `unit` is the pair of panels they are of.
template <class T>
INLINE void finish_row(const Linear& job, int64_t row, int64_t unit, vf sum0, vf sum1) {
    const T* bias = static_cast<const T*>(job.bias);
    if (job.output == Output::kSiluMul) {
        int64_t half = job.n / 2, column = unit * kPanel, count = half - column;
        if (bias) {
            sum0 += load_up_to(bias + column, count);
            sum1 += load_up_to(bias + half + column, count);
        }
        store_up_to(static_cast<T*>(job.out) + row * job.ldo + column, silu(sum0) * sum1, count);
        return;
    }
    for (int half = 0; half < 2; ++half) {
        int64_t column = (2 * unit + half) * kPanel, count = job.n - column;
        if (count <= 0) return;
        vf sum = half ? sum1 : sum0;
        if (bias) sum += load_up_to(bias + column, count);
        if (job.output == Output::kStore) {
            store_up_to(static_cast<T*>(job.out) + row * job.ldo + column, sum, count);
        } else {
            float* out = static_cast<float*>(job.out) + row * job.ldo + column;
            if (job.output == Output::kAddFloat) sum += load_up_to(out, count);
            store_up_to(out, sum, count);
        }
    }
}

// The two panels of a unit: neighbours, or of the two halves of a gated layer. The last may have no neighbour.
struct Panels {
    int64_t first, second;
};

INLINE Panels panels_of(const Linear& job, int64_t unit) {
    if (job.output == Output::kSiluMul) return {unit, unit + job.n_units};
    int64_t last = (job.n + kPanel - 1) / kPanel - 1;
    return {2 * unit, 2 * unit + 1 > last ? last : 2 * unit + 1};
}

template <class T>
void linear_task(const Linear& job, int task) {
    int64_t n_task = task / job.m_tiles, m_tile = task % job.m_tiles;
    int first_block = block_start(job.row_blocks, job.m_tiles, m_tile);
    int last_block = block_start(job.row_blocks, job.m_tiles, m_tile + 1);
    int64_t first_row = block_start(job.m, job.row_blocks, first_block);
    int64_t rows = block_start(job.m, job.row_blocks, last_block) - first_row;
    float* sums = static_cast<float*>(scratch(0, rows * 32 * sizeof(float)));
    const uint32_t* weight = static_cast<const uint32_t*>(job.weight);
    int64_t panel_words = static_cast<int64_t>(job.words) * kPanel;
    int64_t last_unit = std::min<int64_t>(job.n_units, (n_task + 1) * job.units_per_task);
    for (int64_t unit = n_task * job.units_per_task; unit < last_unit; ++unit) {
        Panels panels = panels_of(job, unit), next = panels_of(job, std::min<int64_t>(unit + 1, job.n_units - 1));
        for (int64_t k = 0; k < job.words; k += job.word_block) {
            int64_t words = std::min<int64_t>(job.word_block, job.words - k);
            for (int block = first_block; block < last_block; ++block) {
                int64_t row = block_start(job.m, job.row_blocks, block);
                int block_rows = block_start(job.m, job.row_blocks, block + 1) - row;
                // Each of the first two row blocks fetches one of the next unit's panels while it computes.
                int64_t ahead = block == first_block ? next.first : next.second;
                bool fetch = last_block - first_block > 1 && block < first_block + 2;
                kMultiply<T>[block_rows - 1](
                    job.packed + row * job.words + k * block_rows, weight + panels.first * panel_words + k * kPanel,
                    weight + panels.second * panel_words + k * kPanel, words, sums + (row - first_row) * 32, 32, k > 0,
                    fetch ? reinterpret_cast<const char*>(weight + ahead * panel_words + k * kPanel) : nullptr);
            }
        }
        for (int64_t r = 0; r < rows; ++r)
            finish_row<T>(job, first_row + r, unit, load(sums + r * 32), load(sums + r * 32 + 16));
    }
}
