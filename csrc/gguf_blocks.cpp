#include "gguf_blocks.h"

#include <cstring>
#include <stdexcept>

namespace moescope {
namespace {

// Bytes of columns 0 to 15 and, in the high nibbles, 16 to 31.
void read_nibbles(const uint8_t* bytes, uint8_t* values) {
  for (int i = 0; i < 16; ++i) {
    values[i] = bytes[i] & 15;
    values[16 + i] = bytes[i] >> 4;
  }
}

void add_fifth_bits(const uint8_t* bytes, uint8_t* values) {
  for (int k = 0; k < 32; ++k) values[k] |= static_cast<uint8_t>((bytes[k / 8] >> k % 8 & 1) << 4);
}

void read_q4_0(const uint8_t* bytes, Block& block) {  // and IQ4_NL
  std::memcpy(block.scales, bytes, 2);
  read_nibbles(bytes + 2, block.values);
}

void read_q4_1(const uint8_t* bytes, Block& block) {
  std::memcpy(block.scales, bytes, 2);
  std::memcpy(block.minimums, bytes + 2, 2);
  read_nibbles(bytes + 4, block.values);
}

void read_q5_0(const uint8_t* bytes, Block& block) {
  std::memcpy(block.scales, bytes, 2);
  read_nibbles(bytes + 6, block.values);
  add_fifth_bits(bytes + 2, block.values);
}

void read_q5_1(const uint8_t* bytes, Block& block) {
  std::memcpy(block.scales, bytes, 2);
  std::memcpy(block.minimums, bytes + 2, 2);
  read_nibbles(bytes + 8, block.values);
  add_fifth_bits(bytes + 4, block.values);
}

void read_q8_0(const uint8_t* bytes, Block& block) {
  std::memcpy(block.scales, bytes, 2);
  for (int k = 0; k < 32; ++k) block.values[k] = bytes[2 + k] ^ 0x80;
}

void read_mxfp4(const uint8_t* bytes, Block& block) {
  block.scales[0] = bytes[0];
  read_nibbles(bytes + 1, block.values);
}

// Twelve bytes hold eight scales and eight minimums of 6 bits.
void read_k_scales(const uint8_t* bytes, Block& block) {
  std::memcpy(&block.super_scale, bytes, 2);
  std::memcpy(&block.super_minimum, bytes + 2, 2);
  const uint8_t* packed = bytes + 4;
  for (int g = 0; g < 4; ++g) {
    block.scales[g] = packed[g] & 63;
    block.minimums[g] = packed[4 + g] & 63;
    block.scales[4 + g] = static_cast<uint8_t>((packed[8 + g] & 15) | (packed[g] >> 2 & 48));
    block.minimums[4 + g] = static_cast<uint8_t>(packed[8 + g] >> 4 | (packed[4 + g] >> 2 & 48));
  }
}

// 32 columns in the low nibbles, the next 32 in the high ones.
void read_k_nibbles(const uint8_t* bytes, uint8_t* values) {
  for (int g = 0; g < 8; ++g)
    for (int k = 0; k < 32; ++k) values[g * 32 + k] = bytes[g / 2 * 32 + k] >> g % 2 * 4 & 15;
}

void read_q4_k(const uint8_t* bytes, Block& block) {
  read_k_scales(bytes, block);
  read_k_nibbles(bytes + 16, block.values);
}

void read_q5_k(const uint8_t* bytes, Block& block) {
  read_k_scales(bytes, block);
  read_k_nibbles(bytes + 48, block.values);
  for (int g = 0; g < 8; ++g)
    for (int k = 0; k < 32; ++k)
      block.values[g * 32 + k] |= static_cast<uint8_t>((bytes[16 + k] >> g & 1) << 4);
}

void read_q6_k(const uint8_t* bytes, Block& block) {
  for (int row = 0; row < 8; ++row) {  // of 32 columns
    const uint8_t* low = bytes + row / 4 * 64 + row % 2 * 32;
    const uint8_t* upper = bytes + 128 + row / 4 * 32;
    for (int k = 0; k < 32; ++k)
      block.values[row * 32 + k] = static_cast<uint8_t>((low[k] >> row % 4 / 2 * 4 & 15) |
                                                        (upper[k] >> row % 4 * 2 & 3) << 4);
  }
  std::memcpy(block.scales, bytes + 192, 16);
  std::memcpy(&block.super_scale, bytes + 208, 2);
}

void read_iq4_xs(const uint8_t* bytes, Block& block) {
  std::memcpy(&block.super_scale, bytes, 2);
  for (int g = 0; g < 8; ++g) {
    const int upper = bytes[2 + g / 4] >> g % 4 * 2 & 3, low = bytes[4 + g / 2] >> g % 2 * 4 & 15;
    block.scales[g] = static_cast<uint8_t>((low | upper << 4) - 32);
    read_nibbles(bytes + 8 + g * 16, block.values + g * 32);
  }
}

constexpr GgufType kGgufTypes[] = {
    {"F32", "f32", 1, 4, nullptr},
    {"F16", "f16", 1, 2, nullptr},
    {"BF16", "bf16", 1, 2, nullptr},
    {"Q8_0", "q8_0", 32, 34, read_q8_0},
    {"Q4_0", "q4_0", 32, 18, read_q4_0},
    {"Q4_1", "q4_1", 32, 20, read_q4_1},
    {"Q5_0", "q5_0", 32, 22, read_q5_0},
    {"Q5_1", "q5_1", 32, 24, read_q5_1},
    {"Q4_K", "q4_k", 256, 144, read_q4_k},
    {"Q5_K", "q5_k", 256, 176, read_q5_k},
    {"Q6_K", "q6_k", 256, 210, read_q6_k},
    {"IQ4_NL", "iq4_nl", 32, 18, read_q4_0},
    {"IQ4_XS", "iq4_xs", 256, 136, read_iq4_xs},
    {"MXFP4", "mxfp4", 32, 17, read_mxfp4},
    {"F8_E4M3", "fp8", kFloatGroup, 4 + kFloatGroup, nullptr},
};

}  // namespace

const GgufType& gguf_type(const std::string& name) {
  for (const GgufType& type : kGgufTypes)
    if (name == type.name) return type;
  throw std::invalid_argument("blocks of the type " + name + " are not known");
}

}  // namespace moescope
