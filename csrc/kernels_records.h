// Products with weights that lie in records, on registers of 256 bits: for AVX2, AVX-VNNI and, where
// numbers in floating point are multiplied, AVX-512. A format needs nothing here but its line in
// weight_format.h. Included by the files of those sets, whose compiler flags make the difference.
#pragma once
#include <immintrin.h>
#include <string.h>

#include <utility>

#include "each.h"
#include "isa.h"

namespace moescope {
namespace {
namespace records {

constexpr int kRows = 4;      // whose sums the registers hold; as many are multiplied even of three
constexpr int kManyFrom = 8;  // rows for which what a record holds is first spread
constexpr int64_t kAheadOfRow = 4096;  // bytes

MOESCOPE_INLINE inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

MOESCOPE_INLINE inline __m128i load_half(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

MOESCOPE_INLINE inline __m256i broadcast(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
constexpr bool kVnni = true;
// As an intrinsic, GCC 12 copies every sum.
MOESCOPE_INLINE inline __m256i dot(__m256i sums, __m256i weights, __m256i x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(weights), "x"(x));
  return sums;
}
#else
constexpr bool kVnni = false;
#endif

// Whether values are multiplied as signed bytes: `maddubs` saturates for larger ones than 129, so
// their magnitudes are multiplied, with the signs moved across.
template <int F>
constexpr bool kSigned = !kVnni && largest_stored(kWeightFormats[F]) > 128;

// How many products of two columns 16 bits hold, as a power of two.
constexpr int sums_in_16_bits(int largest, int steps) {
  int count = 1;
  while (2 * count <= steps && 2 * count * largest * 2 * 127 <= 32767) count *= 2;
  return count;
}

// Four columns of 8 outputs, as bytes.
template <int F>
MOESCOPE_INLINE inline __m256i values_of(const uint8_t* chunk, int step, int half) {
  static constexpr WeightFormat f = kWeightFormats[F];
  if constexpr (f.bits == 8) {
    const __m256i stored = load(chunk + step * 64 + half * 32);
    return kSigned<F> ? _mm256_xor_si256(stored, _mm256_set1_epi8(-128)) : stored;
  } else {
    const __m256i both = load(chunk + step % 4 * 64 + half * 32);
    const __m256i shifted = step < 4 ? both : _mm256_srli_epi16(both, 4);
    const __m256i low = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
    if constexpr (f.values == Values::code) {
      const __m256i words = _mm256_broadcastsi128_si256(load_half(f.codebook));
      const __m256i table =
          kSigned<F> ? words : _mm256_add_epi8(words, _mm256_set1_epi8(static_cast<char>(f.zero)));
      return _mm256_shuffle_epi8(table, low);
    } else if constexpr (f.bits > 4) {
      constexpr int kUpper = f.bits - 4, kPerByte = 8 / kUpper;
      const __m256i upper = load(chunk + upper_at(half, kUpper) + step / kPerByte * 32);
      const int shift = 4 - step % kPerByte * kUpper;  // to the left
      const __m256i moved =
          shift >= 0 ? _mm256_slli_epi16(upper, shift) : _mm256_srli_epi16(upper, -shift);
      return _mm256_or_si256(low,
                             _mm256_and_si256(moved, _mm256_set1_epi8(((1 << kUpper) - 1) << 4)));
    } else {
      return low;
    }
  }
}

// Sums of the products of a group's columns with M rows, for so many times 8 outputs.
template <int F, int M, int Halves, int FirstStep>
MOESCOPE_INLINE inline void dot_group(const uint8_t* chunk, int first, const int8_t* const (&x)[M],
                                      __m256i (&total)[Halves][M]) {
  static constexpr WeightFormat f = kWeightFormats[F];
  static constexpr int kSteps = f.group / 4;
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
  each<Halves>([&](auto h) MOESCOPE_INLINE {
    each<M>([&](auto m) MOESCOPE_INLINE { total[h][m] = _mm256_setzero_si256(); });
  });
  each<kSteps>([&](auto s) MOESCOPE_INLINE {
    each<Halves>([&](auto h) MOESCOPE_INLINE {
      const __m256i weights = values_of<F>(chunk, FirstStep + s, first + h);
      each<M>([&](auto m) MOESCOPE_INLINE {
        total[h][m] = dot(total[h][m], weights, broadcast(x[m] + 4 * s));
      });
    });
  });
#else
  static constexpr int kAtOnce = kSigned<F> ? 1 : sums_in_16_bits(largest_stored(f), kSteps);
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i pairs[Halves][M];
  each<kSteps>([&](auto s) MOESCOPE_INLINE {
    each<Halves>([&](auto h) MOESCOPE_INLINE {
      const __m256i weights = values_of<F>(chunk, FirstStep + s, first + h);
      const __m256i sizes = kSigned<F> ? _mm256_abs_epi8(weights) : weights;
      each<M>([&](auto m) MOESCOPE_INLINE {
        const __m256i four = broadcast(x[m] + 4 * s);
        const __m256i products =
            _mm256_maddubs_epi16(sizes, kSigned<F> ? _mm256_sign_epi8(four, weights) : four);
        pairs[h][m] = s % kAtOnce == 0 ? products : _mm256_add_epi16(pairs[h][m], products);
        if (s % kAtOnce == kAtOnce - 1) {
          const __m256i wide = _mm256_madd_epi16(pairs[h][m], ones);
          total[h][m] = s < kAtOnce ? wide : _mm256_add_epi32(total[h][m], wide);
        }
      });
    });
  });
#endif
}

MOESCOPE_INLINE inline __m256 f16_at(const uint8_t* from) {
  return _mm256_cvtph_ps(load_half(from));
}

// Scales of 8 outputs, or minimums; `super` is what bytes are multiplied with.
template <int F>
MOESCOPE_INLINE inline __m256 scales_at(const uint8_t* from, int64_t index, __m256 super) {
  constexpr Scales kScales = kWeightFormats[F].scales;
  if constexpr (kScales == Scales::f16) {
    return f16_at(from + 2 * index);
  } else {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + index));
    if constexpr (kScales == Scales::f16_u8)
      return _mm256_mul_ps(super, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
    if constexpr (kScales == Scales::f16_i8)
      return _mm256_mul_ps(super, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
    // Exponents 0 and 1 make no normal numbers: those of `tiny`, which are the lesser of all others.
    const __m256i less = _mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(1));
    const __m256i tiny = _mm256_slli_epi32(_mm256_add_epi32(less, _mm256_set1_epi32(2)), 21);
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(less, 23), tiny));
  }
}

// What all of a record's scales, and its minimums, are multiplied with, for half of its outputs.
struct Supers {
  __m256 scale{}, minimum{};
};

template <int F>
MOESCOPE_INLINE inline Supers supers_of(const uint8_t* record, int64_t columns, int half) {
  static constexpr WeightFormat f = kWeightFormats[F];
  Supers supers;
  if constexpr (has_super_scale(f)) {
    const uint8_t* from = record + super_at(f, columns) + half * 16;
    supers.scale = f16_at(from);
    if constexpr (f.minimum)
      supers.minimum = _mm256_sub_ps(_mm256_setzero_ps(), f16_at(from + 2 * kPanel));
  }
  return supers;
}

// What a call of the loops below multiplies, and where its sums are added.
struct Part {
  const uint8_t* record;
  const uint8_t* ahead;  // what is fetched meanwhile, or null
  int64_t first_column, columns;
  int64_t row[kRows];
  float* out[kRows];
};

template <int F, int M>
MOESCOPE_INLINE inline void add_integers(const Part& at, const Activations& a) {
  static constexpr WeightFormat f = kWeightFormats[F];
  static constexpr int kGroupsOfChunk = kChunk / f.group;
  static constexpr int kHalves = M == 1 ? 2 : 1;  // whose sums the registers hold at once
  const uint8_t* scales = at.record + value_bytes(f, at.columns);
  const uint8_t* minimums = at.record + minimums_at(f, at.columns);
  const int64_t first_group = at.first_column / f.group;
  const int64_t ahead_of_chunk = panel_bytes(f, at.columns) / (at.columns / kChunk);
  for (int first = 0; first < 2; first += kHalves) {
    __m256 sums[kHalves][M];
    Supers supers[kHalves];
    each<kHalves>([&](auto h) MOESCOPE_INLINE {
      const int half = first + h;
      each<M>([&](auto m) MOESCOPE_INLINE { sums[h][m] = _mm256_loadu_ps(at.out[m] + half * 8); });
      supers[h] = supers_of<F>(at.record, at.columns, half);
    });
    for (int64_t chunk = 0; chunk < at.columns / kChunk; ++chunk) {
      if (at.ahead != nullptr && first == 0)
        for (int64_t line = 0; line < ahead_of_chunk; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(at.ahead + chunk * ahead_of_chunk + line),
                       M == 1 ? _MM_HINT_T0 : _MM_HINT_T1);
      each<kGroupsOfChunk>([&](auto part) MOESCOPE_INLINE {
        const int64_t g = chunk * kGroupsOfChunk + part;
        const int8_t* x[M];
        each<M>([&](auto m) MOESCOPE_INLINE {
          x[m] = a.values + at.row[m] * a.columns + at.first_column + g * f.group;
        });
        __m256i total[kHalves][M];
        dot_group<F, M, kHalves, part*(f.group / 4)>(at.record + chunk * chunk_bytes(f), first, x,
                                                     total);
        __m256 scale[kHalves], minimum[kHalves];
        each<kHalves>([&](auto h) MOESCOPE_INLINE {
          const int64_t index = g * kPanel + (first + h) * 8;
          scale[h] = scales_at<F>(scales, index, supers[h].scale);
          if constexpr (f.minimum) minimum[h] = scales_at<F>(minimums, index, supers[h].minimum);
        });
        each<M>([&](auto m) MOESCOPE_INLINE {
          const int64_t group = at.row[m] * a.groups + first_group + g;
          const __m256 size = _mm256_set1_ps(a.scales[group]);
          const __m256i sum = _mm256_set1_epi32(a.sums[group]);
          each<kHalves>([&](auto h) MOESCOPE_INLINE {
            if constexpr (f.zero != 0 && !kSigned<F>)
              total[h][m] =
                  _mm256_sub_epi32(total[h][m], _mm256_mullo_epi32(sum, _mm256_set1_epi32(f.zero)));
            sums[h][m] = _mm256_fmadd_ps(_mm256_mul_ps(scale[h], size),
                                         _mm256_cvtepi32_ps(total[h][m]), sums[h][m]);
            if constexpr (f.minimum)
              sums[h][m] = _mm256_fmadd_ps(minimum[h], _mm256_mul_ps(size, _mm256_cvtepi32_ps(sum)),
                                           sums[h][m]);
          });
        });
      });
    }
    each<kHalves>([&](auto h) MOESCOPE_INLINE {
      each<M>([&](auto m)
                  MOESCOPE_INLINE { _mm256_storeu_ps(at.out[m] + (first + h) * 8, sums[h][m]); });
    });
  }
}

// A column of 16 outputs; of those with a scale, a 256th, which `add_floats` makes good.
template <int F>
MOESCOPE_INLINE inline void read_floats(const uint8_t* from, __m256 (&weights)[2]) {
  constexpr Values kValues = kWeightFormats[F].values;
  if constexpr (kValues ==
                Values::e4m3) {  // the sign, and 7 bits that are an f16's but for its bias
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_half(from)), 7);
    const __m256i halves = _mm256_and_si256(wide, _mm256_set1_epi16(-0x4080));
    weights[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    weights[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  } else if constexpr (kValues == Values::f16) {
    weights[0] = f16_at(from), weights[1] = f16_at(from + 16);
  } else {
    weights[0] = _mm256_castsi256_ps(load(from)), weights[1] = _mm256_castsi256_ps(load(from + 32));
  }
}

template <int F, int M>
MOESCOPE_INLINE inline void add_floats(const Part& at, const Activations& a) {
  static constexpr bool kScaled = kWeightFormats[F].scales == Scales::f32;
  static constexpr int kWays = M == 1   ? 4
                               : M == 2 ? 2
                                        : 1;  // sums of a row, so that they need not wait
  static constexpr int kBytes = kWeightFormats[F].bits / 8;
  const int64_t group = kScaled ? kFloatGroup : at.columns;
  const uint8_t* scales = at.record + value_bytes(kWeightFormats[F], at.columns);
  const float* x[M];
  each<M>([&](auto m)
              MOESCOPE_INLINE { x[m] = a.numbers + at.row[m] * a.columns + at.first_column; });
  for (int64_t first = 0; first < at.columns; first += group, scales += kPanel * sizeof(float)) {
    const int64_t last = first + group < at.columns ? first + group : at.columns;
    __m256 sums[M][kWays][2];
    each<M>([&](auto m) MOESCOPE_INLINE {
      each<kWays>([&](auto way)
                      MOESCOPE_INLINE { sums[m][way][0] = sums[m][way][1] = _mm256_setzero_ps(); });
    });
    for (int64_t k = first; k < last; k += kWays)
      each<kWays>([&](auto way) MOESCOPE_INLINE {
        const int64_t offset = (k + way) * (kPanel * kBytes);
        if constexpr (way * kPanel * kBytes % 64 == 0 || M > 2)
          if (at.ahead != nullptr)
            _mm_prefetch(reinterpret_cast<const char*>(at.ahead + offset), _MM_HINT_T1);
        __m256 weights[2];
        read_floats<F>(at.record + offset, weights);
        each<M>([&](auto m) MOESCOPE_INLINE {
          const __m256 factor = _mm256_broadcast_ss(x[m] + k + way);
          each<2>([&](auto half) MOESCOPE_INLINE {
            sums[m][way][half] = _mm256_fmadd_ps(factor, weights[half], sums[m][way][half]);
          });
        });
      });
    each<2>([&](auto half) MOESCOPE_INLINE {
      __m256 scale = _mm256_set1_ps(1);
      if constexpr (kScaled)
        scale = _mm256_mul_ps(_mm256_set1_ps(256), _mm256_castsi256_ps(load(scales + half * 32)));
      each<M>([&](auto m) MOESCOPE_INLINE {
        __m256 sum = sums[m][0][half];
        each<kWays - 1>([&](auto way)
                            MOESCOPE_INLINE { sum = _mm256_add_ps(sum, sums[m][way + 1][half]); });
        float* to = at.out[m] + half * 8;
        _mm256_storeu_ps(to, _mm256_fmadd_ps(scale, sum, _mm256_loadu_ps(to)));
      });
    });
  }
}

template <int F, int M>
__attribute__((noinline)) void add(const Part& at, const Activations& a) {
  if constexpr (is_float(kWeightFormats[F]))
    add_floats<F, M>(at, a);
  else
    add_integers<F, M>(at, a);
}

template <int F>
void spread(const uint8_t* record, int64_t columns, uint8_t* plain) {
  for (int64_t chunk = 0; chunk < columns / kChunk; ++chunk)
    each<8>([&](auto step) MOESCOPE_INLINE {
      each<2>([&](auto half) MOESCOPE_INLINE {
        const __m256i values =
            values_of<F>(record + chunk * chunk_bytes(kWeightFormats[F]), step, half);
        uint8_t* to = plain + (chunk * 16 + step * 2 + half) * 32;
        _mm256_store_si256(reinterpret_cast<__m256i*>(to), values);
      });
    });
}

// Whether the first of so many rows fetch what comes next. Zen 4 gets ahead by itself where they leave it
// time; to unpack less than a byte leaves none.
template <int F>
MOESCOPE_INLINE inline bool fetches(int count) {
  return read_ahead != ReadAhead::by_itself || kWeightFormats[F].bits < 8 || count > 2;
}

// Goes record by record, so that each is read from the first-level cache by all rows but the first,
// which fetch what stands as many records on as there are panels meanwhile. A single row of integers
// goes on so soon that it fetches what stands nearer.
template <int F>
void multiply(const Tile& tile, const Activations& a, const int32_t* rows, int count, float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  memset(out, 0, count * kTile * sizeof(float));
  alignas(32) float unused[kPanel] = {};
  Part at{tile.weights, nullptr, 0, 0, {}, {}};
  for (; at.first_column < a.columns; at.first_column += kRecord) {
    const int64_t left = a.columns - at.first_column;
    at.columns = left < kRecord ? left : kRecord;
    const int64_t bytes = panel_bytes(f, at.columns);
    const int64_t ahead_by = count == 1 && !is_float(f) ? kAheadOfRow : bytes * tile.panels;
    for (int p = 0; p < tile.panels; ++p, at.record += bytes) {
      const uint8_t* ahead = at.record + ahead_by;
      if (ahead >= tile.end) ahead = tile.next + (ahead - tile.end);
      for (int start = 0; start < count; start += kRows) {
        const int held = count - start < kRows ? count - start : kRows;
        for (int m = 0; m < kRows; ++m) {
          const int r = m < held ? start + m : start;
          at.row[m] = rows ? rows[r] : r;
          at.out[m] = m < held ? out + r * kTile + p * kPanel : unused;
        }
        at.ahead = start == 0 && fetches<F>(count) ? ahead : nullptr;
        if (held == 1)
          add<F, 1>(at, a);
        else if (held == 2)
          add<F, 2>(at, a);
        else
          add<F, kRows>(at, a);
      }
    }
  }
}

}  // namespace records
}  // namespace
}  // namespace moescope
