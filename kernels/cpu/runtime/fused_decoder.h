// A rank's decoder layers in one go: with few tokens, what Python does between their parts would be a tenth of a step.
#pragma once

#include <vector>

#include "../add_reduced.h"
#include "operations.h"

namespace phalanx {

struct Projection {
    Linear weight;
    const void* bias;  // of its dtype, or null
};

struct DecoderLayer {
    const float* attention_norm;
    Projection qkv;
    const float *q_norm, *k_norm;  // (head_dim,) or null
    Projection output;
    const float* mlp_norm;
    Projection gate_up, down;
    void *keys, *values;  // its pools
};

// One step: T tokens, in their order.
struct DecoderStep {
    float* total;   // (T, hidden), the residual stream
    void* partial;  // room for (T, hidden) of dtype, if there are other ranks
    int tokens;     // T
    const void *cos, *sin;
    const int64_t* slot_mapping;  // (T,)
    AttentionPlan* plan;          // these four are attention's alone
    // Of the last layer only what some tokens make of its keys and values may be wanted. These, ascending, are C; -1
    // without a choice.
    int chosen;
    const int64_t* choice;       // (C,)
    float* chosen_total;         // (C, hidden), their residual stream from that attention on
    AttentionPlan* chosen_plan;  // of C queries
};

struct FusedDecoder {
    DType dtype;
    int hidden, heads, kv_heads, head_dim, block_size;
    bool int8_cache;
    float eps;  // of all norms
    std::vector<DecoderLayer> layers;
    AddReduced add_reduced;  // null: the caller adds the ranks' partial results up, so it runs one sublayer at a time
    void* group;

    // Sublayers first to last - 1, of which layer i has two: 2 i, attention, and 2 i + 1, the MLP.
    //
    //     total ─┬─ norm ─ qkv ─ rope, store ─ attention ─ output ─┬─ (+) ─┬─ norm ─ gate_up, silu ─ down ─┬─ (+) ─ ...
    //            └──────────────────────────────────────────────────┘      └───────────────────────────────┘
    //
    // Each adds to the total. With room for partial results it leaves this rank's there, which add_reduced then sums
    // over the ranks and adds.
    void run(DecoderStep step, int first, int last) const;
};

}  // namespace phalanx
