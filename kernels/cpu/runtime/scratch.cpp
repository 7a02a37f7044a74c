#include "scratch.h"

#include <cstdlib>
#include <new>
#include <string>
#include <utility>

namespace phalanx {
namespace {

// What is short of memory, as a person reads it, in the order of Scratch.
constexpr const char* kPurposes[] = {"the sums of a linear layer",
                                     "the weights of a linear layer",
                                     "the rows that a linear layer multiplies",
                                     "the scales of quantized rows",
                                     "attention's scores and sums",
                                     "attention's sums before a tile",
                                     "attention's partial results of a task",
                                     "attention's partial results of all tasks",
                                     "a rotated head",
                                     "the rows of a weight that is packed",
                                     "normalised rows",
                                     "a layer's projected rows",
                                     "attention's results",
                                     "the queries of chosen tokens"};
static_assert(sizeof(kPurposes) / sizeof(kPurposes[0]) == static_cast<int>(Scratch::kCount), "a purpose has no text");

// A std::bad_alloc that says of what there was too little; Python sees a MemoryError.
class OutOfMemory : public std::bad_alloc {
 public:
    OutOfMemory(Scratch purpose, int64_t bytes)
        : message_("the CPU kernels cannot allocate " + std::to_string(bytes) + " bytes of scratch memory for " +
                   kPurposes[static_cast<int>(purpose)] +
                   ": free memory on this host, or set kv_memory or max_num_batched_tokens lower") {}
    const char* what() const noexcept override { return message_.c_str(); }

 private:
    std::string message_;
};

}  // namespace

void* scratch(Scratch purpose, int64_t bytes) {
    struct Buffer {
        void* memory = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(memory); }
    };
    static thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];
    Buffer& buffer = buffers[static_cast<int>(purpose)];
    if (buffer.size < bytes) {
        std::free(buffer.memory);
        // A quarter more, in whole pages: sizes that grow step by step need few new buffers.
        buffer.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        buffer.memory = std::aligned_alloc(64, buffer.size);
        if (buffer.memory == nullptr) throw OutOfMemory(purpose, std::exchange(buffer.size, 0));
    }
    return buffer.memory;
}

}  // namespace phalanx
