// The blocks of GGUF files, as ggml defines them, and FP8's: read into parts that records keep,
// without rounding anything again.
#pragma once
#include <cstdint>
#include <string>

#include "weight_format.h"

namespace moescope {

// One row's columns of a block, as `WeightFormat` stores values, scales and minimums.
struct Block {
  uint8_t values[kRecord];
  uint8_t scales[kRecord / 16 * 2], minimums[kRecord / 16 * 2];  // as many bytes as a scale has
  uint16_t super_scale, super_minimum;
};

struct GgufType {
  const char* name;    // as ggml has it
  const char* format;  // that holds it
  int columns, bytes;
  // Null for numbers, of which those that share a float32 scale have it in front of them.
  void (*read)(const uint8_t* bytes, Block& block);
};

// The type of a name; throws std::invalid_argument where it is unknown.
const GgufType& gguf_type(const std::string& name);

}  // namespace moescope
