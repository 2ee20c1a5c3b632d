// AMX's instructions on tiles of up to 16 rows of 64 bytes, whose numbers are constants. (The compiler's
// own want to see them as they are written.)
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "each.h"

#ifndef MOESCOPE_AMX_EMULATED
namespace moescope {
namespace {
namespace tiles {

// Says how many rows tiles have, and of how many bytes; `TileShapes` says it.
MOESCOPE_INLINE inline void configure(const void* shapes) { _tile_loadconfig(shapes); }
MOESCOPE_INLINE inline void release() { _tile_release(); }

template <int T>
MOESCOPE_INLINE inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// `stride` bytes from row to row.
template <int T>
MOESCOPE_INLINE inline void load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
MOESCOPE_INLINE inline void store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}

// to += a * b, where four signed bytes of a row meet four of a column, which stand together in a row
// of b.
template <int To, int A, int B>
MOESCOPE_INLINE inline void add_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(To), "i"(A), "i"(B));
}
// The same with two numbers of bf16.
template <int To, int A, int B>
MOESCOPE_INLINE inline void add_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(To), "i"(A), "i"(B));
}

}  // namespace tiles
}  // namespace
}  // namespace moescope
#endif

namespace moescope {
namespace {

constexpr int kTileRows = 16;

// What the processor is told of tiles (`ldtilecfg`).
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int rows_of_it, int bytes) {
    if (rows_of_it == 0 || bytes == 0) return;
    rows[tile] = static_cast<uint8_t>(rows_of_it);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
};

}  // namespace
}  // namespace moescope
