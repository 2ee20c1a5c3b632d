// AMX: products of many rows with weights that are integers, 16 rows and 16 outputs over a group of
// columns at a time. Their sums are AVX-512's to the last bit.
#include <immintrin.h>
#include <string.h>

#include "amx.h"
#include "each.h"
#include "isa.h"
#include "kernels_avx512_records.h"
#include "kernels_avx512_tiles.h"

namespace moescope {
namespace {

constexpr int kFewestRows = 12;    // fewer are AVX-512's as quickly
constexpr int64_t kColumns = 256;  // of weights and rows that stay in the first-level cache
constexpr int kMostGroups = 16;    // of so many columns
constexpr int kHeldGroups = 4;     // whose rows the tiles hold
constexpr int kInt8Format = format_named("int8"), kInt4Format = format_named("int4");

// Tiles 0 and 1 hold dots; 2 and 3 weights, four columns of 16 outputs to a row; 4 to 7 rows over a
// group of columns.
TileShapes shapes_for(int group) {
  TileShapes shapes;
  for (int tile : {0, 1}) shapes.set(tile, kTileRows, 64);
  for (int tile : {2, 3}) shapes.set(tile, group / 4, 64);
  for (int held = 0; held < kHeldGroups; ++held) shapes.set(4 + held, kTileRows, group);
  return shapes;
}

// Rows of activations over the columns of a block. Groups that are not there weigh nothing.
template <int F>
struct RowBlock {
  static constexpr WeightFormat f = kWeightFormats[F];

  alignas(64) int8_t values[kTileRows][kColumns];
  alignas(64) float scales[kTileRows][kMostGroups];
  // What a group's minimum is multiplied with: a number, or in int4 eight sums in the upper half.
  alignas(64) int32_t sums[kTileRows][kMostGroups];

  MOESCOPE_INLINE void take(int r, const Activations& a, int64_t row, int64_t first,
                            int64_t groups) {
    const __mmask16 mask = static_cast<__mmask16>((1 << groups) - 1);
    const int8_t* from = a.values + row * a.columns + first * f.group;
    if (groups * f.group == kColumns)
      memcpy(values[r], from, kColumns);
    else
      memcpy(values[r], from, groups * f.group);
    const int64_t group = row * a.groups + first;
    const __m512 scale = _mm512_maskz_loadu_ps(mask, a.scales + group);
    _mm512_store_ps(scales[r], scale);
    if constexpr (f.minimum) {
      const __m512i sum = _mm512_maskz_loadu_epi32(mask, a.sums + group);
      _mm512_store_si512(sums[r], F == kInt4Format ? _mm512_slli_epi32(sum, 16 + 3)
                                                   : _mm512_castps_si512(_mm512_mul_ps(
                                                         scale, _mm512_cvtepi32_ps(sum))));
    }
  }
};

// Rows that are taken one after the other, while those before them are multiplied.
template <int F>
struct RowsToTake {
  RowBlock<F>& to;
  const Activations& a;
  const int64_t* row;
  int count;
  int64_t first, groups;
  int taken = 0;

  MOESCOPE_INLINE void step() {
    if (taken == count) return;
    to.take(taken, a, row[taken], first, groups);
    ++taken;
  }
  void finish() {
    while (taken < count) step();
  }
};

// The weights of a block without their zero, and what their groups' dots are multiplied with.
template <int F>
struct Block {
  static constexpr WeightFormat f = kWeightFormats[F];
  static constexpr bool kScaled = !has_row_scale(f);
  static constexpr int kSteps = f.group / 4;

  alignas(64) int8_t values[kPanels][kColumns / 4][64];  // [16 outputs][4 columns]
  alignas(64) float scales[kScaled ? kMostGroups : 1][kPanels][kPanel];
  alignas(64) float minimums[kScaled && f.minimum ? kMostGroups : 1][kPanels][kPanel];
  // int4: see `scale_and_rest`.
  alignas(64) int32_t pairs[F == kInt4Format ? kMostGroups : 1][kPanels][kPanel];
  const uint8_t* from;
  int64_t groups;
  int panels;

  // Goes on with other weights, of which `set` then sets group after group.
  void begin(const uint8_t* weights, int64_t count, int of_panels) {
    from = weights, groups = count, panels = of_panels;
    if constexpr (kScaled) set_scales();
  }

