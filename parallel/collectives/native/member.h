// A rank's end of a segment that several processes map: flags, waiting for one another, and noticing who has gone.
//
//     segment    [page 0: a nonce][Line of rank 0][Line of rank 1] ... [to a whole page][data of the operations]
//     Line       [flag][sleepers][state][waited_ns][signatures of rounds of parity 0, 1]      128 bytes
//
// (128 and not 64: many processors fetch cache lines in pairs, and a rank's flag is not to travel because its
// neighbour's did.)
//
// Every rank has a Line: a counter that only it advances (its flag), and a count of the ranks asleep on it. A rank
// waits for another by watching that rank's flag, first awake and then in a futex. No lost wake-up: the publisher
// stores its flag and then loads `sleepers`, the sleeper adds to `sleepers` and then loads the flag, all sequentially
// consistent, so one of the two sees the other; and the kernel compares the flag again before it lets the sleeper
// sleep.
#pragma once

#include <fcntl.h>
#include <linux/futex.h>
#include <pybind11/pybind11.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace phalanx {

namespace py = pybind11;
using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr size_t kPage = 4096;
constexpr size_t kReleaseBytes = 128 << 10;  // an operation on more lets other Python threads run from its start
constexpr auto kTick = milliseconds(200);    // how often a sleeper looks whether the others live
constexpr int kLooks = 16;                   // at a flag, between looks at the clock
constexpr auto kAwhile = microseconds(100);  // how long a rank yields its core before it sleeps
// To yield among ranks costs next to nothing, but a busy stranger on the same core then computes for milliseconds,
// while it is interrupted at once for a sleeper that is woken. So a rank whose yield took long only sleeps for a time.
constexpr auto kSlice = microseconds(200);
constexpr auto kCrowded = milliseconds(1000);

struct Failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

enum State : uint32_t { kOpen = 0, kClosed = 1, kGaveUp = 2 };

// What one rank publishes to the others. `signatures` belong to the last two rounds and are published by the flag.
// `waited_ns` is written only together with the flag: a write of its own would take the line from those who watch it.
struct alignas(128) Line {
    std::atomic<uint32_t> flag;
    std::atomic<uint32_t> sleepers;
    std::atomic<uint32_t> state;
    std::atomic<uint64_t> waited_ns;
    uint64_t signatures[2];
};
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4);
static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(Line) == 128);

inline bool reached(uint32_t value, uint32_t target) { return int32_t(value - target) >= 0; }

// Not the private kind of futex: the waiters are other processes.
inline void wake_all(std::atomic<uint32_t>& word) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

inline void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
    const timespec tick{0, std::chrono::nanoseconds(kTick).count()};
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, value, &tick, nullptr, 0);
}

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// A POSIX lock on the segment's byte `rank` shows that the rank lives: the kernel drops it when the process ends,
// however it ends; a forked child does not inherit it; no pid can be mistaken for another.
inline struct flock lock_on(int rank) {
    struct flock lock{};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    lock.l_start = rank;
    lock.l_len = 1;
    return lock;
}

