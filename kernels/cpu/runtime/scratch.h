// Memory that a thread uses again and again, by name.
#pragma once

#include <cstdint>

namespace phalanx {

// Each purpose says who uses it and until when. Two uses share one only if the first is over before the second begins:
// a thread is in one task at a time, and the caller of an operation is in its tasks as well.
enum class Scratch : int {
    // A task of a linear layer (gemm/linear.h, amx/gemm.h, amx/grouped.h), until the task ends.
    kLinearSums,     // C: the sums of a unit of columns, or of all the task's
    kLinearWeights,  // panels decoded, expanded or filled up to whole tiles; in amx/grouped.h also the groups' sums

    // x of a linear layer, until the last task of its chunk ends (run_chunk() in operations.cpp): of the caller, from
    // which all threads read, or of each thread.
    kPackedRows,  // as the kernels multiply them
    kRowScales,   // of rows that became integers

    // A task of attention, until it ends.
    kAttentionTask,    // queries, scores, weights, sums (attend/task.h, amx/attention.h)
    kSumsBefore,       // beside them: a step's sums before and after it, if values are not finite (amx/attention.h)
    kSegmentPartials,  // beside them: what each segment of the keys came to (amx/attention.h)

    // The caller's, in run_attention(): the partial results of all tasks, from the first task until the last merge.
    kTaskPartials,

    kRotatedHead,   // one token's key heads, normalised and rotated, until rope_token() ends (rows.h)
    kUnpackedRows,  // the rows of the panel that pack_weight() packs, until it has (gemm/weights.cpp)

    // The caller's, in a sublayer of a decoder layer (fused_decoder.cpp).
    kNormedRows,     // what the first projection multiplies, until it has
    kProjectedRows,  // attention: its qkv, until attention is done; MLP: silu(gate) * up, until `down` has multiplied
                     // it
    kAttendedRows,   // what attention brought, until the output projection has multiplied it
    kChosenQueries,  // of tokens that were chosen, until attention is done

    kCount,
};

// Memory of the calling thread, at least `bytes`, aligned to 64; good until this thread asks for the same purpose
// again. Throws std::bad_alloc.
void* scratch(Scratch purpose, int64_t bytes);

}  // namespace phalanx
