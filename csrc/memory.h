// Memory for weights.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moescope {

// Zeroed bytes at an address that vectors like; from 4 MiB on backed by 2 MiB pages where the
// system grants them, because at memory speed every page's address must be looked up.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  uint8_t* data() { return data_; }
  const uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  size_t bytes_;
  size_t mapped_ = 0;
  void* base_ = nullptr;
  uint8_t* data_ = nullptr;
};

}  // namespace moescope
