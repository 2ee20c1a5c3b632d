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

  // Take over an open file's bytes likewise, of which only those from `resident` on are read now: the
  // others come by `bring`, and go by `drop`. False where the system cannot.
  bool stream(int descriptor, uint64_t offset, size_t resident);
  bool is_streamed() const { return descriptor_ >= 0; }
  // Read a range from the file; the file's own pages are not kept. False where it fails.
  bool bring(size_t start, size_t size) const;
  // Give a range's memory back, but for pages that it shares with its neighbours.
  void drop(size_t start, size_t size) const;

 private:
  void release();

  size_t bytes_;
  int descriptor_ = -1;
  uint64_t file_offset_ = 0;
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
