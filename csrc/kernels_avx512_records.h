// Products with integers that lie in records, on registers of 512 bits with VNNI. For many rows, what a
// record holds in less than a byte is spread to bytes, and its scales to floats, once for all. Every
// sum is bit by bit the same for few rows and many.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "kernels_avx512_tiles.h"
#include "kernels_records.h"

namespace moescope {
namespace {
namespace records {

// Four columns of 16 outputs, as bytes.
template <int F>
MOESCOPE_INLINE inline __m512i all_values_of(const uint8_t* chunk, int step) {
  static constexpr WeightFormat f = kWeightFormats[F];
  if constexpr (f.bits == 8) {
    return _mm512_loadu_si512(chunk + step * 64);
  } else {
    const __m512i both = _mm512_loadu_si512(chunk + step % 4 * 64);
    const __m512i low =
        _mm512_and_si512(step < 4 ? both : _mm512_srli_epi16(both, 4), _mm512_set1_epi8(15));
    if constexpr (f.values == Values::code) {
      const __m512i words = _mm512_broadcast_i32x4(load_half(f.codebook));
      return _mm512_shuffle_epi8(
          _mm512_add_epi8(words, _mm512_set1_epi8(static_cast<char>(f.zero))), low);
    } else if constexpr (f.bits > 4) {
      constexpr int kUpper = f.bits - 4, kPerByte = 8 / kUpper;
      const uint8_t* from = chunk + step / kPerByte * 32;
      const __m512i upper =
          _mm512_inserti64x4(_mm512_castsi256_si512(load(from + upper_at(0, kUpper))),
                             load(from + upper_at(1, kUpper)), 1);
      const int shift = 4 - step % kPerByte * kUpper;  // to the left
      const __m512i moved =
          shift >= 0 ? _mm512_slli_epi16(upper, shift) : _mm512_srli_epi16(upper, -shift);
      constexpr int kOrAnd = 0xf8;  // a | (b & c)
      return _mm512_ternarylogic_epi32(low, moved, _mm512_set1_epi8(((1 << kUpper) - 1) << 4),
                                       kOrAnd);
    } else {
      return low;
    }
  }
}

// sums += weights * the four numbers at x, which all outputs share.
MOESCOPE_INLINE inline void dot_with_four(__m512i& sums, __m512i weights, const int8_t* x) {
  using Four = int8_t[4];
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sums)
      : "v"(weights), "m"(*reinterpret_cast<const Four*>(x)));
}

// Scales of 16 outputs, or minimums.
template <int F>
MOESCOPE_INLINE inline __m512 all_scales_at(const uint8_t* from, int64_t index, __m512 super) {
  constexpr Scales kScales = kWeightFormats[F].scales;
  if constexpr (kScales == Scales::f16) {
    return _mm512_cvtph_ps(load(from + 2 * index));
  } else if constexpr (kScales == Scales::f16_u8) {
    return _mm512_mul_ps(super, _mm512_cvtepi32_ps(bytes_at(from + index)));
  } else if constexpr (kScales == Scales::f16_i8) {
    return _mm512_mul_ps(super, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_half(from + index))));
  } else {
    const __m256 unused{};
    return _mm512_insertf32x8(_mm512_castps256_ps512(scales_at<F>(from, index, unused)),
                              scales_at<F>(from, index + 8, unused), 1);
  }
}

// As `Supers`, for all outputs.
struct AllSupers {
  __m512 scale{}, minimum{};
};

template <int F>
MOESCOPE_INLINE inline AllSupers all_supers_of(const uint8_t* record, int64_t columns) {
  static constexpr WeightFormat f = kWeightFormats[F];
  AllSupers supers;
  if constexpr (has_super_scale(f)) {
    const uint8_t* from = record + super_at(f, columns);
    supers.scale = _mm512_cvtph_ps(load(from));
    if constexpr (f.minimum)
      supers.minimum = _mm512_sub_ps(_mm512_setzero_ps(), _mm512_cvtph_ps(load(from + 2 * kPanel)));
  }
  return supers;
}

// What a call of the loop below multiplies.
struct Few {
  const uint8_t *record, *ahead;  // what is fetched meanwhile, or null
  int64_t first_column, columns;
  const int64_t* row;
  float* out;  // a row's outputs stand `kTile` apart
};

