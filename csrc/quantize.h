// Float weights as the blocks that GGUF files store.
#pragma once
#include <cstdint>
#include <string>

namespace moescope {

enum class BlockType { q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl, mxfp4, q4_k, q5_k, q6_k };

struct BlockShape {
  int64_t weights, bytes;  // of one block
};

// The type that gguf calls so (`Q4_K`); throws std::invalid_argument where there is none.
BlockType block_type_of(const std::string& name);
BlockShape shape_of(BlockType type);

// Round rows of `columns` weights, a multiple of a block's, one behind the other. Scales and minima
// are searched for: of several candidates the one with the least squared error is kept, each number
// weighted by its magnitude plus the root mean square of its row.
void quantize(BlockType type, const float* rows, int64_t count, int64_t columns, uint8_t* out);

// Round one row as int4 holds it: weight = unit * (scale * q - kInt4Minimum * minimum), with a scale and
// a minimum for 32 columns, searched for likewise.
//   importance: how much an error in each column counts beside that, or null
//   columns, padded: of the row, which is filled up with zeros to a multiple of 32
//   q (padded), scales and minimums (padded / 32), unit: what is found
void quantize_int4(const float* row, const float* importance, int64_t columns, int64_t padded,
                   uint8_t* q, uint8_t* scales, uint8_t* minimums, float* unit);

}  // namespace moescope
