#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace phalanx {
namespace {

constexpr int kSpins = 10000;               // some 200 us: longer than Python takes between the operations of a layer
constexpr int kSpinsBeforeYield = 1 << 14;  // of a caller whose tasks others are still at

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Sleeps while `word` is `seen`: the kernel compares again, so no wake-up is lost.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

// Lets the calling thread run on one CPU alone. Returns 0, or the system's error number. A host may have more CPUs than
// a cpu_set_t holds.
int run_on(int cpu) {
    if (cpu < 0) return EINVAL;
    cpu_set_t* set = CPU_ALLOC(cpu + 1);
    if (set == nullptr) return ENOMEM;
    const size_t bytes = CPU_ALLOC_SIZE(cpu + 1);
    CPU_ZERO_S(bytes, set);
    CPU_SET_S(cpu, bytes, set);
    const int error = pthread_setaffinity_np(pthread_self(), bytes, set);
    CPU_FREE(set);
    return error;
}

// Tasks that one thread takes from the front and others, when they have none left, from the back: neighbouring tasks
// read neighbouring memory. One word, so that either is a compare-and-swap: the first task and the one past the last.
struct alignas(64) Share {
    std::atomic<uint64_t> range{0};

    // A task of this share, or -1.
    int take(bool from_front) {
        uint64_t seen = range.load(std::memory_order_acquire);
        while (true) {
            uint32_t first = static_cast<uint32_t>(seen), last = static_cast<uint32_t>(seen >> 32);
            if (first >= last) return -1;
            uint64_t left = from_front ? pack(first + 1, last) : pack(first, last - 1);
            if (range.compare_exchange_weak(seen, left, std::memory_order_acq_rel, std::memory_order_acquire))
                return static_cast<int>(from_front ? first : last - 1);
        }
    }

    static uint64_t pack(uint32_t first, uint32_t last) { return static_cast<uint64_t>(last) << 32 | first; }
};

constexpr int kMaxThreads = 256;

std::atomic<void (*)()> on_idle{nullptr};

// Runs what set_idle() was given, as the kernels give up their tiles.
void become_idle() {
    if (auto* idle = on_idle.load(std::memory_order_relaxed)) idle();
}

// The caller's end of an operation, also of one that throws.
struct BecomeIdle {
    ~BecomeIdle() { become_idle(); }
};

// The threads, and the operation that they are at. Shares, and the counters that all watch, begin cache lines of their
// own.
struct Pool {
    Share shares[kMaxThreads];
    alignas(64) std::atomic<int> unfinished{0};
    alignas(64) std::atomic<uint32_t> operation{0};
    std::atomic<int> sleepers{0};
    std::atomic<bool> stopping{false};
    Task task = nullptr;
    void* context = nullptr;
    std::atomic<bool> failed{false};  // whether one of the operation's tasks has thrown
    std::exception_ptr failure;       // what the first of them threw, for the caller
    std::mutex busy;
    std::vector<std::thread> workers;
    std::atomic<int> wanted{1};
    std::vector<int> cpus;        // one for each thread, the caller included, or none: then the system chooses
    std::atomic<int> settled{0};  // workers that have tried to go to their CPU
    std::atomic<int> refused{0};  // the error number of one that may not

    // The operation's fields are read after a task was taken: they stay as they are until that task is done. Whoever
    // slept through an operation finds its shares empty, or those of the next one, which it may take from as well.
    void take_all(int self) {
        for (int offset = 0; offset < wanted; ++offset) {
            int owner = (self + offset) % wanted, number;
            while ((number = shares[owner].take(offset == 0)) >= 0) {
                run_one(number);
                unfinished.fetch_sub(1, std::memory_order_release);
            }
        }
    }

    // A task that throws is done as well: an exception that left a worker would end the process, and one that left the
    // caller at once would leave the others with a context that is gone. run() throws the first when all are done.
    void run_one(int number) {
        try {
            task(context, number);
        } catch (...) {
            if (!failed.exchange(true, std::memory_order_relaxed)) failure = std::current_exception();
        }
    }

    // A worker's life: it takes tasks, spins for a while until the next operation, and then sleeps.
    void work(int self) {
        uint32_t seen = operation.load(std::memory_order_acquire);
        while (!stopping.load(std::memory_order_relaxed)) {
            take_all(self);
            int spins = 0;
            while (operation.load(std::memory_order_acquire) == seen && ++spins < kSpins) relax();
            if (operation.load(std::memory_order_acquire) == seen) {
                // Either announce() sees this sleeper, or the sleeper sees the operation that it announces: both are
                // sequentially consistent.
                become_idle();
                sleepers.fetch_add(1, std::memory_order_seq_cst);
                if (operation.load(std::memory_order_seq_cst) == seen) futex_wait(operation, seen);
                sleepers.fetch_sub(1, std::memory_order_relaxed);
            }
            seen = operation.load(std::memory_order_acquire);
        }
    }

