#include "memory.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "pool.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace moescope {
namespace {
constexpr size_t kHugePage = size_t{1} << 21, kHugeFrom = size_t{1} << 22, kAlign = 64;
}

Buffer::Buffer(size_t bytes, Pages pages) : bytes_(bytes) {
#if defined(__linux__)
  if (bytes >= kHugeFrom) {
    mapped_ = bytes + kHugePage;
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t aligned =
        (reinterpret_cast<uintptr_t>(base_) + kHugePage - 1) / kHugePage * kHugePage;
    data_ = reinterpret_cast<uint8_t*>(aligned);
    madvise(data_, bytes, pages == Pages::huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
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

ReadProbe::ReadProbe(size_t bytes, Pages pages) : buffer_(bytes, pages) {
  std::memset(buffer_.data(), 1, bytes);  // a page that nobody wrote to may share its memory
}

uint64_t ReadProbe::read() const {
  constexpr size_t kPart = size_t{1} << 18, kAhead = 512;
  std::atomic<uint64_t> total{0};
  const size_t parts = (buffer_.size() + kPart - 1) / kPart;
  parallel(static_cast<int64_t>(parts), [&](int64_t part) {
    const size_t start = static_cast<size_t>(part) * kPart;
    const size_t words = std::min(kPart, buffer_.size() - start) / sizeof(uint64_t);
    const uint64_t* from = reinterpret_cast<const uint64_t*>(buffer_.data() + start);
    uint64_t sums[16] = {};
    for (size_t i = 0; i + 16 <= words; i += 16) {
      __builtin_prefetch(from + i + kAhead);
      __builtin_prefetch(from + i + kAhead + 8);
      for (size_t lane = 0; lane < 16; ++lane) sums[lane] += from[i + lane];
    }
    for (uint64_t sum : sums) total.fetch_add(sum, std::memory_order_relaxed);
  });
  return total.load();
}

}  // namespace moescope
