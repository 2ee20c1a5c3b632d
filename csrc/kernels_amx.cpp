// AMX: products of many rows with weights of 8 bits, 16 rows and 16 outputs over a group of columns at a
// time. Their sums are AVX-512's to the last bit.
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
constexpr int64_t kColumns = 256;  // of a block of weights, which stays in the first-level cache

// Tile 0 holds sums; 1 rows over a group of columns; 2 weights, four columns of 16 outputs to a row.
TileShapes shapes_for(int group) {
  TileShapes shapes;
  shapes.set(0, kTileRows, 64);
  shapes.set(1, kTileRows, group);
  shapes.set(2, group / 4, 64);
  return shapes;
}

// Rows of activations over the columns of a block, copied together.
template <int F>
struct RowBlock {
  static constexpr WeightFormat f = kWeightFormats[F];
  static constexpr int kGroups = kColumns / f.group;
  static_assert(kGroups <= 16);

  alignas(64) int8_t values[kTileRows][kColumns];
  alignas(64) float scales[kTileRows][16];
  alignas(64) int32_t starts[kTileRows][16];  // of dots

  // Takes `count` rows; what stands behind them in a tile is of no account.
  void take(const Activations& a, const int64_t* row, int count, int64_t first, int64_t groups) {
    const __mmask16 mask = static_cast<__mmask16>((1 << groups) - 1);
    for (int r = 0; r < count; ++r) {
      const int8_t* from = a.values + row[r] * a.columns + first * f.group;
      if (groups == kGroups)
        memcpy(values[r], from, kColumns);
      else
        memcpy(values[r], from, groups * f.group);
      const int64_t group = row[r] * a.groups + first;
      _mm512_store_ps(scales[r], _mm512_maskz_loadu_ps(mask, a.scales + group));
      _mm512_store_si512(starts[r],
                         _mm512_mullo_epi32(_mm512_maskz_loadu_epi32(mask, a.sums + group),
                                            _mm512_set1_epi32(-f.zero)));
    }
  }
};

// The weights of a block of int8, as they lie.
template <int P>
struct BlockInPlace {
  const uint8_t* values;

  void set(const uint8_t* from, int64_t) { values = from; }
  const uint8_t* group(int p, int64_t g) const {
    return values + (g * (kInt8.group / 4) * P + p) * 64;
  }
  static constexpr int64_t kStep = P * 64;  // bytes from 4 columns to the next
  __m512 scale(int, int64_t, __m512 size) const { return size; }
};

// Those of a record, whose scales are spread to floats.
template <int F, int P>
struct BlockOfRecords {
  static constexpr int kGroup = kWeightFormats[F].group;
  records::Spread<F, P> spread;

  void set(const uint8_t* records, int64_t groups) { spread.set(records, groups * kGroup); }
  const uint8_t* group(int p, int64_t g) const {
    return spread.values + p * spread.stride + g * kGroup * kPanel;
  }
  static constexpr int64_t kStep = 64;
  MOESCOPE_INLINE __m512 scale(int p, int64_t g, __m512 size) const {
    return _mm512_mul_ps(_mm512_load_ps(spread.scales[g][p]), size);
  }
};

template <int F, int P>
using Block = std::conditional_t<kWeightFormats[F].order == Order::record, BlockOfRecords<F, P>,
                                 BlockInPlace<P>>;

