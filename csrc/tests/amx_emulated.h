// AMX's tiles in plain C++, for processors without: included before everything else, so that the
// kernels' own code runs on them. A wrong shape, or a tile before any configuration, ends the program.
#pragma once
#define MOESCOPE_AMX_EMULATED
#include <stdint.h>
#include <string.h>

namespace moescope {
namespace {
namespace tiles {

struct Emulated {
  uint8_t rows, bytes[16][64];
  uint16_t row_bytes;
};
thread_local Emulated all[8];
thread_local bool configured = false;

inline void require(bool fine) {
  if (!fine) __builtin_trap();
}

inline void configure(const void* shapes) {
  const uint8_t* from = static_cast<const uint8_t*>(shapes);
  require(from[0] == 1);
  for (int i = 0; i < 8; ++i) {
    Emulated& tile = all[i] = {};
    memcpy(&tile.row_bytes, from + 16 + 2 * i, 2);
    tile.rows = from[48 + i];
    require(tile.row_bytes <= 64 && tile.rows <= 16 && (tile.rows == 0) == (tile.row_bytes == 0));
  }
  configured = true;
}

inline void release() { configured = false; }

inline Emulated& at(int i) {
  require(configured && all[i].rows > 0);
  return all[i];
}

template <int T>
void zero() {
  memset(at(T).bytes, 0, sizeof all[T].bytes);
}

template <int T>
void load(const void* from, int64_t stride) {
  zero<T>();
  for (int r = 0; r < all[T].rows; ++r)
    memcpy(all[T].bytes[r], static_cast<const char*>(from) + r * stride, all[T].row_bytes);
}

template <int T>
void store(void* to, int64_t stride) {
  for (int r = 0; r < at(T).rows; ++r)
    memcpy(static_cast<char*>(to) + r * stride, all[T].bytes[r], all[T].row_bytes);
}

// For each sum, adds what `product` makes of four bytes of a row and of a column.
template <typename Sum, typename Product>
void add(int to, int a, int b, Product product) {
  Emulated &sums = at(to), &x = at(a), &w = at(b);
  require(sums.rows == x.rows && sums.row_bytes == w.row_bytes && x.row_bytes == 4 * w.rows);
  for (int r = 0; r < sums.rows; ++r)
    for (int n = 0; n < sums.row_bytes; n += 4) {
      Sum sum;
      memcpy(&sum, sums.bytes[r] + n, sizeof sum);
      for (int k = 0; k < x.row_bytes; k += 4) sum += product(x.bytes[r] + k, w.bytes[k / 4] + n);
      memcpy(sums.bytes[r] + n, &sum, sizeof sum);
    }
}

template <int To, int A, int B>
void add_bytes() {
  add<int32_t>(To, A, B, [](const uint8_t* x, const uint8_t* w) {
    int32_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<int8_t>(x[i]) * static_cast<int8_t>(w[i]);
    return sum;
  });
}

inline float number(const uint8_t* bf16) {
  uint16_t upper;
  memcpy(&upper, bf16, sizeof upper);
  const uint32_t bits = static_cast<uint32_t>(upper) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <int To, int A, int B>
void add_bf16() {
  add<float>(To, A, B, [](const uint8_t* x, const uint8_t* w) {
    return number(x) * number(w) + number(x + 2) * number(w + 2);
  });
}

}  // namespace tiles
}  // namespace
}  // namespace moescope
