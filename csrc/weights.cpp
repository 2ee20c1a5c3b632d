#include "weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "expert_memory.h"
#include "numbers.h"
#include "pool.h"
#include "quantize.h"
#include "records.h"

namespace moescope {
namespace {

constexpr int kInt4ChunkBytes = kPanel * (kChunk / 2 + 2);  // of one panel

int64_t scale_bytes_behind(const WeightFormat& format, int64_t padded_outputs) {
  return has_row_scale(format) ? padded_outputs * static_cast<int64_t>(sizeof(float)) : 0;
}

uint16_t to_f16(float value) {  // to nearest, ties to even; what is too large becomes infinite
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (size >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 0x38800000) {  // below the smallest normal number: steps of 2^-24
    const float steps = std::nearbyint(std::fabs(value) * 16777216.0f);
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(steps));
  }
  return static_cast<uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
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
  for (int64_t k = 0; k < columns; ++k) out[k] = float_of_bf16(from[k]);
}

float largest_magnitude(const float* x, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

}  // namespace

int format_of(const std::string& name) {
  const int format = format_named(name.c_str());
  if (format >= 0) return format;
  std::string names;
  for (const WeightFormat& known : kWeightFormats)
    names += (names.empty() ? "" : ", ") + std::string(known.name);
  throw std::invalid_argument("the format is '" + name + "'; it must be one of " + names);
}

Weights::Weights(int format, int64_t matrices, int64_t outputs, int64_t columns)
    : format_(format),
      matrices_(matrices),
      outputs_(outputs),
      columns_(columns),
      padded_(round_up(columns, has_super_scale(kWeightFormats[format]) ? kRecord : kChunk)),
      padded_outputs_(round_up(outputs, kPanel)),
      matrix_bytes_(
          round_up(padded_outputs_ / kPanel * panel_bytes(kWeightFormats[format], padded_), 64)),
      packed_(matrices *
              (matrix_bytes_ + scale_bytes_behind(kWeightFormats[format], padded_outputs_))) {}

Weights::~Weights() {
  if (packed_.is_streamed()) expert_memory().forget(this);
}

Weights::Weights(int format, int64_t matrices, int64_t outputs, int64_t columns,
                 const Source& source)
    : Weights(format, matrices, outputs, columns) {
  const Scales scales = this->format().scales;
  if (scales != Scales::none && !has_row_scale(this->format()))
    throw std::invalid_argument(std::string(this->format().name) + " is made of blocks only");
  parallel(matrices * tiles(),
           [&](int64_t task) { pack_tile(task / tiles(), task % tiles(), source); });
}

Weights::Weights(const GgufType& type, int64_t matrices, int64_t outputs, int64_t columns,
                 const uint8_t* blocks)
    : Weights(format_named(type.format), matrices, outputs, columns) {
  if (columns % type.columns != 0 && type.read != nullptr)
    throw std::invalid_argument("the columns are no multiple of a block's");
  parallel(matrices * tiles(),
           [&](int64_t task) { pack_blocks(task / tiles(), task % tiles(), type, blocks); });
}

const char* Weights::layout() { return MOESCOPE_LAYOUT; }

Tile Weights::tile(int64_t matrix, int64_t index) const {
  const int64_t first = index * kTile;
  const uint8_t* all_scales = packed_.data() + matrices_ * matrix_bytes_;
  const float* scales = has_row_scale(format()) ? reinterpret_cast<const float*>(all_scales) +
                                                      matrix * padded_outputs_ + first
                                                : nullptr;
  const int64_t panels = std::min<int64_t>(kPanels, (padded_outputs_ - first) / kPanel);
  const int64_t bytes = panel_bytes(format(), padded_);
  const uint8_t* begin = packed_.data() + matrix * matrix_bytes_ + first / kPanel * bytes;
  const uint8_t* end = begin + panels * bytes;
  return {begin, scales, static_cast<int>(panels), end, end};
}

void Weights::multiply(int64_t matrix, int64_t index, const QuantizedRows& activations,
                       const int32_t* rows, int count, float* out, const uint8_t* next) const {
  Tile at = tile(matrix, index);
  if (next != nullptr) at.next = next;
  if (at.row_scales != nullptr)  // wanted last, from a place of their own
    for (int p = 0; p < at.panels; ++p) __builtin_prefetch(at.row_scales + p * kPanel);
  kernels().multiply.of[format_](at, activations.view(format()), rows, count, out);
}

const uint8_t* Weights::record(const Tile& from, int64_t output, int64_t index) const {
  const int64_t left = padded_ - index * kRecord;
  return from.weights + panel_bytes(format(), index * kRecord) * from.panels +
         output / kPanel * panel_bytes(format(), std::min<int64_t>(left, kRecord));
}

void Weights::pack_blocks(int64_t matrix, int64_t index, const GgufType& type,
                          const uint8_t* blocks) {
  const WeightFormat& f = format();
  const Tile target = tile(matrix, index);
  const int64_t row_bytes = (columns_ + type.columns - 1) / type.columns * type.bytes;
  const int64_t number_bytes = f.bits / 8, shared_bytes = f.scales == Scales::f32 ? 4 : 0;
  const int64_t width = std::min<int64_t>(kTile, outputs_ - index * kTile);
  const int64_t group_bytes = scale_bytes(f);
  for (int64_t output = 0; output < width; ++output) {
    const uint8_t* row = blocks + (matrix * outputs_ + index * kTile + output) * row_bytes;
    const int n = static_cast<int>(output % kPanel);
    if (type.read == nullptr) {
      for (int64_t start = 0; start < columns_; start += type.columns, row += type.bytes) {
        const int64_t end = std::min(columns_, start + type.columns);
        for (int64_t k = start; k < end; ++k)
          std::memcpy(number(target, output, k), row + shared_bytes + (k - start) * number_bytes,
                      number_bytes);
        if (shared_bytes != 0) std::memcpy(float_scale(target, output, start), row, shared_bytes);
      }
      continue;
    }
    for (int64_t start = 0; start < columns_; start += type.columns, row += type.bytes) {
      Block block;
      type.read(row, block);
      const int64_t columns = std::min<int64_t>(kRecord, padded_ - start / kRecord * kRecord);
      uint8_t* to = const_cast<uint8_t*>(record(target, output, start / kRecord));
      const int64_t first = start % kRecord;
      for (int k = 0; k < type.columns; ++k) store_value(f, to, first + k, n, block.values[k]);
      for (int g = 0; g < type.columns / f.group; ++g) {
        const int64_t at = ((first / f.group + g) * kPanel + n) * group_bytes;
        std::memcpy(to + value_bytes(f, columns) + at, block.scales + g * group_bytes, group_bytes);
        if (f.minimum)
          std::memcpy(to + minimums_at(f, columns) + at, block.minimums + g * group_bytes,
                      group_bytes);
      }
      if (!has_super_scale(f)) continue;
      uint8_t* super = to + super_at(f, columns) + 2 * n;
      std::memcpy(super, &block.super_scale, 2);
      if (f.minimum) std::memcpy(super + 2 * kPanel, &block.super_minimum, 2);
    }
  }
}

uint8_t* Weights::number(const Tile& of, int64_t output, int64_t k) const {
  const int64_t bytes = format().bits / 8, n = output % kPanel;
  if (format().order == Order::tile)
    return const_cast<uint8_t*>(of.weights) +
           ((k / 2 * of.panels * kPanel + output) * 2 + k % 2) * bytes;
  return const_cast<uint8_t*>(record(of, output, k / kRecord)) + (k % kRecord * kPanel + n) * bytes;
}

uint8_t* Weights::float_scale(const Tile& of, int64_t output, int64_t k) const {
  const int64_t index = k / kRecord,
                columns = std::min<int64_t>(kRecord, padded_ - index * kRecord);
  return const_cast<uint8_t*>(record(of, output, index)) + value_bytes(format(), columns) +
         (k % kRecord / kFloatGroup * kPanel + output % kPanel) * sizeof(float);
}

void Weights::pack_tile(int64_t matrix, int64_t index, const Source& source) {
  const WeightFormat& f = format();
  const Tile target = tile(matrix, index);
  uint8_t* bytes = const_cast<uint8_t*>(target.weights);
  float* scales = const_cast<float*>(target.row_scales);
  const int64_t width = target.panels * kPanel;
  std::vector<float> row(padded_);
  std::vector<uint8_t> q(padded_), group_scales(padded_ / kChunk), minimums(padded_ / kChunk);
  for (int64_t n = 0; n < width; ++n) {
    const bool real = index * kTile + n < outputs_;
    if (real)
      read_row(source, matrix, index * kTile + n, columns_, row.data());
    else
      std::fill(row.begin(), row.end(), 0.0f);
    if (is_float(f)) {
      for (int64_t k = 0; k < padded_; ++k) {
        uint8_t* to = number(target, n, k);
        const uint16_t bits = f.values == Values::f16 ? to_f16(row[k]) : bf16_of(row[k]);
        if (f.values == Values::f32)
          std::memcpy(to, &row[k], sizeof(float));
        else
          std::memcpy(to, &bits, sizeof bits);
      }
      continue;
    }
    if (f.scales == Scales::row) {
      const float scale = std::max(largest_magnitude(row.data(), columns_), 1e-30f) / 127;
      scales[n] = scale;
      for (int64_t k = 0; k < padded_; ++k) {
        const float q = clamp(nearest(row[k] / scale), -127, 127);
        bytes[(k / 4 * width + n) * 4 + k % 4] = static_cast<uint8_t>(static_cast<int>(q) + f.zero);
      }
      continue;
    }
    if (real)
      quantize_int4(row.data(), source.importance, columns_, padded_, q.data(), group_scales.data(),
                    minimums.data(), scales + n);
    for (int64_t g = 0; real && g < padded_ / kChunk; ++g) {
      uint8_t* chunk = bytes + g * (target.panels * kInt4ChunkBytes);
      const uint8_t* from = q.data() + g * kChunk;
      for (int k = 0; k < kChunk / 2; ++k)
        chunk[(k / 4 * width + n) * 4 + k % 4] =
            static_cast<uint8_t>(from[k] | from[k + kChunk / 2] << 4);
      chunk[width * (kChunk / 2) + n] = group_scales[g];
      chunk[width * (kChunk / 2 + 1) + n] = minimums[g];
    }
  }
}

float Weights::weight(const Tile& from, int64_t output, int64_t k) const {
  const WeightFormat& f = format();
  const int64_t width = from.panels * kPanel;
  if (f.values == Values::bf16) return float_of_bf16(u16_at(number(from, output, k)));
  if (f.order == Order::record)
    return weight_at(f, record(from, output, k / kRecord),
                     std::min<int64_t>(kRecord, padded_ - k / kRecord * kRecord), k % kRecord,
                     static_cast<int>(output % kPanel));
  if (f.scales == Scales::row) {
    const int q = from.weights[(k / 4 * width + output) * 4 + k % 4] - f.zero;
    return static_cast<float>(q) * from.row_scales[output];
  }
  const uint8_t* chunk = from.weights + k / kChunk * (from.panels * kInt4ChunkBytes);
  const int64_t inside = k % (kChunk / 2);
  const uint8_t both = chunk[(inside / 4 * width + output) * 4 + inside % 4];
  const int q = k % kChunk < kChunk / 2 ? both & 15 : both >> 4;
  const uint8_t* scale = chunk + width * (kChunk / 2) + output;
  return static_cast<float>(scale[0] * q - kInt4Minimum * scale[width]) * from.row_scales[output];
}

void Weights::put(int64_t matrix, const Weights& one) {
  if (one.format_ != format_ || one.outputs_ != outputs_ || one.columns_ != columns_ ||
      one.matrices_ != 1 || matrix < 0 || matrix >= matrices_)
    throw std::invalid_argument("the matrix is not like the others");
  const int64_t scales = static_cast<int64_t>(one.packed_.size()) - matrix_bytes_;
  std::memcpy(packed_.data() + matrix * matrix_bytes_, one.packed_.data(), matrix_bytes_);
  std::memcpy(packed_.data() + matrices_ * matrix_bytes_ + matrix * scales,
              one.packed_.data() + matrix_bytes_, scales);
}

void Weights::take_row(int64_t output, float* out) const {
  const Tile from = tile(0, output / kTile);
  for (int64_t k = 0; k < columns_; ++k) out[k] = weight(from, output % kTile, k);
}

void Weights::unpack(float* out) const {
  parallel(matrices_ * tiles(), [&](int64_t task) {
    const int64_t matrix = task / tiles(), first = task % tiles() * kTile;
    const Tile from = tile(matrix, task % tiles());
    for (int64_t n = 0; n < std::min<int64_t>(kTile, outputs_ - first); ++n)
      for (int64_t k = 0; k < columns_; ++k)
        out[(matrix * outputs_ + first + n) * columns_ + k] = weight(from, n, k);
  });
}

void QuantizedRows::resize(std::initializer_list<const Weights*> readers, int64_t rows) {
  real_columns_ = (*readers.begin())->columns();
  columns_ = (*readers.begin())->padded_columns();
  wants_numbers_ = false;
  for (Rounded& rounded : rounded_) rounded.wanted = false;
  const auto grow = [](auto& held, int64_t size) {
    if (static_cast<int64_t>(held.size()) < size) held.resize(size);
  };
  for (const Weights* reader : readers) {
    if (is_float(reader->format())) wants_numbers_ = true;
    for (Rounded& rounded : rounded_)
      if (rounded.group == reader->format().group) rounded.wanted = true;
  }
  if (wants_numbers_) grow(numbers_, rows * columns_);
  for (Rounded& rounded : rounded_) {
    if (!rounded.wanted) continue;
    rounded.groups = (columns_ + rounded.group - 1) / rounded.group;
    grow(rounded.values, rows * columns_);
    grow(rounded.scales, rows * rounded.groups);
    grow(rounded.sums, rows * rounded.groups);
  }
}

void QuantizedRows::set(int64_t row, int64_t start, const float* x, int64_t columns,
                        int64_t padded) {
  if (wants_numbers_) {
    float* to = numbers_.data() + row * columns_ + start;
    std::copy_n(x, columns, to);
    std::fill_n(to + columns, padded - columns, 0.0f);
  }
  for (Rounded& rounded : rounded_) {
    if (!rounded.wanted) continue;
    const int64_t group = row * rounded.groups + start / rounded.group;
    kernels().quantize(x, columns, padded, rounded.group,
                       rounded.values.data() + row * columns_ + start,
                       rounded.scales.data() + group, rounded.sums.data() + group);
  }
}

Activations QuantizedRows::view(const WeightFormat& format) const {
  for (const Rounded& rounded : rounded_)
    if (rounded.group == format.group)
      return {rounded.values.data(), rounded.scales.data(), rounded.sums.data(), nullptr, columns_,
              rounded.group,         rounded.groups};
  return {nullptr, nullptr, nullptr, numbers_.data(), columns_, 1, columns_};
}

}  // namespace moescope