// Adds M rows x 16 outputs over a record.
template <int F, int M>
__attribute__((noinline)) void add_few(const Few& at, const Activations& a) {
  static constexpr WeightFormat f = kWeightFormats[F];
  static constexpr int kGroupsOfChunk = kChunk / f.group;
  const uint8_t* chunk = at.record;
  const uint8_t* scales = at.record + value_bytes(f, at.columns);
  const uint8_t* minimums = at.record + minimums_at(f, at.columns);
  const AllSupers supers = all_supers_of<F>(at.record, at.columns);
  __m512 sums[M];
  each<M>([&](auto m) MOESCOPE_INLINE { sums[m] = _mm512_loadu_ps(at.out + m * kTile); });
  const int64_t first_group = at.first_column / f.group, groups = at.columns / f.group;
  const int64_t ahead_of_chunk = panel_bytes(f, at.columns) / (at.columns / kChunk);
  for (int64_t first = 0; first < groups; first += kGroupsOfChunk, chunk += chunk_bytes(f)) {
    const uint8_t* ahead = at.ahead + first / kGroupsOfChunk * ahead_of_chunk;
    for (int64_t line = 0; at.ahead != nullptr && line < ahead_of_chunk; line += 64)
      _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T1);
    each<kGroupsOfChunk>([&](auto part) MOESCOPE_INLINE {
      const int64_t g = first + part;
      const int8_t* x[M];
      __m512i dots[M];
      each<M>([&](auto m) MOESCOPE_INLINE {
        x[m] = a.values + at.row[m] * a.columns + at.first_column + g * f.group;
        dots[m] = _mm512_set1_epi32(
            start_of_dots(f.zero, a.sums[at.row[m] * a.groups + first_group + g]));
      });
      each<f.group / 4>([&](auto step) MOESCOPE_INLINE {
        const __m512i weights = all_values_of<F>(chunk, part * (f.group / 4) + step);
        each<M>([&](auto m) MOESCOPE_INLINE { dot_with_four(dots[m], weights, x[m] + 4 * step); });
      });
      const __m512 scale = all_scales_at<F>(scales, g * kPanel, supers.scale);
      __m512 minimum{};
      if constexpr (f.minimum) minimum = all_scales_at<F>(minimums, g * kPanel, supers.minimum);
      each<M>([&](auto m) MOESCOPE_INLINE {
        const int64_t group = at.row[m] * a.groups + first_group + g;
        const float size = a.scales[group];
        sums[m] = _mm512_fmadd_ps(_mm512_mul_ps(scale, _mm512_set1_ps(size)),
                                  _mm512_cvtepi32_ps(dots[m]), sums[m]);
        if constexpr (f.minimum)
          sums[m] = _mm512_fmadd_ps(
              minimum, _mm512_set1_ps(size * static_cast<float>(a.sums[group])), sums[m]);
      });
    });
  }
  each<M>([&](auto m) MOESCOPE_INLINE { _mm512_storeu_ps(at.out + m * kTile, sums[m]); });
}

// Goes record by record, so that each is read from the first-level cache by all rows but the first.
template <int F>
void multiply_few(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                  float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  constexpr int kAtOnce = 4;
  memset(out, 0, count * kTile * sizeof(float));
  int64_t row[kManyFrom];
  for (int i = 0; i < count; ++i) row[i] = rows ? rows[i] : i;
  const uint8_t* record = tile.weights;
  for (int64_t first = 0; first < a.columns; first += kRecord) {
    const int64_t columns = a.columns - first < kRecord ? a.columns - first : kRecord;
    const int64_t bytes = panel_bytes(f, columns);
    const uint8_t* ahead = record + bytes * tile.panels;
    if (ahead >= tile.end) ahead = tile.next;
    for (int p = 0; p < tile.panels; ++p, record += bytes)
      for (int start = 0; start < count; start += kAtOnce) {
        const Few at{record,      start == 0 && fetches<F>(count) ? ahead + p * bytes : nullptr,
                     first,       columns,
                     row + start, out + start * kTile + p * kPanel};
        with_constant<1, 2, 3, 4>(count - start < kAtOnce ? count - start : kAtOnce,
                                  [&](auto m) { add_few<F, m>(at, a); });
      }
  }
}

// The records of a tile for the same columns, as they are multiplied.
template <int F, int P>
struct Spread {
  static constexpr WeightFormat f = kWeightFormats[F];
  static constexpr bool kIsSpread = f.bits < 8;

  alignas(64) uint8_t spread[kIsSpread ? P * kRecord * kPanel : 1];  // [P][columns / 4][16][4]
  alignas(64) float scales[kRecord / f.group][P][kPanel];
  alignas(64) float minimums[f.minimum ? kRecord / f.group : 1][P][kPanel];
  const uint8_t* values;  // of the first panel
  int64_t stride;         // from panel to panel