  // Sets a group of a panel, if it is there.
  MOESCOPE_INLINE void set(int p, int64_t g) {
    if (p == panels || g >= groups) return;
    if constexpr (F == kInt8Format) {
      each<kSteps>([&](auto step) MOESCOPE_INLINE {
        put(p, g, step, _mm512_loadu_si512(from + ((g * kSteps + step) * panels + p) * 64));
      });
    } else if constexpr (F == kInt4Format) {
      const uint8_t* chunk = from + g * panels * panel_bytes(f, kChunk);
      const __m512i low = _mm512_set1_epi8(0x0f), middle = _mm512_set1_epi8(kInt4Minimum);
      each<4>([&](auto step) MOESCOPE_INLINE {
        const __m512i both = _mm512_loadu_si512(chunk + (step * panels + p) * 64);
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        put(p, g, step, _mm512_sub_epi8(_mm512_and_si512(both, low), middle));
        put(p, g, step + 4, _mm512_sub_epi8(high, middle));
      });
      _mm512_store_si512(pairs[g][p],
                         scale_and_rest(chunk + panels * 256 + p * kPanel, panels * kPanel));
    } else {
      const uint8_t* record = from + p * panel_bytes(f, groups * f.group);
      const uint8_t* chunk = record + g * f.group / kChunk * chunk_bytes(f);
      constexpr int kParts = kChunk / f.group;
      each<kParts>([&](auto part) MOESCOPE_INLINE {
        if (kParts == 1 || g % kParts == part)
          each<kSteps>([&](auto step) MOESCOPE_INLINE {
            put(p, g, step, records::all_values_of<F>(chunk, part * kSteps + step));
          });
      });
    }
  }

  // Adds a group's dots to the sums of all rows.
  MOESCOPE_INLINE void add(const int32_t (&dots)[kTileRows][kPanel], const RowBlock<F>& rows,
                           int64_t g, int p, __m512 (&sums)[kTileRows]) const {
    if constexpr (F == kInt4Format) {
      const __m512i pair = _mm512_load_si512(pairs[g][p]);
      each<kTileRows>([&](auto r) MOESCOPE_INLINE {
        const __m512i both = _mm512_mask_mov_epi16(_mm512_set1_epi32(rows.sums[r][g]), kLowerHalves,
                                                   _mm512_load_si512(dots[r]));
        sums[r] = _mm512_fmadd_ps(_mm512_set1_ps(rows.scales[r][g]),
                                  _mm512_cvtepi32_ps(_mm512_madd_epi16(both, pair)), sums[r]);
      });
    } else {
      __m512 scale{}, minimum{};
      if constexpr (kScaled) scale = _mm512_load_ps(scales[g][p]);
      if constexpr (f.minimum) minimum = _mm512_load_ps(minimums[g][p]);
      each<kTileRows>([&](auto r) MOESCOPE_INLINE {
        __m512 size = _mm512_set1_ps(rows.scales[r][g]);
        if constexpr (kScaled) size = _mm512_mul_ps(scale, size);
        sums[r] = _mm512_fmadd_ps(size, _mm512_cvtepi32_ps(_mm512_load_si512(dots[r])), sums[r]);
        if constexpr (f.minimum)
          sums[r] = _mm512_fmadd_ps(
              minimum, _mm512_castsi512_ps(_mm512_set1_epi32(rows.sums[r][g])), sums[r]);
      });
    }
  }

 private:
  MOESCOPE_INLINE void put(int p, int64_t g, int step, __m512i stored) {
    _mm512_store_si512(values[p][g * kSteps + step],
                       _mm512_sub_epi8(stored, _mm512_set1_epi8(static_cast<char>(f.zero))));
  }

