// Products with weights that lie in tiles, on registers of 512 bits with VNNI: one `vpdpbusd` multiplies
// 4 columns of 16 outputs. Included by the file of that set, whose compiler flags it needs.
#pragma once
#include <immintrin.h>
#include <string.h>

#include <type_traits>

#include "each.h"
#include "isa.h"

namespace moescope {
namespace {

constexpr int kRows = 6;               // 6 x 4 sums, 4 weights and a broadcast fill the registers
constexpr int kHeldRows = 3;           // rows for which they hold dots of integers and sums besides
constexpr int64_t kColumnBlock = 256;  // columns of a tile that stay in the first-level cache
constexpr int64_t kInt8Step = 16;      // columns
constexpr int64_t kPrefetch = 4096;    // bytes ahead
constexpr int kLowerHalves = 0x55555555;  // 16 bits of each 32
constexpr WeightFormat kInt8 = kWeightFormats[format_named("int8")];
constexpr WeightFormat kInt4 = kWeightFormats[format_named("int4")];

inline __m512i broadcast(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm512_set1_epi32(four);
}

// sums += weights * x, four products to a sum. As an intrinsic, GCC 12 copies every sum of a large
// tile through the stack.
MOESCOPE_INLINE inline void dot(__m512i& sums, __m512i weights, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(x));
}

MOESCOPE_INLINE inline __m512i bytes_at(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

struct Twice {
  alignas(64) uint8_t at[64] = {};
  constexpr Twice() {
    for (int i = 0; i < 16; ++i) {
      at[4 * i] = at[4 * i + 2] = static_cast<uint8_t>(i);
      at[4 * i + 1] = at[4 * i + 3] = 0x80;
    }
  }
};
constexpr Twice kTwice;

// Each byte in both halves of an integer.
MOESCOPE_INLINE inline __m512i bytes_twice_at(const uint8_t* from) {
  const __m512i all =
      _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return _mm512_shuffle_epi8(all, _mm512_load_si512(kTwice.at));
}

// Where M rows x P panels of sums start: as if no zero point had been stored with the weights.
template <int Zero, int M, int P>
MOESCOPE_INLINE inline void start(__m512i (&dots)[M][P], const Activations& a, const int64_t* row,
                                  int64_t g) {
  each<M>([&](auto m) MOESCOPE_INLINE {
    const __m512i offset = _mm512_set1_epi32(start_of_dots(Zero, a.sums[row[m] * a.groups + g]));
    each<P>([&](auto p) MOESCOPE_INLINE { dots[m][p] = offset; });
  });
}

// Multiplies 4 columns of M rows and P panels.
template <int M, int P>
MOESCOPE_INLINE inline void multiply_step(__m512i (&dots)[M][P], const __m512i (&panel)[P],
                                          const int8_t* const (&x)[M], int64_t k) {
  each<M>([&](auto m) MOESCOPE_INLINE {
    const __m512i four = broadcast(x[m] + k);
    each<P>([&](auto p) MOESCOPE_INLINE { dot(dots[m][p], panel[p], four); });
  });
}

// Where the bytes stand that are read `distance` after `weights`.
MOESCOPE_INLINE inline const uint8_t* ahead_of(const Tile& tile, const uint8_t* weights,
                                               int64_t distance) {
  const int64_t beyond = weights + distance - tile.end;
  return beyond < 0 ? weights + distance : tile.next + beyond;
}

// Fetches N lines of what is read about once a token. On AMD it should not push the rest out of the
// caches; on Intel, what passes them by must pass the first level's few line buffers, at half the
// speed. Zen 4 is slower for every instruction that asks.
template <int N = 1>
MOESCOPE_INLINE inline void prefetch(const void* from) {
  const char* lines = static_cast<const char*>(from);
  if (read_ahead == ReadAhead::past_caches)
    each<N>([&](auto n) MOESCOPE_INLINE { _mm_prefetch(lines + n * 64, _MM_HINT_NTA); });
  else if (read_ahead == ReadAhead::into_second_level)
    each<N>([&](auto n) MOESCOPE_INLINE { _mm_prefetch(lines + n * 64, _MM_HINT_T1); });
}

// Rows that pass over the weights once fetch each line ahead of where they read it.
struct EachLine {
  const uint8_t* ahead = nullptr;
  MOESCOPE_INLINE void begin(const Tile& tile, const uint8_t* weights) {
    ahead = ahead_of(tile, weights, kPrefetch);
  }
  MOESCOPE_INLINE void line(int64_t offset) const { prefetch(ahead + offset); }
  MOESCOPE_INLINE void step() {}
};

// Rows that pass over a block of weights again and again fetch `bytes` of the next one at each step.
struct Share {
  const uint8_t* from;
  int64_t bytes;
  MOESCOPE_INLINE void begin(const Tile&, const uint8_t*) {}
  MOESCOPE_INLINE void line(int64_t) const {}
  MOESCOPE_INLINE void step() {
    for (const uint8_t* const end = from + bytes; from < end; from += 64)
      _mm_prefetch(from, _MM_HINT_T1);
  }
};

// Even shares of a block of so many bytes, for `passes` of `steps` each: few lines can be on their way
// from memory at once, and what comes from the caches would wait behind them.
class Shares {
 public:
  Shares(const uint8_t* block, int64_t bytes, int64_t passes, int64_t steps)
      : share_{block, (bytes + passes * steps * 64 - 1) / (passes * steps * 64) * 64},
        end_(block + bytes),
        steps_(steps) {}
  Share take() {
    const Share taken{share_.from, share_.from < end_ ? share_.bytes : 0};
    share_.from += steps_ * share_.bytes;
    return taken;
  }

 private:
  Share share_;
  const uint8_t* end_;
  int64_t steps_;
};

// Sums of M rows x P panels: kept in registers where they suffice, else in `out`.
template <int M, int P>
struct Sums {
  static constexpr bool kHeld = M <= kHeldRows;
  float* out;
  __m512 held[kHeld ? M : 1][P];

  MOESCOPE_INLINE explicit Sums(float* to) : out(to) {
    if constexpr (kHeld)
      each<M>([&](auto m) MOESCOPE_INLINE {
        each<P>([&](auto p) MOESCOPE_INLINE { held[m][p] = _mm512_loadu_ps(at(m, p)); });
      });
  }
  MOESCOPE_INLINE void add(int m, int p, __m512 scale, __m512i dots) {
    add(m, p, scale, _mm512_cvtepi32_ps(dots));
  }
  MOESCOPE_INLINE void add(int m, int p, __m512 x, __m512 y) {
    if constexpr (kHeld)
      held[m][p] = _mm512_fmadd_ps(x, y, held[m][p]);
    else
      _mm512_storeu_ps(at(m, p), _mm512_fmadd_ps(x, y, _mm512_loadu_ps(at(m, p))));
  }
  MOESCOPE_INLINE void finish() {
    if constexpr (kHeld)
      each<M>([&](auto m) MOESCOPE_INLINE {
        each<P>([&](auto p) MOESCOPE_INLINE { _mm512_storeu_ps(at(m, p), held[m][p]); });
      });
  }

 private:
  MOESCOPE_INLINE float* at(int m, int p) const { return out + m * kTile + p * kPanel; }
};

// Adds M rows x P panels over the columns of groups [first, last) to `out`.
template <int M, int P, typename Fetch>
MOESCOPE_INLINE inline void add_int8(const Tile& tile, const Activations& a, const int64_t* row,
                                     int64_t first, int64_t last, Fetch fetch, float* out) {
  Sums<M, P> sums(out);
  for (int64_t g = first; g < last; ++g) {
    __m512i dots[M][P];
    start<kInt8.zero>(dots, a, row, g);
    const int64_t begin = g * a.group;
    const int64_t columns = a.columns - begin < a.group ? a.columns - begin : a.group;
    const uint8_t* w = tile.weights + begin * (P * kPanel);
    fetch.begin(tile, w);
    const int8_t* x[M];
    each<M>([&](auto m) MOESCOPE_INLINE { x[m] = a.values + row[m] * a.columns + begin; });
    for (int64_t k = 0; k < columns; k += kInt8Step, w += kInt8Step * P * kPanel) {
      fetch.step();
      each<kInt8Step / 4>([&](auto step) MOESCOPE_INLINE {
        __m512i panel[P];
        each<P>([&](auto p) MOESCOPE_INLINE {
          fetch.line((k + step * 4) * (P * kPanel) + p * 64);
          panel[p] = _mm512_loadu_si512(w + (step * P + p) * 64);
        });
        multiply_step(dots, panel, x, k + step * 4);
      });
    }
    each<M>([&](auto m) MOESCOPE_INLINE {
      const __m512 scale = _mm512_set1_ps(a.scales[row[m] * a.groups + g]);
      each<P>([&](auto p) MOESCOPE_INLINE { sums.add(m, p, scale, dots[m][p]); });
    });
  }
  sums.finish();
}

template <int P>
constexpr int64_t kInt4Bytes = P * panel_bytes(kInt4, kChunk);

// Adds M rows x P panels over all columns to `out`.
template <int M, int P>
MOESCOPE_INLINE inline void add_int4(const Tile& tile, const Activations& a, const int64_t* row,
                                     int64_t groups, float* out) {
  // High nibbles stay where they are and count sixteen times as much, in sums of their own, where
  // registers suffice for those.
  constexpr bool kApart = M == 1;
  const __m512i low = _mm512_set1_epi8(0x0f), high = _mm512_set1_epi8(static_cast<char>(0xf0));
  const int8_t* x[M];
  each<M>([&](auto m) MOESCOPE_INLINE { x[m] = a.values + row[m] * a.columns; });
  Sums<M, P> sums(out);
  for (int64_t g = 0; g < groups; ++g) {
    const uint8_t* chunk = tile.weights + g * kInt4Bytes<P>;
    const uint8_t* ahead = ahead_of(tile, chunk, kPrefetch);
    prefetch<(kInt4Bytes<P> + 63) / 64 - P * 4>(ahead + P * 256);
    __m512i dots[M][P], high_dots[M][P];
    each<M>([&](auto m) MOESCOPE_INLINE {
      each<P>([&](auto p)
                  MOESCOPE_INLINE { dots[m][p] = high_dots[m][p] = _mm512_setzero_si512(); });
    });
    for (int step = 0; step < 4; ++step) {
      prefetch<P>(ahead + step * P * 64);
      const uint8_t* nibbles = chunk + step * P * 64;
      __m512i panel[P];
      each<P>([&](auto p) MOESCOPE_INLINE {
        panel[p] = _mm512_and_si512(_mm512_loadu_si512(nibbles + p * 64), low);
      });
      multiply_step(dots, panel, x, g * kChunk + step * 4);
      each<P>([&](auto p) MOESCOPE_INLINE {
        const __m512i packed = _mm512_loadu_si512(nibbles + p * 64);
        panel[p] = kApart ? _mm512_and_si512(packed, high)
                          : _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
      });
      multiply_step(kApart ? high_dots : dots, panel, x, g * kChunk + step * 4 + 16);
    }
    each<P>([&](auto p) MOESCOPE_INLINE {
      const uint8_t* scales = chunk + P * 256 + p * kPanel;
      const __m512i scale = kApart ? bytes_twice_at(scales) : bytes_at(scales);
      const __m512i minimum = bytes_at(scales + P * kPanel);
      each<M>([&](auto m) MOESCOPE_INLINE {
        const int64_t group = row[m] * a.groups + g;
        // What both multiply fits 16 bits, so this is their product.
        const __m512i taken = _mm512_madd_epi16(
            minimum, _mm512_set1_epi32(start_of_dots(kInt4Minimum, a.sums[group])));
        __m512i total;
        if constexpr (kApart) {
          // 16 products of 4 and 8 bits fit 16 bits.
          const __m512i both = _mm512_mask_mov_epi16(_mm512_slli_epi32(high_dots[m][p], 12),
                                                     kLowerHalves, dots[m][p]);
          total = _mm512_dpwssd_epi32(taken, both, scale);
        } else {
          total = _mm512_add_epi32(taken, _mm512_mullo_epi32(scale, dots[m][p]));
        }
        sums.add(m, p, _mm512_set1_ps(a.scales[group]), total);
      });
    });
  }
  sums.finish();
}

// Of int4: a scale in the lower half, and in the upper what its minimum, which stands so many bytes behind
// it, leaves of it.
MOESCOPE_INLINE inline __m512i scale_and_rest(const uint8_t* scales, int64_t to_minimums) {
  const __m512i scale = bytes_at(scales);
  const __m512i rest = _mm512_sub_epi32(scale, bytes_at(scales + to_minimums));
  return _mm512_mask_mov_epi16(_mm512_slli_epi32(rest, 16), kLowerHalves, scale);
}

// A block of int4 as rows multiply it after the first, which unpack it.
template <int P>
struct Unpacked {
  alignas(64) uint8_t values[kColumnBlock * P * kPanel];  // [columns / 4][P][16 outputs][4 columns]
  // [chunks][P][16 outputs], see `scale_and_rest`.
  alignas(64) int32_t scales[kColumnBlock / kChunk * P * kPanel];
};

// Adds M rows x P panels over the groups of a block to `out`.
//
// Of q's dots with x, 8 sum(x) is taken at first: sum((q - 8) x) fits 16 bits, as does 8 sum(x), and
// sum((scale q - 8 minimum) x) = scale sum((q - 8) x) + (scale - minimum) 8 sum(x) is one `vpmaddwd`.
//
// The first pass and the second fetch half of each chunk's lines in the next block: shares for all
// passes would take an address more, for which GCC 12 loads weights anew for each row.
template <int kPass, int M, int P>
MOESCOPE_INLINE inline void add_block_of_int4(Unpacked<P>& unpacked, const Tile& tile,
                                              const Activations& a, const int64_t* row,
                                              int64_t first, int64_t last, float* out) {
  static_assert(kInt4Minimum == 8 && kChunk == 32);
  constexpr bool kUnpacks = kPass == 0;
  constexpr int kLines = (kInt4Bytes<P> + 63) / 64, kHalf = (kLines + 1) / 2;
  const __m512i low = _mm512_set1_epi8(0x0f);
  const int8_t* x[M];
  each<M>([&](auto m) MOESCOPE_INLINE { x[m] = a.values + row[m] * a.columns; });
  uint8_t* values = unpacked.values;
  int32_t* scales = unpacked.scales;
  Sums<M, P> sums(out);
  for (int64_t g = first; g < last; ++g, values += kChunk * P * kPanel, scales += P * kPanel) {
    const uint8_t* chunk = tile.weights + g * kInt4Bytes<P>;
    if constexpr (kPass < 2) {
      const uint8_t* ahead = ahead_of(tile, chunk, kColumnBlock / kChunk * kInt4Bytes<P>);
      each<kPass == 0 ? kHalf : kLines - kHalf>([&](auto line) MOESCOPE_INLINE {
        _mm_prefetch(ahead + (kPass * kHalf + line) * 64, _MM_HINT_T1);
      });
    }
    __m512i dots[M][P];
    start<kInt4Minimum>(dots, a, row, g);
    each<kChunk / 4>([&](auto step) MOESCOPE_INLINE {
      __m512i panel[P];
      each<P>([&](auto p) MOESCOPE_INLINE {
        uint8_t* const held = values + (step * P + p) * 64;
        if constexpr (kUnpacks) {
          const __m512i both = _mm512_loadu_si512(chunk + (step % 4 * P + p) * 64);
          panel[p] = _mm512_and_si512(step < 4 ? both : _mm512_srli_epi16(both, 4), low);
          _mm512_store_si512(held, panel[p]);
        } else {
          panel[p] = _mm512_load_si512(held);
        }
      });
      multiply_step(dots, panel, x, g * kChunk + step * 4);
    });
    if constexpr (kUnpacks)
      each<P>([&](auto p) MOESCOPE_INLINE {
        _mm512_store_si512(scales + p * kPanel,
                           scale_and_rest(chunk + P * 256 + p * kPanel, P * kPanel));
      });
    each<M>([&](auto m) MOESCOPE_INLINE {
      const int64_t group = row[m] * a.groups + g;
      const __m512 scale = _mm512_set1_ps(a.scales[group]);
      const __m512i sum = _mm512_set1_epi32(start_of_dots(-(kInt4Minimum << 16), a.sums[group]));
      each<P>([&](auto p) MOESCOPE_INLINE {
        const __m512i both = _mm512_mask_mov_epi16(sum, kLowerHalves, dots[m][p]);
        sums.add(m, p, scale, _mm512_madd_epi16(both, _mm512_load_si512(scales + p * kPanel)));
      });
    });
  }
  sums.finish();
}

// Adds M rows x P panels over columns [first, last) to `out`.
template <int M, int P, typename Fetch>
MOESCOPE_INLINE inline void add_bf16(const Tile& tile, const Activations& a, const int64_t* row,
                                     int64_t first, int64_t last, Fetch fetch, float* out) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  __m512 sums[M][P];
  const float* x[M];
  each<M>([&](auto m) MOESCOPE_INLINE {
    x[m] = a.numbers + row[m] * a.columns;
    each<P>([&](auto p)
                MOESCOPE_INLINE { sums[m][p] = _mm512_loadu_ps(out + m * kTile + p * kPanel); });
  });
  const uint8_t* w = tile.weights + first / 2 * (P * 64);
  for (int64_t k = first; k < last; k += 2, w += P * 64) {
    fetch.begin(tile, w);
    fetch.step();
    const auto add = [&](int64_t column, const __m512i(&panel)[P]) MOESCOPE_INLINE {
      each<M>([&](auto m) MOESCOPE_INLINE {
        const __m512 factor = _mm512_set1_ps(x[m][column]);
        each<P>([&](auto p) MOESCOPE_INLINE {
          sums[m][p] = _mm512_fmadd_ps(factor, _mm512_castsi512_ps(panel[p]), sums[m][p]);
        });
      });
    };
    __m512i panel[P];
    each<P>([&](auto p) MOESCOPE_INLINE {
      fetch.line(p * 64);
      panel[p] = _mm512_slli_epi32(_mm512_loadu_si512(w + p * 64), 16);
    });
    add(k, panel);
    each<P>([&](auto p) MOESCOPE_INLINE {
      panel[p] = _mm512_and_si512(_mm512_loadu_si512(w + p * 64), upper);
    });
    add(k + 1, panel);
  }
  each<M>([&](auto m) MOESCOPE_INLINE {
    each<P>([&](auto p)
                MOESCOPE_INLINE { _mm512_storeu_ps(out + m * kTile + p * kPanel, sums[m][p]); });
  });
}

struct InPlace {};

// What a block's first rows leave to those behind them.
template <int W, int P>
using Left = std::conditional_t<kWeightFormats[W].bits == 4, Unpacked<P>, InPlace>;

// Rows that pass over a block together, where others do too.
template <int W>
constexpr int kBlockRows = is_float(kWeightFormats[W]) ? kRows : kHeldRows;

// Steps of a pass over a block, at each of which it fetches its share.
template <int W>
constexpr int kSteps = kColumnBlock / (kWeightFormats[W].bits == 8 ? kInt8Step : 2);

template <int W, int kPass, int M, int P>
__attribute__((noinline)) void add(Left<W, P>& left, const Tile& tile, const Activations& a,
                                   const int64_t* row, int64_t first, int64_t last, Share share,
                                   float* out) {
  if constexpr (kWeightFormats[W].bits == 4)
    add_block_of_int4<kPass, M, P>(left, tile, a, row, first, last, out);
  else if constexpr (kWeightFormats[W].bits == 8)
    add_int8<M, P>(tile, a, row, first, last, share, out);
  else
    add_bf16<M, P>(tile, a, row, first, last, share, out);
}

template <int W, int kPass, int P>
void add_rows(int count, Left<W, P>& left, const Tile& tile, const Activations& a,
              const int64_t* row, int64_t first, int64_t last, Share share, float* out) {
  with_constant<1, 2, 3, 4, 5, 6>(count, [&](auto m) {
    if constexpr (m <= kBlockRows<W>)
      add<W, kPass, m, P>(left, tile, a, row, first, last, share, out);
  });
}

// Adds M rows x P panels over all columns to `out`.
template <int W, int M, int P>
__attribute__((noinline)) void add_all(const Tile& tile, const Activations& a, const int64_t* row,
                                       int64_t parts, float* out) {
  if constexpr (kWeightFormats[W].bits == 4)
    add_int4<M, P>(tile, a, row, parts, out);
  else if constexpr (kWeightFormats[W].bits == 8)
    add_int8<M, P>(tile, a, row, 0, parts, EachLine(), out);
  else
    add_bf16<M, P>(tile, a, row, 0, parts, EachLine(), out);
}

// Adds all rows over all parts, groups or bf16's columns, of which `block` at a time, of so many bytes
// each, stay in the first-level cache.
template <int W, int P>
void multiply_parts(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                    int64_t parts, int64_t block, int64_t part_bytes, float* out) {
  if (count == 0) return;
  memset(out, 0, count * kTile * sizeof(float));
  int64_t row[kRowBlock];
  for (int i = 0; i < count; ++i) row[i] = rows ? rows[i] : i;
  // Few rows pass once over all columns; many go block by block, so that each block of weights is
  // read from the first-level cache for all rows but the first, while the next one is fetched.
  if (count <= kRows)
    return with_constant<1, 2, 3, 4, 5, 6>(
        count, [&](auto m) { add_all<W, m, P>(tile, a, row, parts, out); });
  const int turns = (count + kBlockRows<W> - 1) / kBlockRows<W>, most = (count + turns - 1) / turns;
  Left<W, P> left;
  // In int4 the first and the second pass over a block differ from the others.
  constexpr int kSecond = kWeightFormats[W].bits == 4 ? 1 : 0, kOther = 2 * kSecond;
  const int64_t block_bytes = block * part_bytes;
  for (int64_t first = 0; first < parts; first += block) {
    const int64_t last = first + block < parts ? first + block : parts;
    Shares shares(ahead_of(tile, tile.weights + first * part_bytes, block_bytes), block_bytes,
                  turns, kSteps<W>);
    for (int turn = 0, start = 0; start < count; ++turn, start += most) {
      const auto pass = turn == 0   ? add_rows<W, 0, P>
                        : turn == 1 ? add_rows<W, kSecond, P>
                                    : add_rows<W, kOther, P>;
      pass(count - start < most ? count - start : most, left, tile, a, row + start, first, last,
           shares.take(), out + start * kTile);
    }
  }
}

// Multiplies outputs by their rows' scales.
template <int P>
void scale_rows(const Tile& tile, int count, float* out) {
  __m512 scale[P];
  for (int p = 0; p < P; ++p) scale[p] = _mm512_loadu_ps(tile.row_scales + p * kPanel);
  for (int r = 0; r < count; ++r)
    for (int p = 0; p < P; ++p) {
      float* to = out + r * kTile + p * kPanel;
      _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), scale[p]));
    }
}

template <int W, int P>
void multiply_panels(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                     float* out) {
  static constexpr WeightFormat f = kWeightFormats[W];
  constexpr int kGroup = is_float(f) ? 1 : f.group;
  multiply_parts<W, P>(tile, a, rows, count, is_float(f) ? a.columns : a.groups,
                       kColumnBlock / kGroup, P * panel_bytes(f, kGroup), out);
  if constexpr (has_row_scale(f)) scale_rows<P>(tile, count, out);
}

}  // namespace
}  // namespace moescope
