#include "fused_decoder.h"

#include <cmath>
#include <cstring>

#include "scratch.h"

namespace phalanx {
namespace {

// Room for what a projection multiplies, as it had best stand.
Rows room_for(const Projection& projection, const DecoderStep& step, Scratch purpose) {
    const Linear& weight = projection.weight;
    return {scratch(purpose, rows_bytes(weight.dtype, step.tokens, weight.k)), weight.k,
            wants_tiles(weight, step.tokens)};
}

// The normed residual stream, as `first` had best multiply it.
Rows normed(const FusedDecoder& decoder, const DecoderStep& step, const float* norm, const Projection& first) {
    const Rows x = room_for(first, step, Scratch::kNormedRows);
    run_norm({decoder.dtype, step.total, norm, decoder.eps, x.first, step.tokens, decoder.hidden, x.tiles});
    return x;
}

// The last projection of a sublayer: added at once, or left for the other ranks' parts to be added.
void project(const Projection& last, const DecoderStep& step, Rows x) {
    const bool alone = step.partial == nullptr;
    multiply(last.weight, x, step.tokens, last.bias, alone ? Output::kAddFloat : Output::kStore,
             {alone ? step.total : step.partial, last.weight.n});
}

// Rows of `from`, `stride` bytes apart, one behind the other.
void gather_rows(const void* from, int64_t stride, const int64_t* rows, int count, int64_t bytes, void* to) {
    for (int i = 0; i < count; ++i)
        std::memcpy(static_cast<char*>(to) + i * bytes, static_cast<const char*>(from) + rows[i] * stride, bytes);
}

// With `choose` the tokens of the choice alone go on.
void run_attention_sublayer(const FusedDecoder& decoder, const DecoderLayer& layer, DecoderStep& step, bool choose) {
    const int64_t item = element_bytes(decoder.dtype);
    void* qkv = scratch(Scratch::kProjectedRows, item * step.tokens * layer.qkv.weight.n);
    multiply(layer.qkv.weight, normed(decoder, step, layer.attention_norm, layer.qkv), step.tokens, layer.qkv.bias,
             Output::kStore, {qkv, layer.qkv.weight.n});
    run_rope({decoder.dtype, qkv, layer.qkv.weight.n, step.cos, step.sin, layer.q_norm, layer.k_norm, decoder.eps,
              layer.keys, layer.values, decoder.int8_cache, step.slot_mapping, step.tokens, decoder.heads,
              decoder.kv_heads, decoder.head_dim, decoder.block_size});

    Attention job{};
    job.q = qkv;
    job.ldq = layer.qkv.weight.n;

    // From here on the step is that of the chosen tokens: their queries, their residual stream, their plan.
    const int64_t width = layer.output.weight.k;  // of the queries, which come first
    if (choose) {
        void* queries = scratch(Scratch::kChosenQueries, item * step.chosen * width);
        gather_rows(qkv, item * job.ldq, step.choice, step.chosen, item * width, queries);
        const int64_t row = sizeof(float) * decoder.hidden;
        gather_rows(step.total, row, step.choice, step.chosen, row, step.chosen_total);
        step.total = step.chosen_total;
        step.tokens = step.chosen;
        step.plan = step.chosen_plan;
        job.q = queries;
        job.ldq = width;
    }
    if (step.tokens == 0) return;

    const Rows attended = room_for(layer.output, step, Scratch::kAttendedRows);
    job.dtype = decoder.dtype;
    job.keys = layer.keys;
    job.values = layer.values;
    job.int8_cache = decoder.int8_cache;
    job.heads = decoder.heads;
    job.kv_heads = decoder.kv_heads;
    job.head_dim = decoder.head_dim;
    job.block_size = decoder.block_size;
    job.scale = 1.0f / std::sqrt(static_cast<float>(decoder.head_dim));
    job.out = attended.first;
    job.out_tiles = attended.tiles;
    run_attention(*step.plan, job);

    project(layer.output, step, attended);
}

void run_mlp_sublayer(const FusedDecoder& decoder, const DecoderLayer& layer, const DecoderStep& step) {
    const Rows product = room_for(layer.down, step, Scratch::kProjectedRows);
    multiply(layer.gate_up.weight, normed(decoder, step, layer.mlp_norm, layer.gate_up), step.tokens,
             layer.gate_up.bias, Output::kSiluMul, product);
    project(layer.down, step, product);
}

}  // namespace

void FusedDecoder::run(DecoderStep step, int first, int last) const {
    const int last_attention = 2 * static_cast<int>(layers.size()) - 2;
    for (int sublayer = first; sublayer < last && step.tokens > 0; ++sublayer) {
        const DecoderLayer& layer = layers[sublayer / 2];
        if (sublayer % 2 == 0) {
            run_attention_sublayer(*this, layer, step, sublayer == last_attention && step.chosen >= 0);
        } else {
            run_mlp_sublayer(*this, layer, step);
        }

        if (step.partial == nullptr || add_reduced == nullptr || step.tokens == 0) continue;
        const int64_t count = static_cast<int64_t>(step.tokens) * hidden;
        add_reduced(group, step.partial, count, element_bytes(dtype), step.total);
    }
}

}  // namespace phalanx
