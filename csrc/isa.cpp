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
const bool fetches_past_caches = __builtin_cpu_is("amd");

namespace {

// Whether there are tiles of bytes, and the system keeps them for this process, which it must be
// asked for once.
bool ask_for_amx() {
#if defined(MOESCOPE_AMX_EMULATED)
  return true;
#elif defined(__linux__)
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  const bool is_there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 24 & 3) == 3;
  return is_there && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

Kernels with_amx() {
  Kernels made = avx512_kernels;
  made.name = "amx";
  made.multiply_int8 = multiply_int8_amx;
  made.multiply_int4 = multiply_int4_amx;
  return made;
}

}  // namespace
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#ifdef MOESCOPE_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni")) {
    static const bool amx = ask_for_amx();
    static const Kernels amx_kernels = with_amx();
    if (amx) found.push_back(&amx_kernels);
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
