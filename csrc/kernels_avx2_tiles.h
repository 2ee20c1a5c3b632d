// Products with weights that lie in tiles, on registers of 256 bits, with or without VNNI. Included by
// the files of those sets, whose compiler flags make the difference.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "each.h"
#include "isa.h"

namespace moescope {
namespace {

constexpr int kRows = 4;
constexpr WeightFormat kInt8 = kWeightFormats[format_named("int8")];
constexpr int64_t kColumnBlock = 256;  // columns of a tile that stay in the first-level cache

inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

inline __m256i broadcast(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

inline __m256 bytes_at(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

// The sums start so as to make up for the zero point where weights are taken as they are stored, and
// at zero where it is taken off them first.
#ifdef __AVXVNNI__
constexpr bool kInt8AsStored = true;
// As an intrinsic, GCC 12 copies every sum.
MOESCOPE_INLINE inline __m256i dot_int8(__m256i sums, __m256i weights, __m256i x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(weights), "x"(x));
  return sums;
}
MOESCOPE_INLINE inline __m256i dot_int4(__m256i sums, __m256i weights, __m256i x) {
  return dot_int8(sums, weights, x);
}
MOESCOPE_INLINE inline __m256i whole_int4(__m256i sums) { return sums; }
#else
constexpr bool kInt8AsStored = false;
// `maddubs` saturates for bytes above 127, so magnitudes are multiplied with signs moved across.
inline __m256i dot_int8(__m256i sums, __m256i weights, __m256i x) {
  const __m256i signed_weights = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(signed_weights), _mm256_sign_epi8(x, signed_weights));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// The products of a chunk, 16 of 4 and 8 bits to a sum, fit 16 bits; `whole_int4` widens their sums.
inline __m256i dot_int4(__m256i sums, __m256i weights, __m256i x) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights, x));
}
inline __m256i whole_int4(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
#endif

// Inlined by force: GCC takes a function that only fetches for one without effect.
MOESCOPE_INLINE inline void prefetch(const void* from) {
  _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1);
}

// Adds M rows of panel `p` over the columns of groups [first, last) to `out`, or sets it there.
// Meanwhile fetches as many bytes that stand `ahead`, one line behind the other, as the processor's
// own prefetcher wants it.
template <bool Fetch, int M>
MOESCOPE_INLINE inline void add_int8(const Tile& tile, int p, const Activations& a,
                                     const int64_t* row, int64_t first, int64_t last,
                                     const uint8_t* ahead, bool fresh, float* out) {
  const int64_t step = tile.panels * 64;
  const uint8_t* panel = tile.weights + p * 64;
  __m256 sums[M][2];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < 2; ++p)
      sums[m][p] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(out + m * kTile + p * 8);
  for (int64_t g = first; g < last; ++g) {
    __m256i dots[M][2];
    for (int m = 0; m < M; ++m)
      dots[m][0] = dots[m][1] = _mm256_set1_epi32(
          kInt8AsStored ? start_of_dots(kInt8.zero, a.sums[row[m] * a.groups + g]) : 0);
    const int64_t begin = g * a.group;
    const int64_t end = begin + a.group < a.columns ? begin + a.group : a.columns;
    const uint8_t* w = panel + begin / 4 * step;
    for (int64_t k = begin; k < end; k += 4, w += step, ahead += 64) {
      if (Fetch) prefetch(ahead);
      const __m256i left = load(w), right = load(w + 32);
      for (int m = 0; m < M; ++m) {
        const __m256i x = broadcast(a.values + row[m] * a.columns + k);
        dots[m][0] = dot_int8(dots[m][0], left, x);
        dots[m][1] = dot_int8(dots[m][1], right, x);
      }
    }
    for (int m = 0; m < M; ++m) {
      const __m256 scale = _mm256_set1_ps(a.scales[row[m] * a.groups + g]);
      for (int p = 0; p < 2; ++p)
        sums[m][p] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[m][p]), sums[m][p]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < 2; ++p) _mm256_storeu_ps(out + m * kTile + p * 8, sums[m][p]);
}