  void set(const uint8_t* record, int64_t columns) {
    const int64_t bytes = panel_bytes(f, columns);
    values = kIsSpread ? spread : record;
    stride = kIsSpread ? kRecord * kPanel : bytes;
    for (int p = 0; p < P; ++p, record += bytes) {
      if constexpr (kIsSpread) records::spread<F>(record, columns, spread + p * stride);
      each<2>([&](auto half) MOESCOPE_INLINE {
        const Supers supers = supers_of<F>(record, columns, half);
        for (int64_t g = 0; g < columns / f.group; ++g) {
          const int64_t index = g * kPanel + half * 8;
          _mm256_store_ps(scales[g][p] + half * 8,
                          scales_at<F>(record + value_bytes(f, columns), index, supers.scale));
          if constexpr (f.minimum)
            _mm256_store_ps(minimums[g][p] + half * 8,
                            scales_at<F>(record + minimums_at(f, columns), index, supers.minimum));
        }
      });
    }
  }
};

// Adds M rows x P panels over `columns` from `first_column` on to `out`. Numbers that are spread before
// they are multiplied have to be there by then: all that stands `ahead` is fetched, unless that is null;
// others are fetched as a share.
template <int F, int M, int P, typename Ahead>
__attribute__((noinline)) void add_spread(const Spread<F, P>& weights, const Activations& a,
                                          const int64_t* row, int64_t first_column, int64_t columns,
                                          Ahead ahead, float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  const int8_t* x[M];
  each<M>([&](auto m) MOESCOPE_INLINE { x[m] = a.values + row[m] * a.columns + first_column; });
  const uint8_t* values = weights.values;
  [[maybe_unused]] const int64_t lines = panel_bytes(f, columns) * P / 64 / (columns / f.group) + 1;
  Sums<M, P> sums(out);
  for (int64_t g = 0; g < columns / f.group; ++g, values += f.group * kPanel) {
    if constexpr (!Spread<F, P>::kIsSpread) {
      ahead.step();
    } else if (ahead != nullptr) {
      for (int64_t line = g * lines; line < (g + 1) * lines; ++line)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + line * 64), _MM_HINT_T1);
    }
    __m512i dots[M][P];
    start<f.zero>(dots, a, row, first_column / f.group + g);
    each<f.group / 4>([&](auto step) MOESCOPE_INLINE {
      __m512i panel[P];
      each<P>([&](auto p) MOESCOPE_INLINE {
        panel[p] = _mm512_loadu_si512(values + p * weights.stride + step * 64);
      });
      multiply_step(dots, panel, x, g * f.group + step * 4);
    });
    each<M>([&](auto m) MOESCOPE_INLINE {
      const int64_t group = row[m] * a.groups + first_column / f.group + g;
      const __m512 size = _mm512_set1_ps(a.scales[group]);
      each<P>([&](auto p) MOESCOPE_INLINE {
        sums.add(m, p, _mm512_mul_ps(_mm512_load_ps(weights.scales[g][p]), size), dots[m][p]);
        if constexpr (f.minimum)
          sums.add(m, p, _mm512_load_ps(weights.minimums[g][p]),
                   _mm512_set1_ps(a.scales[group] * static_cast<float>(a.sums[group])));
      });
    });
  }
  sums.finish();
}

template <int F, int P>
void multiply_many_panels(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                          float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  const int64_t passes = (count + kHeldRows - 1) / kHeldRows;
  memset(out, 0, count * kTile * sizeof(float));
  int64_t row[kRowBlock];
  for (int i = 0; i < count; ++i) row[i] = rows ? rows[i] : i;
  Spread<F, P> weights;
  const uint8_t* record = tile.weights;
  for (int64_t first = 0; first < a.columns; first += kRecord) {
    const int64_t columns = a.columns - first < kRecord ? a.columns - first : kRecord;
    weights.set(record, columns);
    const int64_t bytes = panel_bytes(f, columns) * P;
    record += bytes;
    const uint8_t* const next = record < tile.end ? record : tile.next;
    Shares shares(next, bytes, passes, columns / f.group);
    for (int start = 0; start < count; start += kHeldRows) {
      const auto add = [&](auto m, auto ahead) {
        add_spread<F, m, P>(weights, a, row + start, first, columns, ahead, out + start * kTile);
      };
      with_constant<1, 2, 3>(count - start < kHeldRows ? count - start : kHeldRows, [&](auto m) {
        if constexpr (Spread<F, P>::kIsSpread)
          add(m, start == 0 ? next : nullptr);
        else
          add(m, shares.take());
      });
    }
  }
}

template <int F>
void multiply_many(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                   float* out) {
  with_constant<1, 2, 3, 4>(tile.panels, [&](auto panels) {
    multiply_many_panels<F, panels>(tile, a, rows, count, out);
  });
}

}  // namespace records
}  // namespace
}  // namespace moescope
