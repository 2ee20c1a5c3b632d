#include "memory.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

#include "file.h"
#include "pool.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace moescope {
namespace {
constexpr size_t kHugePage = size_t{1} << 21, kHugeFrom = size_t{1} << 22, kAlign = 64;
constexpr size_t kPiece = size_t{1} << 23;  // that is moved at once
constexpr int kPatience = 4;                // of a mover: for every second of work beside others
constexpr size_t kPage = 4096;

uint8_t* aligned(void* base, size_t step) {
  return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(base) + step - 1) / step * step);
}

#if defined(__linux__)
void* reserve(size_t bytes, int access) {
  return mmap(nullptr, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}
#endif
}  // namespace

Buffer::Buffer(size_t bytes, Pages pages) : bytes_(bytes) {
#if defined(__linux__)
  if (bytes >= kHugeFrom) {
    mapped_ = bytes + kHugePage;
    base_ = reserve(mapped_, PROT_READ | PROT_WRITE);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    data_ = aligned(base_, kHugePage);
    madvise(data_, bytes, pages == Pages::huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    return;
  }
#endif
  base_ = std::calloc(1, bytes + kAlign);
  if (base_ == nullptr) throw std::bad_alloc();
  data_ = aligned(base_, kAlign);
}

#if defined(__linux__)
void Buffer::fill(int descriptor, uint64_t offset) {
  struct stat status;
  if (fstat(descriptor, &status) != 0 || static_cast<uint64_t>(status.st_size) < offset + bytes_)
    throw std::runtime_error("the file ends too early or cannot be read");
  if (mapped_ != 0 && mmap(data_, bytes_, PROT_READ, MAP_PRIVATE | MAP_FIXED, descriptor,
                           static_cast<off_t>(offset)) == data_)
    is_file_ = true;
  else
    read_file(descriptor, offset, data_, bytes_);
}

void Buffer::settle() {
  if (!is_file_) return;
  for (size_t start = 0; start < bytes_; start += kPiece) {
    const auto began = std::chrono::steady_clock::now();
    const uint64_t rounds = rounds_begun();
    const size_t held = std::min(kPiece, bytes_ - start);
    const size_t size = (held + kPage - 1) / kPage * kPage, room = size + kHugePage;
    void* const base = reserve(room, PROT_READ | PROT_WRITE);
    if (base == MAP_FAILED) return;  // mapped pages will do
    uint8_t* const fresh = aligned(base, kHugePage);
    madvise(fresh, size, MADV_HUGEPAGE);
    std::memcpy(fresh, data_ + start, held);
    if (mremap(fresh, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, data_ + start) == MAP_FAILED) {
      munmap(base, room);
      return;
    }
    const size_t before = fresh - static_cast<uint8_t*>(base);
    if (before != 0) munmap(base, before);
    munmap(fresh + size, room - before - size);
    if (rounds_begun() != rounds)  // somebody computes: the memory and the cores are theirs first
      std::this_thread::sleep_for(kPatience * (std::chrono::steady_clock::now() - began));
  }
  is_file_ = false;
}
bool Buffer::stream(int descriptor, uint64_t offset, size_t resident) {
  struct stat status;
  if (fstat(descriptor, &status) != 0 || static_cast<uint64_t>(status.st_size) < offset + bytes_)
    throw std::runtime_error("the file ends too early or cannot be read");
  const int own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (own < 0) return false;
  const size_t room = (bytes_ + kPage - 1) / kPage * kPage;
  void* const base = mmap(nullptr, room, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) {
    close(own);
    return false;
  }
  madvise(base, room, MADV_NOHUGEPAGE);  // whose pages are larger than what is dropped
  release();
  base_ = base;
  mapped_ = room;
  data_ = static_cast<uint8_t*>(base);
  descriptor_ = own;
  file_offset_ = offset;
  if (!bring(resident, bytes_ - resident))
    throw std::runtime_error("the file ends too early or cannot be read");
  return true;
}

bool Buffer::bring(size_t start, size_t size) const {
  const size_t read = read_at(descriptor_, file_offset_ + start, data_ + start, size);
  posix_fadvise(descriptor_, static_cast<off_t>(file_offset_ + start), static_cast<off_t>(size),
                POSIX_FADV_DONTNEED);
  return read == size;
}

void Buffer::drop(size_t start, size_t size) const {
  const size_t first = (start + kPage - 1) / kPage * kPage, last = (start + size) / kPage * kPage;
  if (first < last) madvise(data_ + first, last - first, MADV_DONTNEED);
}
#else
bool Buffer::stream(int, uint64_t, size_t) { return false; }
bool Buffer::bring(size_t, size_t) const { return false; }
void Buffer::drop(size_t, size_t) const {}

void Buffer::fill(int descriptor, uint64_t offset) { read_file(descriptor, offset, data_, bytes_); }

void Buffer::settle() {}
#endif

Buffer::~Buffer() { release(); }

void Buffer::release() {
#if defined(__linux__)
  if (descriptor_ >= 0) close(descriptor_);
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
