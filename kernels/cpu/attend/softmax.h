// The running softmax of attention. Included inside an instruction set's namespace.

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// What a task has summed up so far.
struct Running {
    float* sums;    // (rows, head_dim)
    float* most;    // (rows,) largest score, scaled
    float* weight;  // (rows,) sum of e^(score - most)
};

// What a row does not see of a tile, from key `visible` on, becomes `value`.
INLINE void hide(float* scores, int visible, int width, float value) {
    const vi lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int i = std::max(visible, 0) / 16 * 16; i < width; i += 16)
        store(scores + i, lanes + i < visible ? load(scores + i) : splat(value));
}

// One row's scores of a tile, to be scaled, to weights e^(score - most), which `put` takes by 16 keys with the index of
// the first. `visible` keys of `width` count. Returns what the row's sums so far have to be multiplied by.
template <class F>
INLINE float soften(float* scores, int visible, int width, float scale, Running& running, int row, bool first,
                    F&& put) {
    // A key that the row does not see has the score -infinity, and so the weight 0.
    hide(scores, visible, width, kMinusInfinity);

    vf most = load(scores);
    for (int i = 16; i < width; i += 16) most = larger(most, load(scores + i));
    const float before = first ? kMinusInfinity : running.most[row];
    const float largest = std::max(before, max_of(most) * scale);
    const float now = largest > kMinusInfinity ? largest : 0.0f;  // nothing visible yet: all weights are zero

    vf total{};
    for (int i = 0; i < width; i += 16) {
        const vf weight = exponential(fused(load(scores + i), splat(scale), splat(-now)));
        total += weight;
        put(i, weight);
    }

    // Sums that were made with a lower maximum shrink by e^(before - now).
    const float shrink = first ? 0.0f : exponential(splat(before - now))[0];
    running.most[row] = largest;
    running.weight[row] = (first ? 0.0f : running.weight[row] * shrink) + sum_of(total);
    return shrink;
}
