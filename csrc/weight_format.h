// The formats in which weights are held: one table, from which everything else derives. The kernels
// are compiled for an instruction set each, so what is here must not leave their files (isa.h).
#pragma once
#include <cstdint>

namespace moescope {

constexpr int kPanel = 16;               // outputs whose weights are interleaved
constexpr int kPanels = 4;               // panels in a tile
constexpr int kTile = kPanel * kPanels;  // outputs that one call computes
constexpr int kChunk = 32;               // columns are padded to a multiple of this
constexpr int kRecord = 256;             // columns of a panel that lie together at most
constexpr int kFloatGroup = 128;         // columns of floating point that share a scale

// What a weight's bits are.
enum class Values { integer, code, e4m3, bf16, f16, f32 };

// How the scales of a format are held, and its minimums if it has any.
enum class Scales {
  none,    // the values stand for themselves
  row,     // float32, one a row
  row_u8,  // an unsigned byte a group, times one float32 a row
  f16,     // one a group
  f32,     // one for 128 columns of floating point (DeepSeek-V3, section 3.3.2)
  e8m0,    // an exponent a group, of half the weights' scale as OCP's microscaling has it
  f16_u8,  // an unsigned byte a group, times one f16 for 256 columns
  f16_i8,  // a signed byte a group, times one f16 for 256 columns
};

// Where the weights of a tile lie.
enum class Order {
  tile,    // all panels of a step of columns side by side, as registers of 512 bits want them
  record,  // up to 256 columns of a panel together, record by record
};

// weight = scale * (stored - zero), or scale * codebook[stored], plus the minimum.
struct WeightFormat {
  const char* name;
  Values values;
  int bits;   // of a value
  int zero;   // integers and code words are kept plus this, as unsigned bytes
  int group;  // columns whose products are summed in integers; 0 for floating point
  Scales scales;
  bool minimum;
  Order order;
  const int8_t* codebook;  // of 16 words
};

// What int4 takes off a group's weights counts so much more than its scale: a row has one number for
// both. The lowest of 16 steps is 15 of them away at most, and seldom more than 8.
constexpr int kInt4Minimum = 8;

// IQ4's words and MXFP4's (e2m1, doubled), as ggml has them.
constexpr int8_t kIq4Words[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                  1,    13,   25,  38,  53,  69,  89,  113};
constexpr int8_t kMxfp4Words[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

constexpr WeightFormat kWeightFormats[] = {
    // name, values, bits, zero, group, scales, minimum, order, codebook
    {"int8", Values::integer, 8, 128, 64, Scales::row, false, Order::tile, nullptr},
    {"int4", Values::integer, 4, 0, 32, Scales::row_u8, true, Order::tile, nullptr},
    {"bf16", Values::bf16, 16, 0, 0, Scales::none, false, Order::tile, nullptr},
    {"fp8", Values::e4m3, 8, 0, 0, Scales::f32, false, Order::record, nullptr},
    {"f16", Values::f16, 16, 0, 0, Scales::none, false, Order::record, nullptr},
    {"f32", Values::f32, 32, 0, 0, Scales::none, false, Order::record, nullptr},
    {"q8_0", Values::integer, 8, 128, 32, Scales::f16, false, Order::record, nullptr},
    {"q4_0", Values::integer, 4, 8, 32, Scales::f16, false, Order::record, nullptr},
    {"q4_1", Values::integer, 4, 0, 32, Scales::f16, true, Order::record, nullptr},
    {"q5_0", Values::integer, 5, 16, 32, Scales::f16, false, Order::record, nullptr},
    {"q5_1", Values::integer, 5, 0, 32, Scales::f16, true, Order::record, nullptr},
    {"q4_k", Values::integer, 4, 0, 32, Scales::f16_u8, true, Order::record, nullptr},
    {"q5_k", Values::integer, 5, 0, 32, Scales::f16_u8, true, Order::record, nullptr},
    {"q6_k", Values::integer, 6, 32, 16, Scales::f16_i8, false, Order::record, nullptr},
    {"iq4_nl", Values::code, 4, 128, 32, Scales::f16, false, Order::record, kIq4Words},
    {"iq4_xs", Values::code, 4, 128, 32, Scales::f16_i8, false, Order::record, kIq4Words},
    {"mxfp4", Values::code, 4, 12, 32, Scales::e8m0, false, Order::record, kMxfp4Words},
};
constexpr int kFormats = sizeof kWeightFormats / sizeof kWeightFormats[0];

// The place of a format in the table, or -1.
static constexpr int format_named(const char* name) {
  for (int format = 0; format < kFormats; ++format) {
    const char *a = kWeightFormats[format].name, *b = name;
    while (*a == *b && *a != 0) ++a, ++b;
    if (*a == *b) return format;
  }
  return -1;
}

static constexpr bool is_float(const WeightFormat& f) { return f.group == 0; }

static constexpr bool has_row_scale(const WeightFormat& f) {
  return f.scales == Scales::row || f.scales == Scales::row_u8;
}

static constexpr bool has_super_scale(const WeightFormat& f) {
  return f.scales == Scales::f16_u8 || f.scales == Scales::f16_i8;
}

// Bytes of a group's scale, or of its minimum.
static constexpr int scale_bytes(const WeightFormat& f) {
  switch (f.scales) {
    case Scales::none:
    case Scales::row: return 0;
    case Scales::f16: return 2;
    case Scales::f32: return 4;
    default: return 1;
  }
}

// Parts of a record of so many columns of a panel: values; scales [groups][16 outputs]; minimums
// likewise; one f16 scale for all of a row's 256 columns, [16 outputs]; one of its minimums.
static constexpr int64_t value_bytes(const WeightFormat& f, int64_t columns) {
  return columns * kPanel * f.bits / 8;
}
static constexpr int64_t scales_size(const WeightFormat& f, int64_t columns) {
  const int64_t group = is_float(f) ? kFloatGroup : f.group;
  return (columns + group - 1) / group * kPanel * scale_bytes(f);
}
static constexpr int64_t minimums_at(const WeightFormat& f, int64_t columns) {
  return value_bytes(f, columns) + scales_size(f, columns);
}
static constexpr int64_t super_at(const WeightFormat& f, int64_t columns) {
  return minimums_at(f, columns) + (f.minimum ? scales_size(f, columns) : 0);
}
// Of any number of padded columns, whose records lie one behind the other.
static constexpr int64_t panel_bytes(const WeightFormat& f, int64_t columns) {
  const int64_t supers = has_super_scale(f) ? columns / kRecord : 0;
  return super_at(f, columns) + supers * (f.minimum ? 4 : 2) * kPanel;
}

// Of a stored value, what its byte may be at most: what decides how many products an instruction
// set may add before it must widen them.
static constexpr int largest_stored(const WeightFormat& f) {
  if (f.values != Values::code) return (1 << f.bits) - 1;
  int largest = 0;
  for (int i = 0; i < 16; ++i)
    if (f.codebook[i] + f.zero > largest) largest = f.codebook[i] + f.zero;
  return largest;
}

// Values of 4, 5 and 6 bits lie in chunks of 32 columns, in eight steps of 4 columns: [4][16][4]
// bytes, of which the low nibbles are steps 0 to 3 and the high ones steps 4 to 7; behind them, for
// each half of 8 outputs, the upper bits, [bits - 4][8][4] bytes, with those of the first steps
// lowest. 8 bits lie as [8 steps][16][4] bytes; floating point as [columns][16].
static constexpr int64_t chunk_bytes(const WeightFormat& f) { return value_bytes(f, kChunk); }
static constexpr int64_t upper_at(int half, int upper_bits) { return 256 + half * upper_bits * 32; }

}  // namespace moescope
