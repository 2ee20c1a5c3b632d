// Products of many rows with weights in integers, on registers of 256 bits, with or without VNNI. What up
// to 256 columns of a panel hold is first spread for all rows: values to bytes, or to 16 bits where
// two products of bytes may not fit those, and scales to floats.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "each.h"
#include "isa.h"
#include "kernels_avx2_tiles.h"
#include "kernels_records.h"

namespace moescope {
namespace {
namespace blocks {

constexpr int kRows = 6;  // whose sums of 16 outputs the registers hold

// Whether values become 16 bits: two multiplications then do what takes three with their signs apart.
template <int F>
constexpr bool kWide = records::kSigned<F>;

// Rows for which a block is spread, as measured without VNNI: what few rows cost otherwise differs.
template <int F>
constexpr int kFrom =
    kWeightFormats[F].order == Order::tile ? (kWide<F> ? 12 : 5) : (kWide<F> ? 8 : 4);

template <int F>
struct Block {
  // [columns / 4][16 outputs][4 columns], or of 16 bits [columns / 4][2][16 outputs][2 columns], of
  // which the first two are the even ones
  alignas(32) uint8_t values[kRecord * kPanel * (kWide<F> ? 2 : 1)];
  alignas(32) float scales[kRecord / kWeightFormats[F].group * kPanel];  // [groups][16 outputs]
  alignas(32) float minimums[kRecord / kWeightFormats[F].group * kPanel];
};

// Rows of up to 256 columns, as bytes, or as 16 bits: eight times two even columns, eight times the
// two odd ones of the same four, and so on.
template <int F>
struct Rows {
  using Value = std::conditional_t<kWide<F>, int16_t, int8_t>;
  const Value* values[kRowBlock];
  const float* scales[kRowBlock];  // one a group
  const int32_t* sums[kRowBlock];  // one a group
  alignas(32) Value wide[kWide<F> ? kRowBlock * kRecord : 1];
  // what the minimums are multiplied with, one a group
  float offsets[kWeightFormats[F].minimum ? kRowBlock : 1][kRecord / kWeightFormats[F].group];
};

inline __m256i even_bytes(__m256i bytes) {
  return _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8);
}
inline __m256i odd_bytes(__m256i bytes) { return _mm256_srai_epi16(bytes, 8); }

MOESCOPE_INLINE inline void store(void* to, __m256i v) {
  _mm256_store_si256(static_cast<__m256i*>(to), v);
}

template <int F>
void take(Rows<F>& held, const Activations& a, const int32_t* rows, int count, int64_t first_column,
          int64_t columns) {
  for (int r = 0; r < count; ++r) {
    const int64_t row = rows ? rows[r] : r;
    const int8_t* from = a.values + row * a.columns + first_column;
    held.scales[r] = a.scales + row * a.groups + first_column / a.group;
    held.sums[r] = a.sums + row * a.groups + first_column / a.group;
    if constexpr (kWeightFormats[F].minimum)
      for (int64_t g = 0; g < columns / a.group; ++g)
        held.offsets[r][g] = held.scales[r][g] * static_cast<float>(held.sums[r][g]);
    if constexpr (kWide<F>) {
      int16_t* to = held.wide + r * kRecord;
      held.values[r] = to;
      for (int64_t k = 0; k < columns; k += kChunk) {
        const __m256i bytes = load(from + k);
        store(to + k, even_bytes(bytes));
        store(to + k + 16, odd_bytes(bytes));
      }
    } else {
      held.values[r] = from;
    }
  }
}

// Weights of panel `p` from a chunk of 32 columns on, four columns of 8 outputs.
template <int F>
MOESCOPE_INLINE inline __m256i values_of(const uint8_t* chunk, int panels, int p, int step,
                                         int half) {
  constexpr WeightFormat f = kWeightFormats[F];
  if constexpr (f.order == Order::record) {
    return records::values_of<F>(chunk, step, half);
  } else {
    const int64_t place = f.bits == 4 ? step % 4 : step;
    const __m256i stored = load(chunk + (place * panels + p) * 64 + half * 32);
    if constexpr (f.bits == 4)
      return _mm256_and_si256(step < 4 ? stored : _mm256_srli_epi16(stored, 4),
                              _mm256_set1_epi8(15));
    return kWide<F> ? _mm256_xor_si256(stored, _mm256_set1_epi8(-128)) : stored;
  }
}

// `from` is where the columns of the block begin, of all panels for Order::tile, else of panel `p`.
template <int F>
void spread(const uint8_t* from, int panels, int p, int64_t columns, Block<F>& block) {
  static constexpr WeightFormat f = kWeightFormats[F];
  const int64_t bytes_of_chunk =
      f.order == Order::tile ? panels * panel_bytes(f, kChunk) : chunk_bytes(f);
  for (int64_t c = 0; c < columns / kChunk; ++c) {
    const uint8_t* chunk = from + c * bytes_of_chunk;
    uint8_t* to = block.values + c * (kChunk * kPanel * (kWide<F> ? 2 : 1));
    each<8>([&](auto step) MOESCOPE_INLINE {
      each<2>([&](auto half) MOESCOPE_INLINE {
        const __m256i values = values_of<F>(chunk, panels, p, step, half);
        if constexpr (kWide<F>) {
          store(to + step * 128 + half * 32, even_bytes(values));
          store(to + step * 128 + 64 + half * 32, odd_bytes(values));
        } else {
          store(to + step * 64 + half * 32, values);
        }
      });
    });
    if constexpr (f.scales == Scales::row_u8) {
      const uint8_t* scales = chunk + panels * value_bytes(f, kChunk) + p * kPanel;
      each<2>([&](auto half) MOESCOPE_INLINE {
        const __m256 minimum = bytes_at(scales + panels * kPanel + half * 8);
        _mm256_store_ps(block.scales + c * kPanel + half * 8, bytes_at(scales + half * 8));
        _mm256_store_ps(block.minimums + c * kPanel + half * 8,
                        _mm256_mul_ps(minimum, _mm256_set1_ps(-kInt4Minimum)));
      });
    }
  }
  if constexpr (f.order == Order::record)
    each<2>([&](auto half) MOESCOPE_INLINE {
      const records::Supers supers = records::supers_of<F>(from, columns, half);
      for (int64_t g = 0; g < columns / f.group; ++g) {
        const int64_t at = g * kPanel + half * 8;
        _mm256_store_ps(block.scales + at,
                        records::scales_at<F>(from + value_bytes(f, columns), at, supers.scale));
        if constexpr (f.minimum)
          _mm256_store_ps(block.minimums + at, records::scales_at<F>(from + minimums_at(f, columns),
                                                                     at, supers.minimum));
      }
    });
}

// As an intrinsic, GCC 12 adds products to each other first, for which registers do not suffice.
MOESCOPE_INLINE inline void add_32(__m256i& sums, __m256i products) {
  asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
}
MOESCOPE_INLINE inline void add_16(__m256i& sums, __m256i products) {
  asm("vpaddw %1, %0, %0" : "+x"(sums) : "x"(products));
}

// Sums of the products of a group's columns with M rows, for 16 outputs.
template <int F, int M>
MOESCOPE_INLINE inline void dot_group(const Block<F>& block, const Rows<F>& rows, int first,
                                      int64_t g, int64_t columns, __m256i (&total)[M][2]) {
  static constexpr WeightFormat f = kWeightFormats[F];
  constexpr int kSteps = f.group / 4;
  const int64_t begin = g * kSteps;
  const int64_t end =
      f.group <= kChunk || begin + kSteps < columns / 4 ? begin + kSteps : columns / 4;
  each<M>([&](auto m) MOESCOPE_INLINE {
    total[m][0] = total[m][1] = _mm256_setzero_si256();
    if constexpr (f.zero != 0 && !kWide<F>)
      total[m][0] = total[m][1] = _mm256_set1_epi32(start_of_dots(f.zero, rows.sums[first + m][g]));
  });
  if constexpr (kWide<F>) {
    for (int64_t step = begin; step < end; ++step)
      each<2>([&](auto odd) MOESCOPE_INLINE {
        const uint8_t* values = block.values + step * 128 + odd * 64;
        const __m256i left = load(values), right = load(values + 32);
        each<M>([&](auto m) MOESCOPE_INLINE {
          const int16_t* from =
              rows.values[first + m] + step / 8 * kChunk + step % 8 * 2 + odd * 16;
          const __m256i x = broadcast(reinterpret_cast<const int8_t*>(from));
          add_32(total[m][0], _mm256_madd_epi16(left, x));
          add_32(total[m][1], _mm256_madd_epi16(right, x));
        });
      });
  } else {
#ifdef __AVXVNNI__
    for (int64_t step = begin; step < end; ++step) {
      const uint8_t* values = block.values + step * 64;
      const __m256i left = load(values), right = load(values + 32);
      each<M>([&](auto m) MOESCOPE_INLINE {
        const __m256i x = broadcast(rows.values[first + m] + step * 4);
        total[m][0] = dot_int8(total[m][0], left, x);
        total[m][1] = dot_int8(total[m][1], right, x);
      });
    }
#else
    constexpr int kAtOnce = records::sums_in_16_bits(largest_stored(f), kSteps);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int64_t step = begin; step < end; step += kAtOnce) {
      __m256i pairs[M][2];
      each<kAtOnce>([&](auto s) MOESCOPE_INLINE {
        const uint8_t* values = block.values + (step + s) * 64;
        const __m256i left = load(values), right = load(values + 32);
        each<M>([&](auto m) MOESCOPE_INLINE {
          const __m256i x = broadcast(rows.values[first + m] + (step + s) * 4);
          const __m256i products[2] = {_mm256_maddubs_epi16(left, x),
                                       _mm256_maddubs_epi16(right, x)};
          each<2>([&](auto half) MOESCOPE_INLINE {
            if constexpr (s == 0)
              pairs[m][half] = products[half];
            else
              add_16(pairs[m][half], products[half]);
          });
        });
      });
      each<M>([&](auto m) MOESCOPE_INLINE {
        each<2>([&](auto half) MOESCOPE_INLINE {
          total[m][half] =
              _mm256_add_epi32(total[m][half], _mm256_madd_epi16(pairs[m][half], ones));
        });
      });
    }
#endif
  }
}

// Adds M rows from `first` on, a line of 16 outputs each, kTile floats apart.
template <int F, int M>
__attribute__((noinline)) void add(const Block<F>& block, const Rows<F>& rows, int first,
                                   int64_t columns, const uint8_t* ahead, int64_t ahead_of_group,
                                   float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  static constexpr bool kScaled = f.scales != Scales::row;
  const int64_t groups = (columns + f.group - 1) / f.group;
  for (int64_t g = 0; g < groups; ++g) {
    if (ahead != nullptr)
      for (int64_t line = 0; line < ahead_of_group; line += 64)
        prefetch(ahead + g * ahead_of_group + line);
    __m256i total[M][2];
    dot_group<F, M>(block, rows, first, g, columns, total);
    each<M>([&](auto m) MOESCOPE_INLINE {
      const __m256 size = _mm256_set1_ps(rows.scales[first + m][g]);
      each<2>([&](auto half) MOESCOPE_INLINE {
        float* to = out + m * kTile + half * 8;
        const int64_t at = g * kPanel + half * 8;
        const __m256 scale =
            kScaled ? _mm256_mul_ps(_mm256_load_ps(block.scales + at), size) : size;
        __m256 sums =
            _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(total[m][half]), _mm256_loadu_ps(to));
        if constexpr (f.minimum)
          sums = _mm256_fmadd_ps(_mm256_load_ps(block.minimums + at),
                                 _mm256_set1_ps(rows.offsets[first + m][g]), sums);
        _mm256_storeu_ps(to, sums);
      });
    });
  }
}

