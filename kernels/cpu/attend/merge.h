// Partial results of tasks that each saw some of a row's keys, merged. Included inside an instruction set's namespace.

// One row of partial results to a head's result: `splits` of them, `stride` floats apart, each of `rows` rows' sums,
// then their largest scores, then their denominators. A split in which the row saw nothing counts for nothing.
template <class T>
INLINE void merge_row(const Attention& job, const float* from, int64_t stride, int splits, int rows, int r,
                      int64_t token, int64_t head) {
    const int dim = job.head_dim;
    const float *largest = from + static_cast<int64_t>(rows) * dim + r, *weights = largest + rows;

    // Scores that are NaN leave no largest one, but a sum of weights that is NaN too.
    const auto counts = [&](int s) {
        return largest[s * stride] > kMinusInfinity || weights[s * stride] != weights[s * stride];
    };

    // The weights as they were, had all splits known the largest score of all.
    float most = kMinusInfinity, total = 0.0f;
    for (int s = 0; s < splits; ++s) most = std::max(most, largest[s * stride]);
    for (int s = 0; s < splits; ++s)
        if (counts(s)) total += weights[s * stride] * std::exp(largest[s * stride] - most);

    for (int i = 0; i < dim; i += 16) {
        vf sum{};
        for (int s = 0; s < splits; ++s) {
            if (!counts(s)) continue;
            const float share = std::exp(largest[s * stride] - most) / total;
            sum = fused(load(from + s * stride + static_cast<int64_t>(r) * dim + i), splat(share), sum);
        }
        store_as(out_at<T>(job, token, head, i), sum);
    }
}

// The tasks of one row and kv head, which each saw some of its keys, into the row's result.
template <class T>
void merge_partials(const Attention& job, int row, int kv_head, int splits, int partial) {
    const int group = job.heads / job.kv_heads, dim = job.head_dim;
    const int rows = (job.cu_q[row + 1] - job.cu_q[row]) * group;
    const int64_t stride = static_cast<int64_t>(job.query_rows) * (dim + 2);
    for (int r = 0; r < rows; ++r) {
        const int64_t token = job.cu_q[row] + r / group;
        merge_row<T>(job, job.partials + partial * stride, stride, splits, rows, r, token, kv_head * group + r % group);
    }
}
