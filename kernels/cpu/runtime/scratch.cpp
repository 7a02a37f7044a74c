#include "scratch.h"

#include <cstdlib>
#include <new>

namespace phalanx {

void* scratch(Scratch slot, int64_t bytes) {
    struct Buffer {
        void* memory = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(memory); }
    };
    static thread_local Buffer buffers[static_cast<int>(Scratch::kCount)];
    Buffer& buffer = buffers[static_cast<int>(slot)];
    if (buffer.size < bytes) {
        std::free(buffer.memory);
        // A quarter more, in whole pages: sizes that grow step by step need few new buffers.
        buffer.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        buffer.memory = std::aligned_alloc(64, buffer.size);
        if (buffer.memory == nullptr) {
            buffer.size = 0;
            throw std::bad_alloc();
        }
    }
    return buffer.memory;
}

}  // namespace phalanx