// One rank's end of a segment. Owns the file descriptor once constructed.
class Member {
 public:
    Member(int fd, int rank, int size, size_t data_bytes, double timeout_s, int spin_us)
        : rank_(rank),
          size_(size),
          seen_(size, 0),
          fd_(fd),
          bytes_(data_offset(size) + data_bytes),
          owner_(getpid()),
          timeout_(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s))),
          spin_(spin_us) {
        struct flock lock = lock_on(rank);
        if (fcntl(fd, F_SETLK, &lock) != 0) throw std::runtime_error("cannot lock the segment");
        void* map = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
        if (map == MAP_FAILED) throw std::runtime_error("cannot map the segment");
        map_ = static_cast<char*>(map);
    }
    Member(const Member&) = delete;
    Member& operator=(const Member&) = delete;
    ~Member() { close(); }

    // Publishes that this rank leaves. While another thread is in an operation, that operation fails and the memory
    // goes when it ends.
    void close() {
        if (map_ == nullptr || closed_.exchange(true)) return;
        if (getpid() == owner_) announce(kClosed);
        if (busy_ == nullptr) release();
    }

    // Seconds that each rank has waited for others until its flag went up last; empty once this end is closed.
    std::vector<double> waited() const {
        std::vector<double> seconds;
        for (int rank = 0; map_ != nullptr && rank < size_; ++rank)
            seconds.push_back(double(line(rank).waited_ns.load(std::memory_order_relaxed)) * 1e-9);
        return seconds;
    }

 protected:
    // The header's page holds the nonce that shared_memory.py writes.
    static size_t data_offset(int size) { return kPage + (size * sizeof(Line) + kPage - 1) / kPage * kPage; }

    Line& line(int rank) const { return reinterpret_cast<Line*>(map_ + kPage)[rank]; }
    char* data() const { return map_ + data_offset(size_); }

    // All of an operation's work. One that fails leaves this rank out of step for good, so it lets the others know.
    template <class Body>
    void run(const char* operation, Body&& body) {
        if (busy_ != nullptr) refuse(operation, std::string("another thread is in ") + busy_);
        if (closed_) refuse(operation, "it is closed here");
        if (gave_up_) refuse(operation, "an earlier operation failed on this rank");
        busy_ = operation;
        try {
            body();
        } catch (...) {
            gave_up_ = true;
            leave();
            throw;
        }
        leave();
    }

    // Raises this rank's flag, and wakes the ranks that sleep on it.
    void publish(uint32_t value) {
        Line& mine = line(rank_);
        mine.waited_ns.store(uint64_t(std::chrono::nanoseconds(waited_).count()), std::memory_order_relaxed);
        mine.flag.store(value, std::memory_order_seq_cst);
        if (mine.sleepers.load(std::memory_order_seq_cst) != 0) wake_all(mine.flag);
    }

    // Returns once `peer`'s flag has reached `target`. When `together`, any rank that can never reach it ends the wait.
    void wait(int peer, uint32_t target, bool together) {
        if (reached(seen_[peer], target)) return;
        seen_[peer] = line(peer).flag.load(std::memory_order_acquire);
        if (reached(seen_[peer], target)) return;

        const auto began = Clock::now();
        if (!spin(peer, target, began)) {
            release_gil();
            sleep(peer, target, together);
        }
        waited_ += Clock::now() - began;
    }

    // Throws if a rank, or the rank `only`, has died or left before its flag reached `target`.
    void look_around(uint32_t target, int only = -1) {
        for (int peer = 0; peer < size_; ++peer)
            if (peer != rank_ && (only < 0 || peer == only)) check_alive(peer, target);
        for (int peer = 0; peer < size_; ++peer)
            if (peer != rank_ && (only < 0 || peer == only)) check_state(peer, target);
        if (closed_) fail("it was closed by another thread of this rank");
    }

    // Lets other Python threads run, if that is not so already; leave() takes the GIL back.
    void release_gil() {
        if (thread_ == nullptr) thread_ = PyEval_SaveThread();
    }

    void acquire_gil() {
        if (thread_ != nullptr) PyEval_RestoreThread(std::exchange(thread_, nullptr));
    }

    [[noreturn]] void fail(const std::string& why) const { refuse(busy_, why); }

    [[noreturn]] void refuse(const char* operation, const std::string& why) const {
        throw Failure("rank " + std::to_string(rank_) + " of " + std::to_string(size_) + ": " + operation +
                      " failed: " + why);
    }

    const int rank_, size_;
    std::vector<uint32_t> seen_;  // the last flag seen of each rank: saves a look at a line that another core owns

 private:
    // Watches a flag: first without a break, then yielding the core in between. Returns whether it reached `target`.
    bool spin(int peer, uint32_t target, Clock::time_point started) {
        for (auto now = started;; now = Clock::now()) {
            for (int i = 0; i < kLooks; ++i) {
                pause();
                seen_[peer] = line(peer).flag.load(std::memory_order_acquire);
                if (reached(seen_[peer], target)) return true;
            }
            if (now - started < spin_) continue;
            if (now - started >= kAwhile || now < crowded_until_) return false;
            // The rank that is awaited may need this core, or another thread of this rank the GIL.
            release_gil();
            sched_yield();
            const auto back = Clock::now();
            if (back - now > kSlice) crowded_until_ = back + kCrowded;
        }
    }

    // Sleeps on a flag, tick by tick, until it reaches `target`. Throws if that can no longer be, or after timeout_s.
    void sleep(int peer, uint32_t target, bool together) {
        struct Sleeper {
            std::atomic<uint32_t>& count;
            explicit Sleeper(std::atomic<uint32_t>& sleepers) : count(sleepers) {
                count.fetch_add(1, std::memory_order_seq_cst);
            }
            ~Sleeper() { count.fetch_sub(1, std::memory_order_relaxed); }
        } sleeper(line(peer).sleepers);

        // A tick that took longer counts as one: this rank was stopped, likely with all others, and who waits for
        // whom is then a matter of who goes on first.
        Clock::duration left = timeout_;
        for (;;) {
            const uint32_t value = line(peer).flag.load(std::memory_order_seq_cst);
            seen_[peer] = value;
            if (reached(value, target)) return;
            const auto began = Clock::now();
            sleep_while(line(peer).flag, value);
            left -= std::min<Clock::duration>(Clock::now() - began, kTick);
            if (line(peer).flag.load(std::memory_order_acquire) != value) continue;

            look_around(target, together ? -1 : peer);
            check_signals();
            if (left <= Clock::duration::zero()) {
                culprit_ = peer;
                char seconds[32];
                std::snprintf(seconds, sizeof(seconds), "%g", std::chrono::duration<double>(timeout_).count());
                fail("rank " + std::to_string(peer) + " has not come within timeout_s=" + seconds);
            }
        }
    }

    void check_alive(int peer, uint32_t target) {
        struct flock lock = lock_on(peer);
        if (fcntl(fd_, F_GETLK, &lock) != 0 || lock.l_type != F_UNLCK) return;
        // A rank that published why it left is no culprit: check_state passes its reason on.
        if (line(peer).state.load(std::memory_order_acquire) != kOpen) return;
        if (reached(line(peer).flag.load(std::memory_order_acquire), target)) return;
        culprit_ = peer;
        fail("rank " + std::to_string(peer) + " has died");
    }

    void check_state(int peer, uint32_t target) {
        const uint32_t state = line(peer).state.load(std::memory_order_acquire);
        if (state == kOpen || reached(line(peer).flag.load(std::memory_order_acquire), target)) return;
        const std::string name = "rank " + std::to_string(peer);
        culprit_ = peer;
        if (state == kClosed) fail(name + " has closed its end");
        culprit_ = int(state - kGaveUp);
        if (culprit_ == peer) fail(name + " gave up after an error of its own");
        if (culprit_ == rank_) fail(name + " gave up waiting for this rank");
        fail(name + " gave up because of rank " + std::to_string(culprit_));
    }

    void check_signals() {
        acquire_gil();
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        release_gil();
    }

    // Publishes this rank's state, and wakes who waits for it.
    void announce(uint32_t state) {
        line(rank_).state.store(state, std::memory_order_seq_cst);
        wake_all(line(rank_).flag);
    }

    // Ends an operation, with the GIL held again: memory that close() left to it goes now.
    void leave() {
        acquire_gil();
        busy_ = nullptr;
        if (closed_) {
            release();
        } else if (gave_up_) {
            announce(kGaveUp + uint32_t(culprit_ < 0 ? rank_ : culprit_));
        }
    }

    void release() {
        munmap(std::exchange(map_, nullptr), bytes_);
        ::close(std::exchange(fd_, -1));
    }

    int fd_;
    char* map_ = nullptr;
    const size_t bytes_;
    const pid_t owner_;
    const Clock::duration timeout_;
    const microseconds spin_;
    std::atomic<bool> closed_{false};
    Clock::time_point crowded_until_{};
    Clock::duration waited_{};
    bool gave_up_ = false;
    int culprit_ = -1;
    const char* busy_ = nullptr;       // the operation under way; read and written with the GIL held
    PyThreadState* thread_ = nullptr;  // where the GIL is released
};

}  // namespace phalanx