    // Begins an operation: whoever spins sees it, whoever sleeps is woken.
    void announce() {
        operation.fetch_add(1, std::memory_order_seq_cst);
        if (sleepers.load(std::memory_order_seq_cst) > 0) futex_wake(operation);
    }

    void start() {
        while (static_cast<int>(workers.size()) < wanted - 1) {
            int self = static_cast<int>(workers.size()) + 1;
            try {
                workers.emplace_back([this, self] {
                    settle(self);
                    work(self);
                });
            } catch (const std::system_error& error) {
                throw std::runtime_error("the system does not start thread " + std::to_string(self) + " of " +
                                         std::to_string(wanted) + " of the CPU kernels (" + error.what() +
                                         "): raise its limits (ulimit -u, ulimit -v), or set fewer threads");
            }
        }
    }

    // A worker's beginning: under a name that a person finds in /proc, on its own CPU.
    void settle(int self) {
        pthread_setname_np(pthread_self(), "phalanx-pool");
        const int error = cpus.empty() ? 0 : run_on(cpus[self]);
        if (error != 0) refused.store(error, std::memory_order_relaxed);
        settled.fetch_add(1, std::memory_order_release);
    }

    // Starts the workers and returns once each is on its CPU: 0, or the error number of one that may not.
    int start_on_cpus() {
        start();
        while (settled.load(std::memory_order_acquire) < static_cast<int>(workers.size())) std::this_thread::yield();
        return refused.load(std::memory_order_relaxed);
    }

    void stop() {
        stopping.store(true);
        announce();
        for (auto& worker : workers) worker.join();
        workers.clear();
        stopping.store(false);
        settled.store(0);
        refused.store(0);
    }

    // Runs the tasks and returns, or throws what the first that failed threw, when all are done. Thread i's share is
    // the i-th part of them; the caller is thread 0.
    void run(int tasks, Task body, void* with) {
        start();
        task = body;
        context = with;
        unfinished.store(tasks, std::memory_order_relaxed);
        for (int64_t i = 0; i < wanted; ++i)
            shares[i].range.store(Share::pack(tasks * i / wanted, tasks * (i + 1) / wanted), std::memory_order_release);
        announce();
        take_all(0);

        int spins = 0;
        while (unfinished.load(std::memory_order_acquire) != 0) {
            if (++spins < kSpinsBeforeYield) {
                relax();
            } else {
                std::this_thread::yield();
            }
        }

        if (failed.exchange(false, std::memory_order_relaxed)) std::rethrow_exception(std::exchange(failure, nullptr));
    }
};

Pool* pool = nullptr;

// Never destroyed: at exit its threads may still be waiting.
Pool& the_pool() {
    static const bool made = [] {
        pool = new Pool;
        // A forked child has none of its parent's threads: it starts with a pool of its own, on CPUs that the system
        // chooses, for the parent computes on the others.
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

int set_threads(int threads, const std::vector<int>& cpus) {
    Pool& current = the_pool();
    std::lock_guard<std::mutex> lock(current.busy);
    threads = std::min(kMaxThreads, std::max(1, threads));
    if (threads < current.wanted || cpus != current.cpus) current.stop();
    current.wanted = threads;
    current.cpus = cpus;

    const int error = cpus.empty() ? 0 : current.start_on_cpus();
    if (error != 0) {
        current.stop();
        current.cpus.clear();
    }
    return error;
}

int threads() { return the_pool().wanted; }

bool bound() { return !the_pool().cpus.empty(); }

void run_tasks(int tasks, Task task, void* context) {
    if (tasks <= 0) return;
    Pool& current = the_pool();
    const BecomeIdle at_the_end;
    if (tasks > 1 && current.wanted > 1 && current.busy.try_lock()) {
        std::lock_guard<std::mutex> lock(current.busy, std::adopt_lock);
        current.run(tasks, task, context);
    } else {
        for (int i = 0; i < tasks; ++i) task(context, i);
    }
}

void set_idle(void (*idle)()) { on_idle.store(idle, std::memory_order_relaxed); }

}  // namespace phalanx