template <bool Fetch, int M>
MOESCOPE_INLINE inline void add_int4(const Tile& tile, int p, const Activations& a,
                                     const int64_t* row, int64_t first, int64_t last,
                                     const uint8_t* ahead, bool fresh, float* out) {
  const int64_t step = tile.panels * 64, chunk_bytes = tile.panels * 288;
  const __m256i low = _mm256_set1_epi8(15);
  __m256 sums[M][2];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < 2; ++p)
      sums[m][p] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(out + m * kTile + p * 8);
  for (int64_t g = first; g < last; ++g, ahead += 288) {
    const uint8_t* chunk = tile.weights + g * chunk_bytes;
    if (Fetch) prefetch(ahead + 256);
    __m256i dots[M][2];
    for (int m = 0; m < M; ++m) dots[m][0] = dots[m][1] = _mm256_setzero_si256();
    for (int s = 0; s < 4; ++s) {
      if (Fetch) prefetch(ahead + s * 64);
      for (int half = 0; half < 2; ++half) {
        const __m256i both = load(chunk + s * step + p * 64 + half * 32);
        const __m256i first_half = _mm256_and_si256(both, low);
        const __m256i second_half = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        for (int m = 0; m < M; ++m) {
          const int8_t* values = a.values + row[m] * a.columns + g * kChunk + s * 4;
          dots[m][half] = dot_int4(dots[m][half], first_half, broadcast(values));
          dots[m][half] = dot_int4(dots[m][half], second_half, broadcast(values + 16));
        }
      }
    }
    const uint8_t* scales = chunk + 4 * step + p * kPanel;
    for (int half = 0; half < 2; ++half) {
      const __m256 scale = bytes_at(scales + half * 8);
      const __m256 minimum = bytes_at(scales + tile.panels * kPanel + half * 8);
      for (int m = 0; m < M; ++m) {
        const int64_t group = row[m] * a.groups + g;
        const float size = a.scales[group];
        const float sum = size * static_cast<float>(start_of_dots(kInt4Minimum, a.sums[group]));
        sums[m][half] =
            _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(size)),
                            _mm256_cvtepi32_ps(whole_int4(dots[m][half])), sums[m][half]);
        sums[m][half] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(sum), sums[m][half]);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < 2; ++p) _mm256_storeu_ps(out + m * kTile + p * 8, sums[m][p]);
}

template <bool Fetch, int M>
MOESCOPE_INLINE inline void add_bf16(const Tile& tile, int p, const Activations& a,
                                     const int64_t* row, int64_t first, int64_t last,
                                     const uint8_t* ahead, bool fresh, float* out) {
  const int64_t step = tile.panels * 64;
  const uint8_t* panel = tile.weights + p * 64;
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  __m256 sums[M][2];
  const float* x[M];
  each<M>([&](auto m) MOESCOPE_INLINE {
    x[m] = a.numbers + row[m] * a.columns;
    sums[m][0] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(out + m * kTile);
    sums[m][1] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(out + m * kTile + 8);
  });
  for (int64_t k = first; k < last; k += 2, ahead += 64) {
    if (Fetch) prefetch(ahead);
    const uint8_t* w = panel + k / 2 * step;
    const __m256i left = load(w), right = load(w + 32);
    const auto add = [&](int64_t column, __m256i low, __m256i high) MOESCOPE_INLINE {
      each<M>([&](auto m) MOESCOPE_INLINE {
        const __m256 factor = _mm256_broadcast_ss(x[m] + column);
        sums[m][0] = _mm256_fmadd_ps(factor, _mm256_castsi256_ps(low), sums[m][0]);
        sums[m][1] = _mm256_fmadd_ps(factor, _mm256_castsi256_ps(high), sums[m][1]);
      });
    };
    add(k, _mm256_slli_epi32(left, 16), _mm256_slli_epi32(right, 16));
    add(k + 1, _mm256_and_si256(left, upper), _mm256_and_si256(right, upper));
  }
  each<M>([&](auto m) MOESCOPE_INLINE {
    _mm256_storeu_ps(out + m * kTile, sums[m][0]);
    _mm256_storeu_ps(out + m * kTile + 8, sums[m][1]);
  });
}

