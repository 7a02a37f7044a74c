#include "stack.h"

#include <cmath>

#include "pool.h"

namespace phalanx {
namespace {

constexpr int kNormed = 8, kProduct = 9, kAttended = 10;  // places in scratch()

int64_t item_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

void* normed(const DecoderStack& stack, const StackStep& step, const float* weight) {
    void* x = scratch(kNormed, item_bytes(stack.dtype) * step.tokens * stack.hidden);
    run_norm({stack.dtype, step.total, weight, stack.eps, x, step.tokens, stack.hidden});
    return x;
}

// The second projection of a half: added at once, or left for the other ranks' parts to be added.
void project(const Projection& last, const StackStep& step, const void* x) {
    const bool alone = step.partial == nullptr;
    multiply(last.weight, x, last.weight.k, step.tokens, last.bias, alone ? Output::kAddFloat : Output::kStore,
             alone ? step.total : step.partial, last.weight.n);
}

void run_attention_half(const DecoderStack& stack, const DecoderLayer& layer, const StackStep& step) {
    const int64_t item = item_bytes(stack.dtype);
    const void* x = normed(stack, step, layer.attention_norm);
    void* qkv = scratch(kProduct, item * step.tokens * layer.qkv.weight.n);
    void* attended = scratch(kAttended, item * step.tokens * layer.output.weight.k);
    multiply(layer.qkv.weight, x, stack.hidden, step.tokens, layer.qkv.bias, Output::kStore, qkv, layer.qkv.weight.n);
    run_rope({stack.dtype, qkv, layer.qkv.weight.n, step.cos, step.sin, layer.q_norm, layer.k_norm, stack.eps,
              layer.keys, layer.values, stack.int8_cache, step.slots, step.tokens, stack.heads, stack.kv_heads,
              stack.head_dim, stack.block_size});
    Attention job{};
    job.dtype = stack.dtype;
    job.q = qkv;
    job.ldq = layer.qkv.weight.n;
    job.keys = layer.keys;
    job.values = layer.values;
    job.int8_cache = stack.int8_cache;
    job.heads = stack.heads;
    job.kv_heads = stack.kv_heads;
    job.head_dim = stack.head_dim;
    job.block_size = stack.block_size;
    job.scale = 1.0f / std::sqrt(static_cast<float>(stack.head_dim));
    job.out = attended;
    run_attention(*step.plan, job);
    project(layer.output, step, attended);
}

void run_mlp_half(const DecoderStack& stack, const DecoderLayer& layer, const StackStep& step) {
    const void* x = normed(stack, step, layer.mlp_norm);
    void* product = scratch(kProduct, item_bytes(stack.dtype) * step.tokens * layer.down.weight.k);
    multiply(layer.gate_up.weight, x, stack.hidden, step.tokens, layer.gate_up.bias, Output::kSiluMul, product,
             layer.down.weight.k);
    project(layer.down, step, product);
}

}  // namespace

void DecoderStack::run(const StackStep& step, int first, int last) const {
    for (int half = first; half < last; ++half) {
        const DecoderLayer& layer = layers[half / 2];
        half % 2 == 0 ? run_attention_half(*this, layer, step) : run_mlp_half(*this, layer, step);
        if (step.partial == nullptr || add_reduced == nullptr) continue;
        const int64_t count = static_cast<int64_t>(step.tokens) * hidden;
        add_reduced(group, step.partial, count, static_cast<int>(item_bytes(dtype)), step.total);
    }
}

}  // namespace phalanx