// The first rows fetch what comes after a block meanwhile.
template <int F>
void multiply(const Tile& tile, const Activations& a, const int32_t* rows, int count, float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  memset(out, 0, count * kTile * sizeof(float));
  Rows<F> held;
  Block<F> block;
  const uint8_t* from = tile.weights;
  const int parts = (count + kRows - 1) / kRows;  // of 3 rows at least
  for (int64_t column = 0; column < a.columns; column += kRecord) {
    const int64_t left = a.columns - column, columns = left < kRecord ? left : kRecord;
    const int64_t bytes = panel_bytes(f, columns);
    const uint8_t* ahead = from + tile.panels * bytes;
    if (ahead >= tile.end) ahead = tile.next;
    take<F>(held, a, rows, count, column, columns);
    for (int p = 0; p < tile.panels; ++p) {
      spread<F>(f.order == Order::tile ? from : from + p * bytes, tile.panels, p, columns, block);
      const uint8_t* fetched = ahead + p * bytes;
      for (int part = 0, r = 0; part < parts; ++part, fetched = nullptr) {
        const int last = count * (part + 1) / parts;
        with_constant<3, 4, 5, 6>(last - r, [&](auto m) {
          add<F, m>(block, held, r, columns, fetched, bytes * f.group / columns,
                    out + r * kTile + p * kPanel);
        });
        r = last;
      }
    }
    from += tile.panels * bytes;
  }
}

}  // namespace blocks
}  // namespace
}  // namespace moescope