// One row, with all panels side by side, so that weights are read in the order in which they lie.
template <int F, int P>
struct Line {
  static constexpr WeightFormat f = kWeightFormats[F];
  static constexpr int kHalves = 2 * P;    // of panels
  static constexpr int64_t kAhead = 2048;  // bytes

  const Tile& tile;
  const uint8_t* at;
  __m256 sums[kHalves];

  // Fetches as many lines as are read next, from a little further on.
  template <int Lines>
  MOESCOPE_INLINE void fetch() const {
    const uint8_t* from = at + kAhead;
    if (from >= tile.end) from = tile.next + (from - tile.end);
    each<Lines>([&](auto line) MOESCOPE_INLINE {
      _mm_prefetch(reinterpret_cast<const char*>(from) + line * 64, _MM_HINT_T0);
    });
  }

  MOESCOPE_INLINE void add_int8(const Activations& a, int64_t row, int64_t g) {
    const int64_t begin = g * a.group;
    const int64_t end = begin + a.group < a.columns ? begin + a.group : a.columns;
    const int8_t* x = a.values + row * a.columns;
    const int64_t group = row * a.groups + g;
    __m256i dots[kHalves];
    each<kHalves>([&](auto half) MOESCOPE_INLINE {
      dots[half] = _mm256_set1_epi32(kInt8AsStored ? start_of_dots(kInt8.zero, a.sums[group]) : 0);
    });
    for (int64_t k = begin; k < end; k += 16) {
      fetch<4 * P>();
      each<4>([&](auto step) MOESCOPE_INLINE {
        const __m256i four = broadcast(x + k + step * 4);
        each<kHalves>([&](auto half) MOESCOPE_INLINE {
          dots[half] = dot_int8(dots[half], load(at + half * 32), four);
        });
        at += P * 64;
      });
    }
    const __m256 scale = _mm256_set1_ps(a.scales[group]);
    each<kHalves>([&](auto half) MOESCOPE_INLINE {
      sums[half] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[half]), sums[half]);
    });
  }

  MOESCOPE_INLINE void add_int4(const Activations& a, int64_t row, int64_t g) {
    const __m256i low = _mm256_set1_epi8(15);
    const int8_t* x = a.values + row * a.columns + g * kChunk;
    const int64_t group = row * a.groups + g;
    __m256i dots[kHalves];
    each<kHalves>([&](auto half) MOESCOPE_INLINE { dots[half] = _mm256_setzero_si256(); });
    fetch<(288 * P + 63) / 64>();
    each<4>([&](auto step) MOESCOPE_INLINE {
      const __m256i first = broadcast(x + step * 4), second = broadcast(x + 16 + step * 4);
      each<kHalves>([&](auto half) MOESCOPE_INLINE {
        const __m256i both = load(at + half * 32);
        dots[half] = dot_int4(dots[half], _mm256_and_si256(both, low), first);
        dots[half] =
            dot_int4(dots[half], _mm256_and_si256(_mm256_srli_epi16(both, 4), low), second);
      });
      at += P * 64;
    });
    const float size = a.scales[group];
    const float sum = size * static_cast<float>(start_of_dots(kInt4Minimum, a.sums[group]));
    each<kHalves>([&](auto half) MOESCOPE_INLINE {
      const __m256 scale = _mm256_mul_ps(bytes_at(at + half * 8), _mm256_set1_ps(size));
      sums[half] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(whole_int4(dots[half])), sums[half]);
      sums[half] =
          _mm256_fmadd_ps(bytes_at(at + P * kPanel + half * 8), _mm256_set1_ps(sum), sums[half]);
    });
    at += 2 * P * kPanel;
  }

  MOESCOPE_INLINE void add_bf16(const float* x) {
    const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    fetch<P>();
    const __m256 even = _mm256_broadcast_ss(x), odd = _mm256_broadcast_ss(x + 1);
    each<kHalves>([&](auto half) MOESCOPE_INLINE {
      const __m256i both = load(at + half * 32);
      sums[half] =
          _mm256_fmadd_ps(even, _mm256_castsi256_ps(_mm256_slli_epi32(both, 16)), sums[half]);
      sums[half] =
          _mm256_fmadd_ps(odd, _mm256_castsi256_ps(_mm256_and_si256(both, upper)), sums[half]);
    });
    at += P * 64;
  }
};

