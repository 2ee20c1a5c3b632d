#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#ifdef MOESCOPE_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace moescope {
namespace {

std::atomic<const Kernels*> current{nullptr};

}  // namespace

#ifdef MOESCOPE_X86
namespace {

bool is_zen4() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  __get_cpuid(1, &a, &b, &c, &d);
  const unsigned family = (a >> 8 & 0xf) + (a >> 20 & 0xff);
  return family == 0x19 && __builtin_cpu_supports("avx512f");  // which Zen 3, of that family, lacks
}

// AVX-512 with attention on bf16's own instruction.
const Kernels& avx512bf16_kernels() {
  static const Kernels set = [] {
    Kernels with = avx512_kernels;
    with.name = "avx512bf16";
    with.attend_bf16 = avx512bf16_loops;
    return with;
  }();
  return set;
}

// Whether there are tiles of bytes and of bf16, and the system keeps them for this process, for which
// it must be asked once.
bool ask_for_tiles() {
#if defined(MOESCOPE_AMX_EMULATED)
  return true;
#elif defined(__linux__)
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kBytes = 1u << 25,
                     kAll = kBf16 | kTiles | kBytes;
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool are_there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAll) == kAll;
  return are_there && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

// AVX-512 with bf16 and tiles.
const Kernels& amx_kernels() {
  static const Kernels set = [] {
    Kernels with = avx512bf16_kernels();
    with.name = "amx";
    use_tiles(with.multiply);
    use_tiles(with.attend_bf16);
    return with;
  }();
  return set;
}

}  // namespace

const ReadAhead read_ahead = !__builtin_cpu_is("amd") ? ReadAhead::into_second_level
                             : is_zen4()              ? ReadAhead::by_itself
                                                      : ReadAhead::past_caches;
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#ifdef MOESCOPE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    if (__builtin_cpu_supports("avx512bf16")) {
      static const bool tiles = ask_for_tiles();
      if (tiles) found.push_back(&amx_kernels());
      found.push_back(&avx512bf16_kernels());
    }
    found.push_back(&avx512_kernels);
  }
  if (avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&avxvnni_kernels);
  if (avx2) found.push_back(&avx2_kernels);
#endif
  found.push_back(&portable_kernels);
  return found;
}

void use_kernels(const std::string& name) {
  std::string names;
  for (const Kernels* set : available_kernels()) {
    if (name == set->name) {
      current.store(set);
      return;
    }
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  throw std::invalid_argument("MOESCOPE_ISA is '" + name + "'; this processor runs " + names);
}

const Kernels& kernels() {
  const Kernels* chosen = current.load(std::memory_order_relaxed);
  if (chosen != nullptr) return *chosen;
  const char* wanted = std::getenv("MOESCOPE_ISA");
  if (wanted != nullptr && *wanted != 0)
    use_kernels(wanted);
  else
    current.store(available_kernels().front());
  return *current.load();
}

}  // namespace moescope
