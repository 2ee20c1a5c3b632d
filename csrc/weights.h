// Matrices of weights, rounded to int8 or int4 and laid out for the kernels.
#pragma once
#include <cstdint>
#include <vector>

#include "isa.h"
#include "memory.h"

namespace moescope {

enum class Format { int8, int4, bf16 };

// Where matrices come from: (matrices, outputs, columns) float32 or bf16, columns side by side.
struct Source {
  const void* data;
  bool bf16;
  int64_t matrix_stride, row_stride;  // in numbers
};

// `matrices` matrices of one shape (one for a linear map, one an expert for a layer's experts).
// int8 has one float32 scale a row: the largest magnitude over 127. int4 has one bf16 scale for 32
// columns: of several candidates the one whose least-squares refit errs least. bf16 has none, and
// its products take activations as they are.
class Weights {
 public:
  Weights(Format format, int64_t matrices, int64_t outputs, int64_t columns, const Source& source);
  // Zeros, whose `stored` is there to be filled with what another's was.
  Weights(Format format, int64_t matrices, int64_t outputs, int64_t columns);

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

  // Columns of activations that share a scale, and what their offsets make up for.
  int64_t group() const { return format_ == Format::int4 ? kChunk : 64; }
  int zero() const { return format_ == Format::int8 ? kInt8Zero : kInt4Zero; }
  bool takes_floats() const { return format_ == Format::bf16; }
  // Whether activations made ready for one of them are ready for both.
  bool takes_rows_of(const Weights& other) const {
    return has_format_of(other) && columns_ == other.columns_;
  }
  bool has_format_of(const Weights& other) const { return format_ == other.format_; }

  int64_t tiles() const { return (outputs_ + kTile - 1) / kTile; }
  // out (count, kTile) = activations[rows] times outputs [index * kTile, ...) of a matrix. `next` is
  // where the caller will go on, if not behind them: its first bytes are fetched meanwhile.
  void multiply(int64_t matrix, int64_t index, const Activations& activations, const int32_t* rows,
                int count, float* out, const uint8_t* next = nullptr) const;
  const uint8_t* start(int64_t matrix, int64_t index) const { return tile(matrix, index).weights; }

  // The weights as the kernels see them, (matrices, outputs, columns).
  void unpack(float* out) const;

 private:
  Tile tile(int64_t matrix, int64_t index) const;
  void pack_tile(int64_t matrix, int64_t index, const Source& source);

  Format format_;
  int64_t matrices_, outputs_, columns_, padded_, padded_outputs_, matrix_bytes_;
  Buffer packed_;  // the matrices; for int8, float32 scales (matrices, padded outputs) behind them
};

// Rows of activations as a matrix wants them, rounded to int8 or not; memory is kept from use to use.
class QuantizedRows {
 public:
  void resize(const Weights& weights, int64_t rows);
  // Round one row.
  void set_row(int64_t row, const float* x) { set(row, 0, x, real_columns_, columns_); }
  // Round columns [start, start + columns) of one row; `start` begins a group.
  void set(int64_t row, int64_t start, const float* x, int64_t columns, int64_t padded);
  Activations view() const;

 private:
  int64_t real_columns_ = 0, columns_ = 0, group_ = 1, groups_ = 0;
  int zero_ = 0;
  bool floats_ = false;
  std::vector<float> numbers_;
  std::vector<int8_t> values_;
  std::vector<float> scales_;
  std::vector<int32_t> offsets_;
};

}  // namespace moescope