template <int F, int P>
__attribute__((noinline)) void multiply_line(const Tile& tile, const Activations& a, int64_t row,
                                             float* out) {
  Line<F, P> line{tile, tile.weights, {}};
  if constexpr (is_float(kWeightFormats[F]))
    for (int64_t k = 0; k < a.columns; k += 2) line.add_bf16(a.numbers + row * a.columns + k);
  else
    for (int64_t g = 0; g < a.groups; ++g)
      if constexpr (kWeightFormats[F].bits == 4)
        line.add_int4(a, row, g);
      else
        line.add_int8(a, row, g);
  each<2 * P>([&](auto half)
                  MOESCOPE_INLINE { _mm256_storeu_ps(out + half * 8, line.sums[half]); });
}

template <int F, bool Fetch, int M>
void add(const Tile& tile, const Activations& a, const int64_t* row, int64_t first, int64_t last,
         const uint8_t* ahead, int64_t ahead_bytes, float* out) {
  for (int p = 0; p < tile.panels; ++p, ahead += ahead_bytes, out += kPanel) {
    if constexpr (kWeightFormats[F].bits == 4)
      add_int4<Fetch, M>(tile, p, a, row, first, last, ahead, first == 0, out);
    else if constexpr (kWeightFormats[F].bits == 8)
      add_int8<Fetch, M>(tile, p, a, row, first, last, ahead, first == 0, out);
    else
      add_bf16<Fetch, M>(tile, p, a, row, first, last, ahead, first == 0, out);
  }
}

template <int F, bool Fetch>
void add_rows(int count, const Tile& tile, const Activations& a, const int64_t* row, int64_t first,
              int64_t last, const uint8_t* ahead, int64_t ahead_bytes, float* out) {
  switch (count) {
    case 1: return add<F, Fetch, 1>(tile, a, row, first, last, ahead, ahead_bytes, out);
    case 2: return add<F, Fetch, 2>(tile, a, row, first, last, ahead, ahead_bytes, out);
    case 3: return add<F, Fetch, 3>(tile, a, row, first, last, ahead, ahead_bytes, out);
    default: return add<F, Fetch, 4>(tile, a, row, first, last, ahead, ahead_bytes, out);
  }
}

// Goes block by block, so that each block of weights is read from the first-level cache by all
// panels and rows but the first rows, which fetch the next block meanwhile. Parts are groups, or
// bf16's columns.
template <int F>
void multiply_parts(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                    int64_t parts, int64_t columns, float* out) {
  const int64_t step = kColumnBlock / columns;
  const int64_t part_bytes = panel_bytes(kWeightFormats[F], columns);
  for (int64_t first = 0; first < parts; first += step) {
    const int64_t last = first + step < parts ? first + step : parts;
    const uint8_t* ahead = tile.weights + (first + step) * part_bytes * tile.panels;
    if (ahead >= tile.end) ahead = tile.next;
    for (int start = 0; start < count; start += kRows) {
      const int m = count - start < kRows ? count - start : kRows;
      int64_t row[kRows];
      for (int i = 0; i < m; ++i) row[i] = rows ? rows[start + i] : start + i;
      float* to = out + start * kTile;
      if (start == 0)
        add_rows<F, true>(m, tile, a, row, first, last, ahead, step * part_bytes, to);
      else
        add_rows<F, false>(m, tile, a, row, first, last, ahead, 0, to);
    }
  }
}

}  // namespace
}  // namespace moescope