// Adds `count` rows times a block's panels to `out`, and fetches as many bytes of what is `ahead`.
// Products are used two groups later, when their tiles have surely been stored.
template <int F, int P, bool Fetches>
__attribute__((noinline)) void add_block(const Block<F, P>& weights, const RowBlock<F>& rows,
                                         int count, int64_t groups, const uint8_t* ahead,
                                         float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  constexpr int kLate = 2, kHeld = 4;  // of which dots are held
  constexpr int64_t kGroupBytes = panel_bytes(f, f.group);
  constexpr int kLines = (kGroupBytes + 63) / 64;
  static_assert(kLines <= kTileRows + 1);
  alignas(64) int32_t dots[kHeld][kTileRows][kPanel];
  __m512 sums[kTileRows];
  struct {
    int p = 0;
    int64_t g = 0;
  } made, used;
  for (int64_t n = 0; n < P * groups + kLate; ++n) {
    if (made.p < P) {
      tiles::zero<0>();
      tiles::load<1>(&rows.values[0][made.g * f.group], sizeof rows.values[0]);
      tiles::load<2>(weights.group(made.p, made.g), weights.kStep);
      tiles::add_bytes<0, 1, 2>();
      tiles::store<0>(dots[n % kHeld], sizeof dots[0][0]);
      if (++made.g == groups) ++made.p, made.g = 0;
    }
    if (n < kLate) continue;
    if (used.g == 0)
      each<kTileRows>([&](auto r) MOESCOPE_INLINE {
        sums[r] = r < count ? _mm512_loadu_ps(out + r * kTile) : _mm512_setzero_ps();
      });
    const auto& found = dots[(n - kLate) % kHeld];
    each<kTileRows>([&](auto r) MOESCOPE_INLINE {
      if constexpr (Fetches && r < kLines)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + r * 64), _MM_HINT_T1);
      const __m512i whole =
          _mm512_add_epi32(_mm512_load_si512(found[r]), _mm512_set1_epi32(rows.starts[r][used.g]));
      const __m512 scale = weights.scale(used.p, used.g, _mm512_set1_ps(rows.scales[r][used.g]));
      sums[r] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(whole), sums[r]);
    });
    if constexpr (Fetches) ahead += kGroupBytes;
    if (++used.g == groups) {
      each<kTileRows>([&](auto r) MOESCOPE_INLINE {
        if (r < count) _mm512_storeu_ps(out + r * kTile, sums[r]);
      });
      ++used.p, used.g = 0;
      out += kPanel;
    }
  }
}

template <int F, int P>
void multiply_tile(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                   float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  static const TileShapes shapes = shapes_for(f.group);
  tiles::configure(&shapes);
  memset(out, 0, count * kTile * sizeof(float));
  int64_t row[kRowBlock];
  for (int i = 0; i < count; ++i) row[i] = rows ? rows[i] : i;
  Block<F, P> weights;
  RowBlock<F> taken{};
  const uint8_t* from = tile.weights;
  for (int64_t first = 0; first < a.groups; first += taken.kGroups) {
    const int64_t groups = first + taken.kGroups < a.groups ? taken.kGroups : a.groups - first;
    weights.set(from, groups);
    from += P * panel_bytes(f, groups * f.group);
    const uint8_t* ahead = from < tile.end ? from : tile.next;
    for (int start = 0; start < count; start += kTileRows) {
      const int m = count - start < kTileRows ? count - start : kTileRows;
      taken.take(a, row + start, m, first, groups);
      const auto add =
          start == 0 && ahead != nullptr ? add_block<F, P, true> : add_block<F, P, false>;
      add(weights, taken, m, groups, ahead, out + start * kTile);
    }
  }
  tiles::release();
  if constexpr (has_row_scale(f)) scale_rows<P>(tile, count, out);
}

template <int F>
void multiply(const Tile& tile, const Activations& a, const int32_t* rows, int count, float* out) {
  if (count < kFewestRows || a.columns % kWeightFormats[F].group != 0)
    return avx512_kernels.multiply.of[F](tile, a, rows, count, out);
  with_constant<1, 2, 3, 4>(
      tile.panels, [&](auto panels) { multiply_tile<F, panels>(tile, a, rows, count, out); });
}

}  // namespace

void use_tiles(Multiplies& products) {
  constexpr int kQ8 = format_named("q8_0"), kBytes = format_named("int8");
  products.of[kQ8] = multiply<kQ8>;
  products.of[kBytes] = multiply<kBytes>;
}

}  // namespace moescope
