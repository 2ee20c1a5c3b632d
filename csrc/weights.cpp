#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "expert_memory.h"
#include "numbers.h"
#include "pool.h"

namespace moescope {
namespace {

constexpr int kInt4ChunkBytes = kPanel * (kChunk / 2 + 2);  // of one panel

int64_t padded_row_bytes(Format format, int64_t padded) {
  switch (format) {
    case Format::int8: return padded;
    case Format::int4: return padded / kChunk * kInt4ChunkBytes / kPanel;
    default: return 2 * padded;
  }
}

int64_t scale_bytes(Format format, int64_t padded_outputs) {
  return format == Format::int8 ? padded_outputs * static_cast<int64_t>(sizeof(float)) : 0;
}

float as_float(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint16_t to_bf16(float value) {  // to nearest, ties to even; for finite values
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Nearest integer, ties to even, of a magnitude below 2^22; unlike rint it is vectorised anywhere.
inline float nearest(float value) { return (value + 12582912.0f) - 12582912.0f; }

inline float clamp(float value, float low, float high) {
  value = value < low ? low : value;
  return value > high ? high : value;
}

void read_row(const Source& source, int64_t matrix, int64_t row, int64_t columns, float* out) {
  const int64_t at = matrix * source.matrix_stride + row * source.row_stride;
  if (!source.bf16) {
    std::memcpy(out, static_cast<const float*>(source.data) + at, columns * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(source.data) + at;
  for (int64_t k = 0; k < columns; ++k) out[k] = as_float(from[k]);
}

float largest_magnitude(const float* x, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

// The scale for 32 weights, rounded to bf16. With q the integers that a candidate makes, the best
// scale for q is sum(xq) / sum(qq), and its squared error sum(xx) - sum(xq)^2 / sum(qq).
uint16_t search_int4_scale(const float* x) {
  float extreme = 0;
  for (int k = 0; k < kChunk; ++k)
    if (std::fabs(x[k]) > std::fabs(extreme)) extreme = x[k];
  if (extreme == 0) return 0;
  float best = -1, best_scale = 0;
  for (int step = 0; step < 12; ++step) {
    const float inverse = -(6.6f + 0.2f * static_cast<float>(step)) / extreme;
    if (!std::isfinite(inverse)) return 0;
    float xq[8] = {}, qq[8] = {};
    for (int k = 0; k < kChunk; k += 8)
      for (int lane = 0; lane < 8; ++lane) {
        const float q = clamp(nearest(x[k + lane] * inverse), -8, 7);
        xq[lane] += x[k + lane] * q;
        qq[lane] += q * q;
      }
    float sum_xq = 0, sum_qq = 0;
    for (int lane = 0; lane < 8; ++lane) sum_xq += xq[lane], sum_qq += qq[lane];
    const float explained = sum_qq > 0 ? sum_xq * (sum_xq / sum_qq) : 0;
    if (explained > best) best = explained, best_scale = sum_qq > 0 ? sum_xq / sum_qq : 0;
  }
  return to_bf16(best_scale);
}

}  // namespace

Weights::Weights(Format format, int64_t matrices, int64_t outputs, int64_t columns)
    : format_(format),
      matrices_(matrices),
      outputs_(outputs),
      columns_(columns),
      padded_(round_up(columns, kChunk)),
      padded_outputs_(round_up(outputs, kPanel)),
      matrix_bytes_(round_up(padded_outputs_ * padded_row_bytes(format, padded_), 64)),
      packed_(matrices * (matrix_bytes_ + scale_bytes(format, padded_outputs_))) {}

Weights::~Weights() {
  if (packed_.is_streamed()) expert_memory().forget(this);
}

Weights::Weights(Format format, int64_t matrices, int64_t outputs, int64_t columns,
                 const Source& source)
    : Weights(format, matrices, outputs, columns) {
  parallel(matrices * tiles(),
           [&](int64_t task) { pack_tile(task / tiles(), task % tiles(), source); });
}

const char* Weights::layout() { return MOESCOPE_LAYOUT; }

Tile Weights::tile(int64_t matrix, int64_t index) const {
  const int64_t first = index * kTile;
  const uint8_t* all_scales = packed_.data() + matrices_ * matrix_bytes_;
  const float* scales = format_ == Format::int8 ? reinterpret_cast<const float*>(all_scales) +
                                                      matrix * padded_outputs_ + first
                                                : nullptr;
  const int64_t width = std::min<int64_t>(kTile, padded_outputs_ - first);
  const int64_t row_bytes = padded_row_bytes(format_, padded_);
  const uint8_t* begin = packed_.data() + matrix * matrix_bytes_ + first * row_bytes;
  const uint8_t* end = begin + width * row_bytes;
  return {begin, scales, static_cast<int>(width / kPanel), end, end};
}

void Weights::multiply(int64_t matrix, int64_t index, const Activations& activations,
                       const int32_t* rows, int count, float* out, const uint8_t* next) const {
  const Kernels& k = kernels();
  Tile at = tile(matrix, index);
  if (next != nullptr) at.next = next;
  switch (format_) {
    case Format::int8: return k.multiply_int8(at, activations, rows, count, out);
    case Format::int4: return k.multiply_int4(at, activations, rows, count, out);
    default: return k.multiply_bf16(at, activations, rows, count, out);
  }
}

void Weights::pack_tile(int64_t matrix, int64_t index, const Source& source) {
  const Tile target = tile(matrix, index);
  uint8_t* bytes = const_cast<uint8_t*>(target.weights);
  float* scales = const_cast<float*>(target.row_scales);
  const int64_t width = target.panels * kPanel;
  std::vector<float> row(padded_);
  for (int64_t n = 0; n < width; ++n) {
    const bool real = index * kTile + n < outputs_;
    if (real)
      read_row(source, matrix, index * kTile + n, columns_, row.data());
    else
      std::fill(row.begin(), row.end(), 0.0f);
    if (format_ == Format::bf16) {
      for (int64_t k = 0; k < padded_; ++k) {
        const uint16_t bits = to_bf16(row[k]);
        std::memcpy(bytes + (k / 2 * width + n) * 4 + k % 2 * 2, &bits, sizeof bits);
      }
      continue;
    }
    if (format_ == Format::int8) {
      const float scale = std::max(largest_magnitude(row.data(), columns_), 1e-30f) / 127;
      scales[n] = scale;
      for (int64_t k = 0; k < padded_; ++k) {
        const float q = clamp(nearest(row[k] / scale), -127, 127);
        bytes[(k / 4 * width + n) * 4 + k % 4] = static_cast<uint8_t>(q + kInt8Zero);
      }
      continue;
    }
    for (int64_t start = 0; start < padded_; start += kChunk) {
      uint8_t* chunk = bytes + start / kChunk * (target.panels * kInt4ChunkBytes);
      const uint16_t bits = search_int4_scale(row.data() + start);
      const float scale = as_float(bits);
      uint8_t nibbles[kChunk];
      for (int k = 0; k < kChunk; ++k) {
        const float q = scale != 0 ? clamp(nearest(row[start + k] / scale), -8, 7) : 0;
        nibbles[k] = static_cast<uint8_t>(q + kInt4Zero);
      }
      for (int k = 0; k < kChunk / 2; ++k)
        chunk[(k / 4 * width + n) * 4 + k % 4] = nibbles[k] | nibbles[k + kChunk / 2] << 4;
      std::memcpy(chunk + width * (kChunk / 2) + 2 * n, &bits, sizeof bits);
    }
  }
}

void Weights::unpack(float* out) const {
  for (int64_t matrix = 0; matrix < matrices_; ++matrix)
    for (int64_t n = 0; n < outputs_; ++n, out += columns_) {
      const Tile from = tile(matrix, n / kTile);
      const int64_t width = from.panels * kPanel, at = n % kTile;
      for (int64_t k = 0; k < columns_; ++k) {
        if (format_ == Format::bf16) {
          uint16_t bits;
          std::memcpy(&bits, from.weights + (k / 2 * width + at) * 4 + k % 2 * 2, sizeof bits);
          out[k] = as_float(bits);
          continue;
        }
        if (format_ == Format::int8) {
          const int q = from.weights[(k / 4 * width + at) * 4 + k % 4] - kInt8Zero;
          out[k] = static_cast<float>(q) * from.row_scales[at];
          continue;
        }
        const uint8_t* chunk = from.weights + k / kChunk * (from.panels * kInt4ChunkBytes);
        const int64_t inside = k % (kChunk / 2);
        const uint8_t both = chunk[(inside / 4 * width + at) * 4 + inside % 4];
        const int q = (k % kChunk < kChunk / 2 ? both & 15 : both >> 4) - kInt4Zero;
        uint16_t bits;
        std::memcpy(&bits, chunk + width * (kChunk / 2) + 2 * at, sizeof bits);
        out[k] = static_cast<float>(q) * as_float(bits);
      }
    }
}

void QuantizedRows::resize(const Weights& weights, int64_t rows) {
  real_columns_ = weights.columns();
  columns_ = weights.padded_columns();
  group_ = weights.group();
  groups_ = (columns_ + group_ - 1) / group_;
  zero_ = weights.zero();
  floats_ = weights.takes_floats();
  const auto grow = [](auto& held, int64_t size) {
    if (static_cast<int64_t>(held.size()) < size) held.resize(size);
  };
  if (floats_) return grow(numbers_, rows * columns_);
  grow(values_, rows * columns_);
  grow(scales_, rows * groups_);
  grow(offsets_, rows * groups_);
}

void QuantizedRows::set(int64_t row, int64_t start, const float* x, int64_t columns,
                        int64_t padded) {
  if (floats_) {
    float* to = numbers_.data() + row * columns_ + start;
    std::copy_n(x, columns, to);
    std::fill_n(to + columns, padded - columns, 0.0f);
    return;
  }
  const int64_t group = row * groups_ + start / group_;
  kernels().quantize(x, columns, padded, group_, zero_, values_.data() + row * columns_ + start,
                     scales_.data() + group, offsets_.data() + group);
}

Activations QuantizedRows::view() const {
  return {values_.data(), scales_.data(), offsets_.data(), numbers_.data(),
          columns_,       group_,         groups_};
}

}  // namespace moescope
