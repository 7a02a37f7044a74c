#include "stack.h"

#include <cmath>
#include <cstring>

#include "scratch.h"

namespace phalanx {
namespace {

// Room for what a projection multiplies, as it had best stand.
Rows room_for(const Projection& projection, const StackStep& step, Scratch slot) {
    const Linear& weight = projection.weight;
    return {scratch(slot, rows_bytes(weight.dtype, step.tokens, weight.k)), weight.k, wants_tiles(weight, step.tokens)};
}

// The normed residual stream, as `first` had best multiply it.
Rows normed(const DecoderStack& stack, const StackStep& step, const float* norm, const Projection& first) {
    const Rows x = room_for(first, step, Scratch::kNormedRows);
    run_norm({stack.dtype, step.total, norm, stack.eps, x.first, step.tokens, stack.hidden, x.tiles});
    return x;
}

// The last projection of a sublayer: added at once, or left for the other ranks' parts to be added.
void project(const Projection& last, const StackStep& step, Rows x) {
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
void run_attention_sublayer(const DecoderStack& stack, const DecoderLayer& layer, StackStep& step, bool choose) {
    const int64_t item = element_bytes(stack.dtype);
    void* qkv = scratch(Scratch::kProjectedRows, item * step.tokens * layer.qkv.weight.n);
    multiply(layer.qkv.weight, normed(stack, step, layer.attention_norm, layer.qkv), step.tokens, layer.qkv.bias,
             Output::kStore, {qkv, layer.qkv.weight.n});
    run_rope({stack.dtype, qkv, layer.qkv.weight.n, step.cos, step.sin, layer.q_norm, layer.k_norm, stack.eps,
              layer.keys, layer.values, stack.int8_cache, step.slots, step.tokens, stack.heads, stack.kv_heads,
              stack.head_dim, stack.block_size});

    Attention job{};
    job.q = qkv;
    job.ldq = layer.qkv.weight.n;

    // From here on the step is that of the chosen tokens: their queries, their residual stream, their plan.
    const int64_t width = layer.output.weight.k;  // of the queries, which come first
    if (choose) {
        void* queries = scratch(Scratch::kChosenQueries, item * step.chosen * width);
        gather_rows(qkv, item * job.ldq, step.choice, step.chosen, item * width, queries);
        const int64_t row = sizeof(float) * stack.hidden;
        gather_rows(step.total, row, step.choice, step.chosen, row, step.chosen_total);
        step.total = step.chosen_total;
        step.tokens = step.chosen;
        step.plan = step.chosen_plan;
        job.q = queries;
        job.ldq = width;
    }
    if (step.tokens == 0) return;

    const Rows attended = room_for(layer.output, step, Scratch::kAttendedRows);
    job.dtype = stack.dtype;
    job.keys = layer.keys;
    job.values = layer.values;
    job.int8_cache = stack.int8_cache;
    job.heads = stack.heads;
    job.kv_heads = stack.kv_heads;
    job.head_dim = stack.head_dim;
    job.block_size = stack.block_size;
    job.scale = 1.0f / std::sqrt(static_cast<float>(stack.head_dim));
    job.out = attended.first;
    job.out_tiles = attended.tiles;
    run_attention(*step.plan, job);

    project(layer.output, step, attended);
}

void run_mlp_sublayer(const DecoderStack& stack, const DecoderLayer& layer, const StackStep& step) {
    const Rows product = room_for(layer.down, step, Scratch::kProjectedRows);
    multiply(layer.gate_up.weight, normed(stack, step, layer.mlp_norm, layer.gate_up), step.tokens, layer.gate_up.bias,
             Output::kSiluMul, product);
    project(layer.down, step, product);
}

}  // namespace

void DecoderStack::run(StackStep step, int first, int last) const {
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
