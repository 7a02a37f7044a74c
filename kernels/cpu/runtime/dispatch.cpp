#include "dispatch.h"

#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "pool.h"

namespace phalanx {
namespace {

const Kernels* current = nullptr;

#if defined(__x86_64__)
// Whether this processor multiplies bfloat16 faster as floats. Intel's cores since Golden Cove do (Sapphire, Emerald
// and Granite Rapids, where the system or a virtual machine keeps AMX from us): vdpbf16ps takes them two cycles, see
// kSteps in vectors.h. A table, not a measurement: all ranks of a group shall choose the same, also on a busy machine.
bool multiplies_slowly() {
    unsigned a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_INTEL_ebx) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (a >> 8 & 15) != 6) return false;
    const unsigned model = (a >> 16 & 15) << 4 | (a >> 4 & 15);
    constexpr unsigned kSapphire = 143, kGranite = 173, kGraniteD = 174, kEmerald = 207;
    return model == kSapphire || model == kGranite || model == kGraniteD || model == kEmerald;
}
#endif

// The first in this order that the processor runs; emulated_amx is never chosen by itself.
const Kernels* best_kernels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    for (const char* name : {"avx512_amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2"}) {
        const Kernels* found = find_kernels(name);
        if (found != nullptr && !(found == &kAvx512Bf16 && multiplies_slowly())) return found;
    }
#endif
    return &kPortable;
}

#if PHALANX_HAS_AMX
// Whether the processor has AMX for both kinds of numbers, and the system lets this process use it: the state of its
// tiles is large, so Linux wants to be asked, once a process (arch_prctl(2), ARCH_REQ_XCOMP_PERM).
bool may_use_tiles() {
    static const bool may = [] {
        constexpr unsigned kBFloat16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25, kAll = kBFloat16 | kTiles | kInt8;
        unsigned a, b, c, d;  // of leaf 7; AMX's bits are in d
        if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
        constexpr long kRequest = 0x1023, kTileData = 18;
        return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
    }();
    return may;
}
#endif

}  // namespace

const Kernels* find_kernels(const char* name) {
    std::string_view wanted(name);
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
#if PHALANX_HAS_AMX
    if (bf16 && wanted == kAvx512Amx.name && may_use_tiles()) return &kAvx512Amx;
#endif
    if (bf16 && wanted == kAvx512Bf16.name) return &kAvx512Bf16;
    if (vnni && wanted == kAvx512Vnni.name) return &kAvx512Vnni;
    if (avx512 && wanted == kAvx512.name) return &kAvx512;
    if (avx2 && wanted == kAvx2.name) return &kAvx2;
#endif
    if (wanted == kEmulatedAmx.name) return &kEmulatedAmx;
    return wanted == kPortable.name ? &kPortable : nullptr;
}

void use_kernels(const Kernels* kernels) {
    current = kernels;
    set_idle(kernels->release);
}

const Kernels& kernels() {
    if (current == nullptr) use_kernels(best_kernels());
    return *current;
}

}  // namespace phalanx
