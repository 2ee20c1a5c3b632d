// Matrices of weights, rounded or taken from a file's blocks, and laid out for the kernels.
#pragma once
#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "gguf_blocks.h"
#include "isa.h"
#include "memory.h"

namespace moescope {

// The place of a format in the table; throws std::invalid_argument where it has no such name.
int format_of(const std::string& name);

class QuantizedRows;

// Where matrices come from: (matrices, outputs, columns) float32 or bf16, columns side by side.
struct Source {
  const void* data;
  bool bf16;
  int64_t matrix_stride, row_stride;  // in numbers
  const float* importance = nullptr;  // how much an error in a column counts, if they differ
};

// `matrices` matrices of one shape (one for a linear map, one an expert for a layer's experts).
// int8 has one float32 scale a row: the largest magnitude over 127. int4 has a scale and a minimum
// for 32 columns, bytes that count in a float32 of the row (`quantize_int4`). Floating point has none,
// and its products take activations as they are. The others come from a file's blocks, whose numbers
// they keep.
class Weights {
 public:
  // Rounds to int8, int4, bf16, f16 or f32; throws std::invalid_argument for other formats.
  Weights(int format, int64_t matrices, int64_t outputs, int64_t columns, const Source& source);
  // Lays out blocks, rows after rows; columns are a multiple of a block's, unless it holds numbers.
  Weights(const GgufType& type, int64_t matrices, int64_t outputs, int64_t columns,
          const uint8_t* blocks);
  // Zeros, whose `stored` is there to be filled with what another's was.
  Weights(int format, int64_t matrices, int64_t outputs, int64_t columns);

  ~Weights();

  int64_t matrices() const { return matrices_; }
  int64_t outputs() const { return outputs_; }
  int64_t columns() const { return columns_; }
  int64_t padded_columns() const { return padded_; }
  // Bytes of one matrix, all of which a product with it reads.
  int64_t matrix_bytes() const { return matrix_bytes_; }
  // All that is held, as a file keeps it, and the name of the layout that it has.
  Buffer& stored() { return packed_; }
  const Buffer& stored() const { return packed_; }
  static const char* layout();

  const WeightFormat& format() const { return kWeightFormats[format_]; }

  int64_t tiles() const { return (outputs_ + kTile - 1) / kTile; }
  // out (count, kTile) = activations[rows] times outputs [index * kTile, ...) of a matrix. `next` is
  // where the caller will go on, if not behind them: its first bytes are fetched meanwhile.
  void multiply(int64_t matrix, int64_t index, const QuantizedRows& activations,
                const int32_t* rows, int count, float* out, const uint8_t* next = nullptr) const;
  const uint8_t* start(int64_t matrix, int64_t index) const { return tile(matrix, index).weights; }

  // Replace a matrix by the only one of other weights; throws std::invalid_argument where their
  // format or shape is another.
  void put(int64_t matrix, const Weights& one);

  // One row of the first matrix as the kernels see it, (columns).
  void take_row(int64_t output, float* out) const;
  // The weights as the kernels see them, (matrices, outputs, columns).
  void unpack(float* out) const;

 private:
  Tile tile(int64_t matrix, int64_t index) const;
  // Record `index` of the panel that an output of a tile is in.
  const uint8_t* record(const Tile& of, int64_t output, int64_t index) const;
  // Where a number of floating point lies.
  uint8_t* number(const Tile& of, int64_t output, int64_t k) const;
  // Where the scale of its group lies, if it has one.
  uint8_t* float_scale(const Tile& of, int64_t output, int64_t k) const;
  float weight(const Tile& from, int64_t output, int64_t k) const;
  void pack_tile(int64_t matrix, int64_t index, const Source& source);
  void pack_blocks(int64_t matrix, int64_t index, const GgufType& type, const uint8_t* blocks);

  int format_;
  int64_t matrices_, outputs_, columns_, padded_, padded_outputs_, matrix_bytes_;
  Buffer packed_;  // the matrices; behind them the rows' float32 (matrices, padded outputs), if any
};

// Rows of activations as matrices want them: rounded to int8 once for each size of groups that one
// of them has, and as they are for floating point. Memory is kept from use to use.
class QuantizedRows {
 public:
  // For matrices of as many columns.
  void resize(std::initializer_list<const Weights*> readers, int64_t rows);
  void resize(const Weights& reader, int64_t rows) { resize({&reader}, rows); }
  // Round one row.
  void set_row(int64_t row, const float* x) { set(row, 0, x, real_columns_, columns_); }
  // Round columns [start, start + columns) of one row; `start` begins a group.
  void set(int64_t row, int64_t start, const float* x, int64_t columns, int64_t padded);
  // As a matrix of this format takes them, which must have been among the readers.
  Activations view(const WeightFormat& format) const;

 private:
  struct Rounded {
    int64_t group = 0, groups = 0;
    bool wanted = false;
    std::vector<int8_t> values{};
    std::vector<float> scales{};
    std::vector<int32_t> sums{};
  };
  int64_t real_columns_ = 0, columns_ = 0;
  bool wants_numbers_ = false;
  std::vector<float> numbers_;
  std::array<Rounded, 3> rounded_{{{16}, {32}, {64}}};
};

}  // namespace moescope
