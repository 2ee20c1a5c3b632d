#include "file.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include "pool.h"

namespace moescope {
namespace {

constexpr size_t kBlock = size_t{1} << 20;  // read and summed by one thread, while in its cache
constexpr size_t kLanes = 8, kStep = kLanes * sizeof(uint64_t);
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15;  // so that multiplying loses nothing

uint64_t mix(uint64_t sum, uint64_t word) {
  sum = (sum ^ word) * kOdd;
  return sum ^ sum >> 29;
}

uint64_t sum_block(const uint8_t* data, size_t bytes) {
  uint64_t lanes[kLanes] = {}, words[kLanes];
  for (size_t at = 0; at < bytes; at += kStep) {
    const size_t held = std::min(kStep, bytes - at);
    if (held < kStep) std::memset(words, 0, kStep);
    std::memcpy(words, data + at, held);
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] = (lanes[lane] ^ words[lane]) * kOdd;
  }
  uint64_t sum = bytes;
  for (uint64_t lane : lanes) sum = mix(sum, lane);
  return sum;
}

// `fetch(start, size)` brings a block before it is summed.
uint64_t sum_blocks(const uint8_t* data, size_t bytes,
                    const std::function<void(size_t, size_t)>& fetch) {
  std::vector<uint64_t> sums((bytes + kBlock - 1) / kBlock);
  parallel(static_cast<int64_t>(sums.size()), [&](int64_t block) {
    const size_t start = static_cast<size_t>(block) * kBlock;
    const size_t size = std::min(kBlock, bytes - start);
    fetch(start, size);
    sums[block] = sum_block(data + start, size);
  });
  uint64_t total = 0;
  for (uint64_t sum : sums) total = mix(total, sum);
  return total;
}

}  // namespace

size_t read_at(int descriptor, uint64_t offset, uint8_t* out, size_t bytes) {
  size_t done = 0;
  while (done < bytes) {
    const ssize_t got =
        pread(descriptor, out + done, bytes - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    done += static_cast<size_t>(got);
  }
  return done;
}

uint64_t checksum(const uint8_t* data, size_t bytes) {
  return sum_blocks(data, bytes, [](size_t, size_t) {});
}

uint64_t read_file(int descriptor, uint64_t offset, uint8_t* out, size_t bytes) {
  std::atomic<bool> whole{true};  // tasks of the pool may not throw
  const uint64_t sum = sum_blocks(out, bytes, [&](size_t start, size_t size) {
    if (read_at(descriptor, offset + start, out + start, size) != size) whole.store(false);
  });
  if (!whole.load()) throw std::runtime_error("the file ends too early or cannot be read");
  return sum;
}

}  // namespace moescope
