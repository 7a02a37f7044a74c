// The running softmax of attention by tiles. Included inside an instruction set's namespace.
//
// By instruction counts softmax takes longer than both products together, so 2^x is short here: its relative error of
// 1.0e-4 is far below the 2e-3 of a weight's bfloat16. All rows' largest scores are found before any weight is made:
// what waits for a row's largest score would keep the processor from going on with other rows. (Tried on Emerald
// Rapids: making the weights of some rows while tiles multiply for others gains nothing, since tiles take one of the
// two ports that vectors need, and what has to be kept meanwhile does not fit into the first cache.)

constexpr int kTileKeys = 128;  // keys whose scores are held at once

// 2^x for x <= 0, or little above; what would be below 2^-126 is 0 or a denormal number, which rounds to bfloat16's 0.
// By a polynomial of degree 3 with 2^0 = 1, within 1.0e-4.
INLINE vf power_of_two(vf x) {
    const vf bounded = larger(splat(-127.0f), x);
    const vf shifted = bounded + kRounder;  // its low bits are x, rounded
    const vf r = bounded - (shifted - kRounder);
    vf p = fused(splat(0.05500877f), r, splat(0.2422106f));
    p = fused(p, r, splat(0.6932829f));
    p = fused(p, r, splat(1.0f));
    return bits_to_float(float_to_bits(p) + (float_to_bits(shifted) << 23));
}

// A tile's scores, and what follows from them: of all rows of one row block or two.
struct TileScores {
    float* scores;   // (rows, kTileKeys)
    bf16* weights;   // the same
    float* largest;  // (rows,) so far, scaled
    float* shrink;   // (rows,) what sums so far are to be multiplied by
};

// Sums over the keys of a segment. As Running in attend/softmax.h, in powers of two: most has log2(e) in it; but a
// row's weight is sixteen sums, of every sixteenth key each.
struct TileSums {
    float* sums;    // (rows, width)
    float* most;    // (rows,)
    float* weight;  // (rows, 16)
};

// A tile of keys, and one row block or two that see some of them.
struct TileStep {
    int first_block, both;  // row blocks
    int start, end;         // rows
    int key, count, width;  // the first key, keys, and these rounded up to whole tiles
    bool first;             // of its segment
    TileSums segment;
};

// One row's largest score, and what follows from it.
INLINE void find_largest(const TileStep& step, const TileScores& of, int row, int visible, float scale) {
    const int i = row - step.start, width = step.width;
    float* scores = of.scores + i * kTileKeys;
    hide(scores, visible, width, kMinusInfinity);

    vf most0 = load(scores), most1 = load(scores + 16);
    for (int k = 32; k < width; k += 32) {
        most0 = larger(most0, load(scores + k));
        most1 = larger(most1, load(scores + k + 16));
    }

    const float before = step.first ? kMinusInfinity : step.segment.most[row];
    const float largest = std::max(before, max_of(larger(most0, most1)) * scale);
    step.segment.most[row] = largest;
    of.largest[i] = largest > kMinusInfinity ? largest : 0.0f;  // nothing visible yet: all weights are zero
    of.shrink[i] = largest == before ? 1.0f : power_of_two(splat(before - of.largest[i]))[0];
}

// One row's scores to weights.
INLINE void make_weights(const TileStep& step, const TileScores& of, int row, float scale) {
    const int i = row - step.start, width = step.width;
    const float *scores = of.scores + i * kTileKeys, largest = of.largest[i];
    bf16* weights = of.weights + i * kTileKeys;
    vf total0{}, total1{};
    for (int k = 0; k < width; k += 32) {
        const vf w0 = power_of_two(fused(load(scores + k), splat(scale), splat(-largest)));
        const vf w1 = power_of_two(fused(load(scores + k + 16), splat(scale), splat(-largest)));
        total0 += w0;
        total1 += w1;
        store_pair(weights + k, w0, w1);
    }
    float* weight = step.segment.weight + row * 16;
    store(weight, step.first ? total0 + total1 : fused(load(weight), splat(of.shrink[i]), total0 + total1));
}
