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

  // Hold what stands at `offset`, a multiple of 4 KiB, of an open file: mapped where it is large and
  // the system can, else read. Throws std::runtime_error where the file ends earlier or fails.
  void fill(int descriptor, uint64_t offset);
  // Move what is mapped into huge pages, piece by piece, under the feet of whoever reads it, and
  // slowly while the pool is at work. A file that is cut before that is done ends the process.
  void settle();

 private:
  size_t bytes_;
  size_t mapped_ = 0;
  bool is_file_ = false;
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
