// Bytes of files, and how to tell that they are the ones that were written.
#pragma once
#include <cstddef>
#include <cstdint>

namespace moescope {

// The same on any machine and for any number of threads. It tells damage by accident, not intent.
uint64_t checksum(const uint8_t* data, size_t bytes);

// Returns how many bytes came: as many as asked for unless the file ends or fails.
size_t read_at(int descriptor, uint64_t offset, uint8_t* out, size_t bytes);

// Fill `out` from an open file, all threads reading together; return the checksum of what came.
// Throws std::runtime_error where the file cannot be read or ends earlier.
uint64_t read_file(int descriptor, uint64_t offset, uint8_t* out, size_t bytes);

}  // namespace moescope
