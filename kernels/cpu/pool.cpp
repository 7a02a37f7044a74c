#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace phalanx {
namespace {

constexpr int kSpins = 4000;  // some 50-100 us: longer than Python takes between the operations of a layer
constexpr int kSpinsBeforeYield = 1 << 14;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

struct Pool {
    // Tasks not yet taken, in the low half, under the operation's number. Taking one is a compare-and-swap of both, so
    // a thread that slept through an operation cannot take part in it with the fields of the next.
    alignas(64) std::atomic<uint64_t> open{0};
    alignas(64) std::atomic<int> unfinished{0};
    alignas(64) std::atomic<uint32_t> operation{0};
    std::atomic<int> sleepers{0};
    std::atomic<bool> stopping{false};
    Task task = nullptr;
    void* context = nullptr;
    int total = 0;
    std::mutex busy;
    std::vector<std::thread> workers;
    int wanted = 1;

    bool take_one() {
        uint64_t seen = open.load(std::memory_order_acquire);
        while (static_cast<uint32_t>(seen) != 0) {
            if (open.compare_exchange_weak(seen, seen - 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
                task(context, total - static_cast<int>(static_cast<uint32_t>(seen)));
                unfinished.fetch_sub(1, std::memory_order_release);
                return true;
            }
        }
        return false;
    }

    void work() {
        uint32_t seen = operation.load(std::memory_order_acquire);
        while (!stopping.load(std::memory_order_relaxed)) {
            while (take_one()) {
            }
            int spins = 0;
            while (operation.load(std::memory_order_acquire) == seen && ++spins < kSpins) relax();
            if (operation.load(std::memory_order_acquire) == seen) {
                sleepers.fetch_add(1, std::memory_order_seq_cst);
                if (operation.load(std::memory_order_seq_cst) == seen) futex_wait(operation, seen);
                sleepers.fetch_sub(1, std::memory_order_relaxed);
            }
            seen = operation.load(std::memory_order_acquire);
        }
    }

    void announce() {
        operation.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst) > 0) futex_wake(operation);
    }

    void start() {
        while (static_cast<int>(workers.size()) < wanted - 1) workers.emplace_back([this] { work(); });
    }

    void stop() {
        stopping.store(true);
        announce();
        for (auto& worker : workers) worker.join();
        workers.clear();
        stopping.store(false);
    }

    void run(int tasks, Task body, void* with) {
        start();
        task = body;
        context = with;
        total = tasks;
        unfinished.store(tasks, std::memory_order_relaxed);
        uint64_t number = static_cast<uint64_t>(operation.load(std::memory_order_relaxed)) + 1;
        open.store(number << 32 | static_cast<uint32_t>(tasks), std::memory_order_release);
        announce();
        while (take_one()) {
        }
        int spins = 0;
        while (unfinished.load(std::memory_order_acquire) != 0) {
            if (++spins < kSpinsBeforeYield) {
                relax();
            } else {
                std::this_thread::yield();
            }
        }
    }
};

Pool* pool = nullptr;

// Never destroyed: at exit its threads may still be waiting.
Pool& the_pool() {
    static const bool made = [] {
        pool = new Pool;
        // A forked child has none of its parent's threads: it starts with a pool of its own.
        pthread_atfork(nullptr, nullptr, [] {
            int wanted = pool->wanted;
            pool = new Pool;
            pool->wanted = wanted;
        });
        return true;
    }();
    (void)made;
    return *pool;
}

}  // namespace

void set_threads(int threads) {
    Pool& current = the_pool();
    std::lock_guard<std::mutex> lock(current.busy);
    threads = std::max(1, threads);
    if (threads < current.wanted) current.stop();
    current.wanted = threads;
}

int threads() { return the_pool().wanted; }

void run_tasks(int tasks, Task task, void* context) {
    if (tasks <= 0) return;
    Pool& current = the_pool();
    if (tasks > 1 && current.wanted > 1 && current.busy.try_lock()) {
        std::lock_guard<std::mutex> lock(current.busy, std::adopt_lock);
        current.run(tasks, task, context);
        return;
    }
    for (int i = 0; i < tasks; ++i) task(context, i);
}

void* scratch(int slot, int64_t bytes) {
    struct Buffer {
        void* memory = nullptr;
        int64_t size = 0;
        ~Buffer() { std::free(memory); }
    };
    static thread_local Buffer buffers[8];
    Buffer& buffer = buffers[slot];
    if (buffer.size < bytes) {
        std::free(buffer.memory);
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
