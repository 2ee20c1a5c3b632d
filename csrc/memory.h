// Memory for weights.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moescope {

enum class Pages { small, huge };

// Zeroed bytes at an address that vectors like; huge pages back 4 MiB and more where the system
// grants them, because at memory speed every page's address must be looked up.
class Buffer {
 public:
  explicit Buffer(size_t bytes, Pages pages = Pages::huge);
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

// Memory that all threads read together, as products read weights: what bounds decoding.
class ReadProbe {
 public:
  ReadProbe(size_t bytes, Pages pages);
  // Reads everything once; returns a sum, so that no compiler leaves the reading out.
  uint64_t read() const;

 private:
  Buffer buffer_;
};

}  // namespace moescope