  // Of all groups, and zeros for those that are not there.
  void set_scales() {
    const int64_t columns = groups * f.group;
    const uint8_t* record = from;
    for (int p = 0; p < panels; ++p, record += panel_bytes(f, columns)) {
      const records::AllSupers supers = records::all_supers_of<F>(record, columns);
      for (int64_t g = 0; g < groups; ++g) {
        _mm512_store_ps(scales[g][p], records::all_scales_at<F>(record + value_bytes(f, columns),
                                                                g * kPanel, supers.scale));
        if constexpr (f.minimum)
          _mm512_store_ps(minimums[g][p],
                          records::all_scales_at<F>(record + minimums_at(f, columns), g * kPanel,
                                                    supers.minimum));
      }
      for (int64_t g = groups; g % kHeldGroups != 0; ++g) {
        _mm512_store_ps(scales[g][p], _mm512_setzero_ps());
        if constexpr (f.minimum) _mm512_store_ps(minimums[g][p], _mm512_setzero_ps());
      }
    }
  }
};

// Adds `count` rows times G groups of a block's panels from `first` on to `out`. While a group's dots
// are made, those of the group before it are stored, and those of the one before that are used; the
// first rows set the weights, a group ahead.
template <int F, int G, bool Sets>
__attribute__((noinline)) void add_groups(Block<F>& weights, const RowBlock<F>& rows, int count,
                                          int64_t first, RowsToTake<F>& next, Share& ahead,
                                          float* out) {
  static_assert(G == 2 || G == 4);
  constexpr int kGroup = kWeightFormats[F].group;
  alignas(64) int32_t dots[2][kTileRows][kPanel];
  if constexpr (Sets) weights.set(0, first);
  each<G>([&](auto g) MOESCOPE_INLINE {
    tiles::load<4 + g>(&rows.values[0][(first + g) * kGroup], sizeof rows.values[0]);
  });
  const int panels = weights.panels;
  __m512 sums[kTileRows];
  for (int p = 0; p <= panels; ++p)
    each<G>([&](auto g) MOESCOPE_INLINE {
      constexpr int kNow = g % 2, kBefore = 1 - kNow, kUsed = (g + G - 2) % G;
      if (p < panels) {
        ahead.step();
        tiles::zero<kNow>();
        tiles::load<2 + kNow>(weights.values[p][(first + g) * (kGroup / 4)], 64);
        tiles::add_bytes<kNow, 4 + g, 2 + kNow>();
        if constexpr (Sets) weights.set(g + 1 == G ? p + 1 : p, first + (g + 1) % G);
        next.step();
      }
      if (g == 0 ? p > 0 : p < panels) tiles::store<kBefore>(dots[kBefore], sizeof dots[0][0]);
      if (g >= 2 ? p == panels : p == 0) return;
      const int used = g >= 2 ? p : p - 1;
      float* const to = out + used * kPanel;
      if constexpr (kUsed == 0)
        each<kTileRows>([&](auto r) MOESCOPE_INLINE {
          sums[r] = r < count ? _mm512_loadu_ps(to + r * kTile) : _mm512_setzero_ps();
        });
      weights.add(dots[kNow], rows, first + kUsed, used, sums);
      if constexpr (kUsed == G - 1)
        each<kTileRows>([&](auto r) MOESCOPE_INLINE {
          if (r < count) _mm512_storeu_ps(to + r * kTile, sums[r]);
        });
    });
}

template <int F>
void multiply_on_tiles(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                       float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  constexpr int64_t kGroups = kColumns / f.group;
  static const TileShapes shapes = shapes_for(f.group);
  tiles::configure(&shapes);
  memset(out, 0, count * kTile * sizeof(float));
  int64_t row[kRowBlock];
  for (int i = 0; i < count; ++i) row[i] = rows ? rows[i] : i;
  const int passes = (count + kTileRows - 1) / kTileRows;
  Block<F> weights;
  RowBlock<F> held[2]{};
  const auto rows_of = [&](int pass, int64_t first, RowBlock<F>& to) {
    const int start = pass * kTileRows;
    const int64_t left = a.groups - first;
    const int there = left <= 0 ? 0 : count - start < kTileRows ? count - start : kTileRows;
    return RowsToTake<F>{to, a, row + start, there, first, left < kGroups ? left : kGroups};
  };
  rows_of(0, 0, held[0]).finish();
  const uint8_t* from = tile.weights;
  int now = 0;
  for (int64_t first = 0; first < a.groups; first += kGroups) {
    const int64_t groups = first + kGroups < a.groups ? kGroups : a.groups - first;
    weights.begin(from, groups, tile.panels);
    const int64_t bytes = tile.panels * panel_bytes(f, groups * f.group);
    from += bytes;
    Shares shares(from < tile.end ? from : tile.next, bytes, passes, tile.panels * groups);
    for (int pass = 0; pass < passes; ++pass, now = 1 - now) {
      const bool last = pass + 1 == passes;
      RowsToTake<F> next =
          rows_of(last ? 0 : pass + 1, last ? first + kGroups : first, held[1 - now]);
      const int start = pass * kTileRows;
      const int m = count - start < kTileRows ? count - start : kTileRows;
      Share ahead = shares.take();
      for (int64_t g = 0; g < groups; g += kHeldGroups) {
        const bool whole = groups - g > 2;
        const auto add = pass == 0 ? (whole ? add_groups<F, 4, true> : add_groups<F, 2, true>)
                                   : (whole ? add_groups<F, 4, false> : add_groups<F, 2, false>);
        add(weights, held[now], m, g, next, ahead, out + start * kTile);
      }
      next.finish();
    }
  }
  tiles::release();
  if constexpr (has_row_scale(f))
    with_constant<1, 2, 3, 4>(tile.panels,
                              [&](auto panels) { scale_rows<panels>(tile, count, out); });
}

template <int F>
void multiply(const Tile& tile, const Activations& a, const int32_t* rows, int count, float* out) {
  if (count < kFewestRows || a.columns % kWeightFormats[F].group != 0)
    return avx512_kernels.multiply.of[F](tile, a, rows, count, out);
  multiply_on_tiles<F>(tile, a, rows, count, out);
}

}  // namespace

void use_tiles(Multiplies& products) {
  each<kFormats>([&](auto format) {
    if constexpr (!is_float(kWeightFormats[format])) products.of[format] = multiply<format>;
  });
}

}  // namespace moescope
