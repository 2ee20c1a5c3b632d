// Reads and writes the weights of a record one at a time: the truth about how they lie. Static, so
// that each instruction set's file has its own copies (isa.h).
#pragma once
#include <math.h>
#include <string.h>

#include "weight_format.h"

namespace moescope {

static inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline float float_of_bf16(uint16_t bits) {
  return float_of_bits(static_cast<uint32_t>(bits) << 16);
}

static inline uint16_t bf16_of(float value) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float float_of_f16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 31, fraction = bits & 0x3ff;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000 | fraction << 13);
  if (exponent != 0) return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -small : small;
}

static inline float float_of_e8m0(uint8_t exponent) {
  return float_of_bits(exponent < 2 ? 0x00200000u << exponent : (exponent - 1u) << 23);
}

// E4M3 as OCP's FP8 has it, but for its NaNs, which packing refuses: a finite f16 times 256.
static inline float float_of_e4m3(uint8_t bits) {
  const uint32_t widened = static_cast<uint32_t>(bits & 0x80) << 8 | (bits & 0x7fu) << 7;
  return 256 * float_of_f16(static_cast<uint16_t>(widened));
}

static inline uint16_t u16_at(const uint8_t* from) {
  uint16_t bits;
  memcpy(&bits, from, sizeof bits);
  return bits;
}

static inline uint32_t u32_at(const uint8_t* from) {
  uint32_t bits;
  memcpy(&bits, from, sizeof bits);
  return bits;
}

// As it is stored: an integer plus its zero, or the number of a code word. `n` of 16 outputs.
static inline int stored_value(const WeightFormat& f, const uint8_t* record, int64_t k, int n) {
  const uint8_t* chunk = record + k / kChunk * chunk_bytes(f);
  const int step = static_cast<int>(k % kChunk / 4), lane = static_cast<int>(k % 4);
  if (f.bits == 8) return chunk[step * 64 + n * 4 + lane];
  const int nibble = chunk[step % 4 * 64 + n * 4 + lane] >> (step < 4 ? 0 : 4) & 15;
  const int upper_bits = f.bits - 4;
  if (upper_bits == 0) return nibble;
  const int per_byte = 8 / upper_bits;
  const uint8_t upper =
      chunk[upper_at(n / 8, upper_bits) + step / per_byte * 32 + n % 8 * 4 + lane];
  return nibble | (upper >> step % per_byte * upper_bits & ((1 << upper_bits) - 1)) << 4;
}

// Into a record of zeros.
static inline void store_value(const WeightFormat& f, uint8_t* record, int64_t k, int n,
                               int value) {
  uint8_t* chunk = record + k / kChunk * chunk_bytes(f);
  const int step = static_cast<int>(k % kChunk / 4), lane = static_cast<int>(k % 4);
  if (f.bits == 8) {
    chunk[step * 64 + n * 4 + lane] = static_cast<uint8_t>(value);
    return;
  }
  chunk[step % 4 * 64 + n * 4 + lane] |= static_cast<uint8_t>((value & 15) << (step < 4 ? 0 : 4));
  const int upper_bits = f.bits - 4;
  if (upper_bits == 0) return;
  const int per_byte = 8 / upper_bits;
  chunk[upper_at(n / 8, upper_bits) + step / per_byte * 32 + n % 8 * 4 + lane] |=
      static_cast<uint8_t>(value >> 4 << step % per_byte * upper_bits);
}

static inline int integer_of(const WeightFormat& f, int stored) {
  return f.values == Values::code ? f.codebook[stored] : stored - f.zero;
}

static inline float float_at(const WeightFormat& f, const uint8_t* record, int64_t k, int n) {
  const int64_t at = k * kPanel + n;
  if (f.values == Values::e4m3) return float_of_e4m3(record[at]);
  if (f.values == Values::f16) return float_of_f16(u16_at(record + 2 * at));
  return float_of_bits(u32_at(record + 4 * at));
}

static inline float float_scale_of(const WeightFormat& f, const uint8_t* record, int64_t columns,
                                   int64_t g, int n) {
  if (f.scales == Scales::none) return 1;
  return float_of_bits(u32_at(record + value_bytes(f, columns) + (g * kPanel + n) * 4));
}

// The scale of a group, or its minimum where `at` is where those begin.
static inline float part_of_group(const WeightFormat& f, const uint8_t* record, int64_t at,
                                  int64_t super, int64_t g, int n) {
  const uint8_t* from = record + at + (g * kPanel + n) * scale_bytes(f);
  switch (f.scales) {
    case Scales::f16: return float_of_f16(u16_at(from));
    case Scales::e8m0: return float_of_e8m0(*from);
    case Scales::f16_u8:
      return float_of_f16(u16_at(record + super + 2 * n)) * static_cast<float>(*from);
    case Scales::f16_i8:
      return float_of_f16(u16_at(record + super + 2 * n)) *
             static_cast<float>(static_cast<int8_t>(*from));
    default: return 1;
  }
}

static inline float scale_of(const WeightFormat& f, const uint8_t* record, int64_t columns,
                             int64_t g, int n) {
  return part_of_group(f, record, value_bytes(f, columns), super_at(f, columns), g, n);
}

// K-quants take theirs away.
static inline float minimum_of(const WeightFormat& f, const uint8_t* record, int64_t columns,
                               int64_t g, int n) {
  if (!f.minimum) return 0;
  const float minimum =
      part_of_group(f, record, minimums_at(f, columns), super_at(f, columns) + 2 * kPanel, g, n);
  return has_super_scale(f) ? -minimum : minimum;
}

static inline float weight_at(const WeightFormat& f, const uint8_t* record, int64_t columns,
                              int64_t k, int n) {
  if (is_float(f))
    return float_at(f, record, k, n) * float_scale_of(f, record, columns, k / kFloatGroup, n);
  const int64_t g = k / f.group;
  const float value = static_cast<float>(integer_of(f, stored_value(f, record, k, n)));
  return scale_of(f, record, columns, g, n) * value + minimum_of(f, record, columns, g, n);
}

}  // namespace moescope
