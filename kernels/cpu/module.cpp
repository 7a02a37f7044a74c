// Python's view: tensors come as addresses, their shapes as numbers. The caller has checked both. What computes does so
// without the GIL, which other threads of the process may need meanwhile.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "gemm/weights.h"
#include "runtime/dispatch.h"
#include "runtime/operations.h"
#include "runtime/pool.h"
#include "runtime/rates.h"
#include "runtime/fused_decoder.h"

namespace py = pybind11;
using namespace phalanx;

namespace {

template <class T = const void*>
T at(uintptr_t address) {
    return reinterpret_cast<T>(address);
}

// A weight's fields of Linear; multiply() fills in the others. `group` is in columns, words and groups follow from it.
Linear make_weight(uintptr_t weight, int kind, uintptr_t scales, uintptr_t sums, uintptr_t apart, int group,
                   int together, bool deterministic, int n, int k, int dtype) {
    Linear job{};
    job.dtype = static_cast<DType>(dtype);
    job.kind = static_cast<WeightKind>(kind);
    job.k = k;
    job.n = n;
    job.words = job.dtype == DType::kFloat32 ? k : k / 2;
    job.together = together;
    job.deterministic = deterministic;
    if (job.kind == WeightKind::kInt8 || job.kind == WeightKind::kW8A8) job.words = k / together;
    if (job.kind != WeightKind::kPlain && job.kind != WeightKind::kCompressed) {
        job.word_block = job.words * static_cast<int64_t>(group) / k;
        job.groups = (k + group - 1) / group;
    }
    job.weight = at(weight);
    job.scales = at<const bf16*>(scales);
    job.sums = at<const float*>(sums);
    job.apart = at<const uint32_t*>(apart);
    return job;
}

void linear(const Linear& weight, uintptr_t x, int64_t ldx, int m, uintptr_t bias, uintptr_t out, int64_t ldo,
            int output) {
    py::gil_scoped_release release;
    multiply(weight, {at<void*>(x), ldx}, m, at(bias), static_cast<Output>(output), {at<void*>(out), ldo});
}

// The rows of a step. Its tasks are planned when the first layer attends, for that layer's heads.
AttentionPlan make_plan(uintptr_t block_table, int64_t table_stride, uintptr_t cu_q, uintptr_t seqused_k, int rows) {
    AttentionPlan plan{};
    plan.job.block_table = at<const int64_t*>(block_table);
    plan.job.table_stride = table_stride;
    plan.job.cu_q = at<const int32_t*>(cu_q);
    plan.job.seqused_k = at<const int32_t*>(seqused_k);
    plan.rows = rows;
    return plan;
}

void attention(AttentionPlan& plan, int heads, int kv_heads, int head_dim, int block_size, uintptr_t q, int64_t ldq,
               uintptr_t keys, uintptr_t values, bool int8_cache, uintptr_t out, int dtype) {
    py::gil_scoped_release release;
    Attention layer{};
    layer.dtype = static_cast<DType>(dtype);
    layer.heads = heads;
    layer.kv_heads = kv_heads;
    layer.head_dim = head_dim;
    layer.block_size = block_size;
    layer.scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
    layer.q = at(q);
    layer.ldq = ldq;
    layer.keys = at(keys);
    layer.values = at(values);
    layer.int8_cache = int8_cache;
    layer.out = at<void*>(out);
    run_attention(plan, layer);
}

FusedDecoder make_fused_decoder(int dtype, int hidden, int heads, int kv_heads, int head_dim, int block_size,
                                bool int8_cache, float eps, uintptr_t add_reduced, uintptr_t group) {
    return {static_cast<DType>(dtype),   hidden,          heads, kv_heads, head_dim, block_size, int8_cache, eps, {},
            at<AddReduced>(add_reduced), at<void*>(group)};
}

// A weight, and the address of its bias or 0.
using PyProjection = std::pair<const Linear*, uintptr_t>;

Projection projection(const PyProjection& given) { return {*given.first, at(given.second)}; }

void add_layer(FusedDecoder& decoder, uintptr_t attention_norm, const PyProjection& qkv, uintptr_t q_norm,
               uintptr_t k_norm, const PyProjection& output, uintptr_t mlp_norm, const PyProjection& gate_up,
               const PyProjection& down, uintptr_t keys, uintptr_t values) {
    decoder.layers.push_back({at<const float*>(attention_norm), projection(qkv), at<const float*>(q_norm),
                              at<const float*>(k_norm), projection(output), at<const float*>(mlp_norm),
                              projection(gate_up), projection(down), at<void*>(keys), at<void*>(values)});
}

void run_fused_decoder(const FusedDecoder& decoder, int first, int last, uintptr_t total, uintptr_t partial, int tokens,
                       uintptr_t cos, uintptr_t sin, uintptr_t slot_mapping, AttentionPlan& plan, int chosen,
                       uintptr_t choice, uintptr_t chosen_total, AttentionPlan& chosen_plan) {
    py::gil_scoped_release release;
    decoder.run({at<float*>(total), at<void*>(partial), tokens, at(cos), at(sin), at<const int64_t*>(slot_mapping),
                 &plan, chosen, at<const int64_t*>(choice), at<float*>(chosen_total), &chosen_plan},
                first, last);
}

void norm(uintptr_t x, uintptr_t weight, float eps, uintptr_t out, int m, int size, int dtype) {
    py::gil_scoped_release release;
    run_norm({static_cast<DType>(dtype), at<const float*>(x), at<const float*>(weight), eps, at<void*>(out), m, size});
}

void rope(uintptr_t qkv, int64_t ld, uintptr_t cos, uintptr_t sin, uintptr_t q_norm, uintptr_t k_norm, float eps,
          uintptr_t keys, uintptr_t values, bool int8_cache, uintptr_t slot_mapping, int tokens, int heads,
          int kv_heads, int head_dim, int block_size, int dtype) {
    py::gil_scoped_release release;
    run_rope({static_cast<DType>(dtype), at<void*>(qkv), ld, at(cos), at(sin), at<const float*>(q_norm),
              at<const float*>(k_norm), eps, at<void*>(keys), at<void*>(values), int8_cache,
              at<const int64_t*>(slot_mapping), tokens, heads, kv_heads, head_dim, block_size});
}

void bind_layers(py::module_& m) {
    py::class_<Linear>(m, "Weight").def(py::init(&make_weight));
    py::class_<AttentionPlan>(m, "AttentionPlan").def(py::init(&make_plan));
    py::class_<FusedDecoder>(m, "FusedDecoder")
        .def(py::init(&make_fused_decoder))
        .def("add_layer", &add_layer)
        .def("run", &run_fused_decoder);
    m.def("linear", &linear);
    m.def("attention", &attention);
    m.def("norm", &norm);
    m.def("rope", &rope);
}

void bind_weights(py::module_& m) {
    m.def("pack_weight", [](uintptr_t weight, int64_t n, int64_t k, int dtype) {
        py::gil_scoped_release release;
        pack_weight(static_cast<DType>(dtype), at<void*>(weight), n, k);
    });
    m.def("copy_panels", [](uintptr_t panels, int64_t n, int64_t k, int dtype, uintptr_t to) {
        py::gil_scoped_release release;
        copy_panels(static_cast<DType>(dtype), at(panels), n, k, at<void*>(to));
    });
    m.def("look_up",
          [](uintptr_t weight, int64_t n, int64_t k, uintptr_t rows, int64_t count, uintptr_t out, int dtype) {
              py::gil_scoped_release release;
              look_up(static_cast<DType>(dtype), at(weight), n, k, at<const int64_t*>(rows), count, at<void*>(out));
          });
    m.attr("GROUP_BYTES") = kGroupWords * kPanel * 4;  // of one that stands apart
    m.def("compressed_bytes", [](int64_t n, int64_t k) { return n / kPanel * compressed_bytes(k / 2); });
    m.def("compress_weight",
          [](uintptr_t weight, int64_t n, int64_t k, uintptr_t to, uintptr_t apart, uintptr_t firsts) {
              py::gil_scoped_release release;
              return compress_weight(at(weight), n, k, at<void*>(to), at<void*>(apart), at<int64_t*>(firsts));
          });
    m.def("look_up_compressed",
          [](uintptr_t weight, uintptr_t apart, int64_t n, int64_t k, uintptr_t rows, int64_t count, uintptr_t out) {
              py::gil_scoped_release release;
              look_up_compressed(at(weight), at(apart), n, k, at<const int64_t*>(rows), count, at<void*>(out));
          });
}

void bind_quantization(py::module_& m) {
    m.def("quantize_int8", [](uintptr_t weight, int64_t n, int64_t k, int together, int64_t group, uintptr_t numbers,
                              uintptr_t scales, uintptr_t sums) {
        py::gil_scoped_release release;
        quantize_int8(at(weight), n, k, together, group, at<void*>(numbers), at<bf16*>(scales), at<float*>(sums));
    });
    m.def("quantize_int4",
          [](uintptr_t weight, int64_t n, int64_t k, int64_t group, uintptr_t numbers, uintptr_t scales) {
              py::gil_scoped_release release;
              quantize_int4(at(weight), n, k, group, at<void*>(numbers), at<bf16*>(scales));
          });
    m.def("look_up_int8", [](uintptr_t numbers, uintptr_t scales, int64_t n, int64_t k, int together, int64_t group,
                             uintptr_t rows, int64_t count, uintptr_t out) {
        py::gil_scoped_release release;
        look_up_int8(at(numbers), at<const bf16*>(scales), n, k, together, group, at<const int64_t*>(rows), count,
                     at<void*>(out));
    });
}

void bind_sampling(py::module_& m) {
    m.def("argmax", [](uintptr_t rows, int64_t count, int64_t size, uintptr_t values, uintptr_t indices) {
        py::gil_scoped_release release;
        run_argmax(at<const float*>(rows), count, size, at<float*>(values), at<int64_t*>(indices));
    });
    m.def("gumbel_argmax", [](uintptr_t rows, int64_t count, int64_t size, uintptr_t temperatures, uintptr_t seeds,
                              uintptr_t counters, uintptr_t values, uintptr_t indices) {
        py::gil_scoped_release release;
        run_gumbel_argmax(at<const float*>(rows), count, size, at<const float*>(temperatures),
                          at<const int64_t*>(seeds), at<const int64_t*>(counters), at<float*>(values),
                          at<int64_t*>(indices));
    });
    m.def("block_maxima", [](uintptr_t rows, int64_t count, int64_t size, int64_t block, uintptr_t out) {
        py::gil_scoped_release release;
        run_block_maxima(at<const float*>(rows), count, size, block, at<float*>(out));
    });
    m.def("mask", [](uintptr_t rows, uintptr_t indices, int64_t count, int64_t size, uintptr_t bits, int64_t words,
                     int64_t offset) {
        py::gil_scoped_release release;
        run_mask(at<float*>(rows), at<const int64_t*>(indices), count, size, at<const uint32_t*>(bits), words, offset);
    });
}

void bind_threads(py::module_& m) {
    m.def(
        "set_threads",
        [](int count, const std::vector<int>& cpus) {
            if (!cpus.empty() && static_cast<int>(cpus.size()) != count)
                throw py::value_error(std::to_string(cpus.size()) + " CPUs for " + std::to_string(count) +
                                      " threads; give one for each, or none");
            // Without the GIL, for it waits for an operation that is under way.
            int error = 0;
            {
                py::gil_scoped_release release;
                error = set_threads(count, cpus);
            }
            if (error != 0) {
                errno = error;
                PyErr_SetFromErrno(PyExc_OSError);
                throw py::error_already_set();
            }
        },
        py::arg("count"), py::arg("cpus") = std::vector<int>());
    m.def("threads", &threads);
    m.def("bound", &bound);
}

void bind_kernels(py::module_& m) {
    m.def("kernels", [] { return std::string(kernels().name); });
    m.def("use_kernels", [](const std::string& name) {
        const Kernels* found = find_kernels(name.c_str());
        if (found == nullptr) throw py::value_error("this processor cannot run the kernels " + name);
        use_kernels(found);
    });
    m.attr("MOST_INTEGER_ROWS") = kMostIntegerRows;
    m.def("int8_together", [] {  // numbers of a row that an int8 weight has side by side
        Linear job{};
        job.dtype = DType::kBFloat16;
        return by_tiles(kernels(), job) ? 4 : 2;
    });
    m.def("can_run", [](const std::string& name) { return find_kernels(name.c_str()) != nullptr; });
}

void bind_rates(py::module_& m) {
    m.def("read_rate", [](int64_t bytes, double seconds) {
        py::gil_scoped_release release;
        return read_rate(bytes, seconds);
    });
    m.def("cache_rate", [](int level, double seconds) {
        py::gil_scoped_release release;
        return cache_rate(level, seconds);
    });
    m.def("multiply_rate", [](int64_t steps, double seconds) {
        py::gil_scoped_release release;
        return multiply_rate(steps, seconds);
    });
    m.def(
        "tile_rate",
        [](bool int8, int64_t steps, double seconds) {
            py::gil_scoped_release release;
            return tile_rate(int8, steps, seconds);
        },
        py::arg("int8"), py::arg("steps"), py::arg("seconds") = 0.0);
}

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "phalanx's arithmetic on CPUs";
    bind_layers(m);
    bind_weights(m);
    bind_quantization(m);
    bind_sampling(m);
    bind_threads(m);
    bind_kernels(m);
    bind_rates(m);
}
