#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moescope {
namespace {
constexpr size_t kHugePage = size_t{1} << 21, kHugeFrom = size_t{1} << 22, kAlign = 64;
}

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
#if defined(__linux__)
  if (bytes >= kHugeFrom) {
    mapped_ = bytes + kHugePage;
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t aligned =
        (reinterpret_cast<uintptr_t>(base_) + kHugePage - 1) / kHugePage * kHugePage;
    data_ = reinterpret_cast<uint8_t*>(aligned);
    madvise(data_, bytes, MADV_HUGEPAGE);
    return;
  }
#endif
  base_ = std::calloc(1, bytes + kAlign);
  if (base_ == nullptr) throw std::bad_alloc();
  data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(base_) + kAlign - 1) / kAlign *
                                     kAlign);
}

Buffer::~Buffer() {
#if defined(__linux__)
  if (mapped_ != 0) {
    munmap(base_, mapped_);
    return;
  }
#endif
  std::free(base_);
}

}  // namespace moescope
