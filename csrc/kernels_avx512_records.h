// Products of many rows with integers that lie in records, on registers of 512 bits with VNNI. What a
// record holds in less than a byte is spread to bytes, and its scales to floats, once for all rows.
// Every sum is bit by bit what kernels_records.h makes of few rows.
#pragma once
#include <immintrin.h>
#include <string.h>

#include "kernels_avx512_tiles.h"
#include "kernels_records.h"

namespace moescope {
namespace {
namespace records {

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

// Adds M rows x P panels over `columns` from `first_column` on to `out`, fetching from `ahead` on.
template <int F, int M, int P>
__attribute__((noinline)) void add_spread(const Spread<F, P>& weights, const Activations& a,
                                          const int64_t* row, int64_t first_column, int64_t columns,
                                          const uint8_t* ahead, float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  const int8_t* x[M];
  each<M>([&](auto m) MOESCOPE_INLINE { x[m] = a.values + row[m] * a.columns + first_column; });
  const uint8_t* values = weights.values;
  const int64_t lines = panel_bytes(f, columns) * P / 64 / (columns / f.group) + 1;
  Sums<M, P> sums(out);
  for (int64_t g = 0; g < columns / f.group; ++g, values += f.group * kPanel) {
    if (ahead != nullptr)
      for (int64_t line = g * lines; line < (g + 1) * lines; ++line)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + line * 64), _MM_HINT_T1);
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
  memset(out, 0, count * kTile * sizeof(float));
  int64_t row[kRowBlock];
  for (int i = 0; i < count; ++i) row[i] = rows ? rows[i] : i;
  Spread<F, P> weights;
  const uint8_t* record = tile.weights;
  for (int64_t first = 0; first < a.columns; first += kRecord) {
    const int64_t columns = a.columns - first < kRecord ? a.columns - first : kRecord;
    weights.set(record, columns);
    record += panel_bytes(kWeightFormats[F], columns) * P;
    for (int start = 0; start < count; start += kHeldRows) {
      const uint8_t* ahead = start > 0 ? nullptr : record < tile.end ? record : tile.next;
      with_constant<1, 2, 3>(count - start < kHeldRows ? count - start : kHeldRows, [&](auto m) {
        add_spread<F, m, P>(weights, a, row + start, first, columns, ahead, out + start * kTile);
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
