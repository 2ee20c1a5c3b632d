// AMX's tiles in plain C++, for processors without: included before everything else, so that the
// kernels' own code runs on them. A wrong shape, or a tile before any configuration, ends the program.
#pragma once
#define MOESCOPE_AMX_EMULATED
#ifdef __AMX_TILE__
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace amx_emulated {

struct Tile {
  uint8_t rows, bytes[16][64];
  uint16_t row_bytes;
};
thread_local Tile tiles[8];
thread_local bool configured = false;

inline void require(bool fine) {
  if (!fine) __builtin_trap();
}

inline void configure(const void* shape) {
  const uint8_t* from = static_cast<const uint8_t*>(shape);
  require(from[0] == 1);
  for (int i = 0; i < 8; ++i) {
    Tile& tile = tiles[i] = {};
    memcpy(&tile.row_bytes, from + 16 + 2 * i, 2);
    tile.rows = from[48 + i];
    require(tile.row_bytes <= 64 && tile.rows <= 16 && (tile.rows == 0) == (tile.row_bytes == 0));
  }
  configured = true;
}

inline Tile& at(int i) {
  require(configured && tiles[i].rows > 0);
  return tiles[i];
}

inline void zero(int i) { memset(at(i).bytes, 0, sizeof tiles[i].bytes); }

inline void load(int i, const void* from, int64_t stride) {
  zero(i);
  for (int r = 0; r < tiles[i].rows; ++r)
    memcpy(tiles[i].bytes[r], static_cast<const char*>(from) + r * stride, tiles[i].row_bytes);
}

inline void store(int i, void* to, int64_t stride) {
  for (int r = 0; r < at(i).rows; ++r)
    memcpy(static_cast<char*>(to) + r * stride, tiles[i].bytes[r], tiles[i].row_bytes);
}

// to += a * b, of signed and of unsigned bytes.
inline void dpbsud(int to, int a, int b) {
  Tile &sums = at(to), &x = at(a), &w = at(b);
  require(sums.rows == x.rows && sums.row_bytes == w.row_bytes && x.row_bytes == 4 * w.rows);
  for (int r = 0; r < sums.rows; ++r)
    for (int n = 0; n < sums.row_bytes; n += 4) {
      int32_t sum;
      memcpy(&sum, sums.bytes[r] + n, sizeof sum);
      for (int k = 0; k < x.row_bytes; ++k)
        sum += static_cast<int8_t>(x.bytes[r][k]) * w.bytes[k / 4][n + k % 4];
      memcpy(sums.bytes[r] + n, &sum, sizeof sum);
    }
}

}  // namespace amx_emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig(shape) amx_emulated::configure(shape)
#define _tile_release() (amx_emulated::configured = false)
#define _tile_zero(i) amx_emulated::zero(i)
#define _tile_loadd(i, from, stride) amx_emulated::load(i, from, stride)
#define _tile_stored(i, to, stride) amx_emulated::store(i, to, stride)
#define _tile_dpbsud(to, a, b) amx_emulated::dpbsud(to, a, b)
#endif
