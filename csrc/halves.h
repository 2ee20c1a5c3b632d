// Numbers in 16 bits, and what rounding to them takes.
#pragma once
#include <cstdint>
#include <cstring>

#include "each.h"

namespace moescope {
namespace {

// Nearest integer, ties to even, of a magnitude below 2^22.
template <typename T>
MOESCOPE_INLINE inline T nearest(T x) {
  return (x + 12582912.0f) - 12582912.0f;
}

// Also of what is not a number: `low`.
MOESCOPE_INLINE inline float clamp(float x, float low, float high) {
  x = x > low ? x : low;
  return x < high ? x : high;
}

MOESCOPE_INLINE inline uint16_t to_f16(float value) {  // to nearest, ties to even; at most 65504
  value = clamp(value, -65504.0f, 65504.0f);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffff;
  if (bits < 0x38800000) {  // below 2^-14: a multiple of 2^-24
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(nearest(value * 16777216.0f)));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | ((bits - 0x38000000) >> 13));
}

MOESCOPE_INLINE inline float from_f16(uint16_t half) {
  const uint32_t magnitude = half & 0x7fff;
  float value;
  if (magnitude < 0x400) {
    value = static_cast<float>(magnitude) / 16777216.0f;
  } else {
    const uint32_t bits = (magnitude << 13) + 0x38000000;
    std::memcpy(&value, &bits, sizeof value);
  }
  return half & 0x8000 ? -value : value;
}

// As an f16 holds it.
MOESCOPE_INLINE inline float halved(float value) { return from_f16(to_f16(value)); }

}  // namespace
}  // namespace moescope
