#include "rates.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "dispatch.h"
#include "pool.h"

namespace phalanx {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPiecesPerThread = 16;      // of a repeat: so that a thread which is held up costs little
constexpr int64_t kUnit = 1024;           // floats that a piece is a multiple of
constexpr int64_t kCacheBytes = 4 << 20;  // that a piece reads from a cache: some 20 to 100 us
constexpr int64_t kHugePage = 2 << 20;
constexpr const char* kPatternNames[kReadPatterns] = {"one stream", "one stream, prefetched", "four streams"};

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Calls work(), of so many operations or bytes, until the time is over.
template <class F>
Repeats repeat(double amount, double seconds, const F& work) {
    Repeats rates;
    const auto begin = Clock::now();
    while (rates.size() < kLeastRepeats || seconds_since(begin) < seconds) {
        const auto started = Clock::now();
        work();
        rates.push_back(amount / seconds_since(started));
    }
    return rates;
}

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};

// In huge pages where the system has them: as the weights are.
std::unique_ptr<float, Free> allocate(int64_t bytes) {
    const int64_t size = ceil_div(bytes, kHugePage) * kHugePage;
    std::unique_ptr<float, Free> memory(static_cast<float*>(std::aligned_alloc(kHugePage, size)));
    if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    madvise(memory.get(), size, MADV_HUGEPAGE);
#endif
    return memory;
}

// Half of what a core's cache holds, in units; of a size that the system does not know, half of what is usual.
int64_t cached_floats(int level) {
    int64_t bytes = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    bytes = sysconf(level == 1 ? _SC_LEVEL1_DCACHE_SIZE : _SC_LEVEL2_CACHE_SIZE);
#endif
    if (bytes <= 0) bytes = level == 1 ? 32 << 10 : 1 << 20;
    return std::max<int64_t>(1, bytes / 2 / 4 / kUnit) * kUnit;
}

}  // namespace

std::map<std::string, Repeats> read_rate(int64_t bytes, double seconds) {
    const Kernels& k = kernels();
    const int pieces = threads() * kPiecesPerThread;
    const int64_t each = ceil_div(bytes / 4, pieces * kUnit) * kUnit;
    const auto memory = allocate(pieces * each * 4);
    parallel(pieces, [&](int i) {  // no two pages alike: a host may keep those once
        for (int64_t at = i * each; at < (i + 1) * each; ++at) memory.get()[at] = static_cast<float>(at);
    });

    std::map<std::string, Repeats> rates;
    std::vector<float> sums(pieces);
    const auto begin = Clock::now();
    for (int round = 0; round < kLeastRepeats || seconds_since(begin) < seconds; ++round) {
        for (int pattern = 0; pattern < kReadPatterns; ++pattern) {
            const auto started = Clock::now();
            parallel(pieces, [&](int i) {
                sums[i] = k.sum(memory.get() + i * each, each, 1, static_cast<ReadPattern>(pattern));
            });
            rates[kPatternNames[pattern]].push_back(pieces * each * 4 / seconds_since(started));
        }
    }
    return rates;
}

Repeats cache_rate(int level, double seconds) {
    if (level != 1 && level != 2) throw std::invalid_argument("the cache's level must be 1 or 2");
    const Kernels& k = kernels();
    const int64_t size = cached_floats(level), times = std::max<int64_t>(1, kCacheBytes / (size * 4));
    const int pieces = threads() * kPiecesPerThread;
    std::vector<float> sums(pieces);
    const auto body = [&](int i) {
        static thread_local std::vector<float> own;  // the first repeat fills it
        own.resize(size, 1.0f);
        sums[i] = k.sum(own.data(), size, times, ReadPattern::kOneStream);
    };
    parallel(pieces, body);
    return repeat(4.0 * size * times * pieces, seconds, [&] { parallel(pieces, body); });
}

Repeats multiply_rate(int64_t steps, double seconds) {
    const Kernels& k = kernels();
    const int pieces = threads() * kPiecesPerThread;
    std::vector<float> sums(pieces);
    const double operations = 2.0 * 32 * 12;  // of a step: 12 vectors of 32 numbers
    return repeat(operations * steps * pieces, seconds,
                  [&] { parallel(pieces, [&](int i) { sums[i] = k.multiply_add(steps); }); });
}

Repeats tile_rate(bool int8, int64_t steps, double seconds) {
    const Kernels& k = kernels();
    if (k.tile_products == nullptr) return {};
    const int pieces = threads() * kPiecesPerThread;
    std::vector<float> sums(pieces);
    const double operations = 4 * 2.0 * 16 * 16 * (int8 ? 64 : 32);  // of a step: 4 products of tiles
    return repeat(operations * steps * pieces, seconds,
                  [&] { parallel(pieces, [&](int i) { sums[i] = k.tile_products(int8, steps); }); });
}

}  // namespace phalanx
