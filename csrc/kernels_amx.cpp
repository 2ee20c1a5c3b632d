// AMX: one `tdpbsud` multiplies up to 64 columns of 16 rows and 16 outputs. Everything that is no
// product of many rows in int8 or int4 is left to AVX-512, whose sums are the same to the last bit.
#include <immintrin.h>
#include <string.h>

#include "each.h"
#include "isa.h"

namespace moescope {
namespace {

constexpr int kRows = 16;        // of a tile
constexpr int kFewestRows = 8;   // below, vectors are as fast
constexpr int64_t kGroups = 8;   // of a block of weights that stays in the first-level cache

// What the processor is told of tiles, 16 rows of 64 bytes each, but that 1 has `Columns` of
// activations, and 2 the same columns of weights, four to a row.
template <int Columns>
struct alignas(64) Shape {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, Columns, 64};
  uint8_t rows[16] = {kRows, kRows, Columns / 4};
};

// Rows of activations over the groups of a block, copied together.
template <int Columns>
struct Block {
  alignas(64) int8_t values[kRows][kGroups * Columns];
  float scales[kGroups][kRows];
  int32_t offsets[kGroups][kRows];

  // Takes `m` rows; what stands behind them in a tile repeats the last.
  void take(const Activations& a, const int32_t* rows, int start, int m, int64_t first,
            int64_t groups) {
    for (int r = 0; r < kRows; ++r) {
      const int at = start + (r < m ? r : m - 1);
      const int64_t row = rows ? rows[at] : at;
      memcpy(values[r], a.values + row * a.columns + first * Columns, groups * Columns);
      for (int64_t g = 0; g < groups; ++g) {
        scales[g][r] = a.scales[row * a.groups + first + g];
        offsets[g][r] = a.offsets[row * a.groups + first + g];
      }
    }
  }
};

// A panel over the groups of a block: rows of four columns, `stride` bytes from one to the next, and
// for int4 each group's scales.
struct Panel {
  const uint8_t* weights;
  int64_t stride;
  const float* scales;
};

// Bytes that a group of a panel takes in memory.
template <int Columns>
constexpr int64_t kGroupBytes = Columns == 64 ? 1024 : 288;

// Adds `m` rows of a block times a panel to `out`, or sets it there. Meanwhile fetches as many bytes
// as the panel has, which stand `ahead`.
template <int Columns, bool Fetch>
void add_panel(const Panel& panel, const Block<Columns>& block, int m, int64_t groups, bool fresh,
               const uint8_t* ahead, float* out) {
  constexpr int kLines = (kGroupBytes<Columns> + 63) / 64;
  alignas(64) int32_t dots[2][kRows][kPanel];
  __m512 sums[kRows];
  each<kRows>([&](auto r) MOESCOPE_INLINE {
    sums[r] = fresh || r >= m ? _mm512_setzero_ps() : _mm512_loadu_ps(out + r * kTile);
  });
  const uint8_t* weights = panel.weights;
  for (int64_t g = 0; g < groups; ++g, weights += Columns / 4 * panel.stride) {
    int32_t(&found)[kRows][kPanel] = dots[g % 2];
    _tile_zero(0);
    _tile_loadd(1, &block.values[0][g * Columns], kGroups * Columns);
    _tile_loadd(2, weights, panel.stride);
    _tile_dpbsud(0, 1, 2);
    _tile_stored(0, found, sizeof found[0]);
    __m512 weight_scale;
    if constexpr (Columns == 32) weight_scale = _mm512_loadu_ps(panel.scales + g * kPanel);
    each<kRows>([&](auto r) MOESCOPE_INLINE {
      if constexpr (Fetch && r < kLines) _mm_prefetch(ahead + r * 64, _MM_HINT_T1);
      const __m512i whole = _mm512_add_epi32(_mm512_load_si512(found[r]),
                                             _mm512_set1_epi32(block.offsets[g][r]));
      __m512 scale = _mm512_set1_ps(block.scales[g][r]);
      if constexpr (Columns == 32) scale = _mm512_mul_ps(weight_scale, scale);
      sums[r] = _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(whole), sums[r]);
    });
    if constexpr (Fetch) ahead += kGroupBytes<Columns>;
  }
  each<kRows>([&](auto r) MOESCOPE_INLINE {
    if (r < m) _mm512_storeu_ps(out + r * kTile, sums[r]);
  });
}

// int4's weights of a block as bytes, and their scales as float32.
struct Opened {
  alignas(64) uint8_t weights[kPanels][kGroups][8][64];
  float scales[kPanels][kGroups][kPanel];

  void take(const uint8_t* chunk, int panels, int64_t groups) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t g = 0; g < groups; ++g, chunk += panels * kGroupBytes<32>)
      for (int p = 0; p < panels; ++p) {
        for (int step = 0; step < 4; ++step) {
          const __m512i both = _mm512_loadu_si512(chunk + (step * panels + p) * 64);
          _mm512_store_si512(weights[p][g][step], _mm512_and_si512(both, low));
          _mm512_store_si512(weights[p][g][step + 4],
                             _mm512_and_si512(_mm512_srli_epi16(both, 4), low));
        }
        const __m256i bits = _mm256_loadu_si256(
            reinterpret_cast<const __m256i*>(chunk + panels * 256 + p * 32));
        _mm512_storeu_ps(scales[p][g], _mm512_castsi512_ps(_mm512_slli_epi32(
                                           _mm512_cvtepu16_epi32(bits), 16)));
      }
  }
};

template <int Columns>
void multiply(const Tile& tile, const Activations& a, const int32_t* rows, int count, float* out) {
  static const Shape<Columns> shape;
  _tile_loadconfig(&shape);
  const int64_t group_bytes = tile.panels * kGroupBytes<Columns>;
  Block<Columns> block;
  Opened opened;
  for (int64_t first = 0; first < a.groups; first += kGroups) {
    const int64_t groups = first + kGroups < a.groups ? kGroups : a.groups - first;
    const uint8_t* weights = tile.weights + first * group_bytes;
    const uint8_t* ahead = weights + kGroups * group_bytes;
    if (ahead >= tile.end) ahead = tile.next;
    if constexpr (Columns == 32) opened.take(weights, tile.panels, groups);
    for (int start = 0; start < count; start += kRows) {
      const int m = count - start < kRows ? count - start : kRows;
      block.take(a, rows, start, m, first, groups);
      for (int p = 0; p < tile.panels; ++p) {
        Panel panel = {weights + p * 64, tile.panels * 64, nullptr};
        if constexpr (Columns == 32) panel = {opened.weights[p][0][0], 64, opened.scales[p][0]};
        float* to = out + start * kTile + p * kPanel;
        if (start == 0)
          add_panel<Columns, true>(panel, block, m, groups, first == 0,
                                   ahead + p * kGroups * kGroupBytes<Columns>, to);
        else
          add_panel<Columns, false>(panel, block, m, groups, first == 0, nullptr, to);
      }
    }
  }
  _tile_release();
}

}  // namespace

void multiply_int8_amx(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                       float* out) {
  if (count < kFewestRows || a.columns % 64 != 0)
    return avx512_kernels.multiply_int8(tile, a, rows, count, out);
  multiply<64>(tile, a, rows, count, out);
  for (int r = 0; r < count; ++r)
    for (int p = 0; p < tile.panels; ++p) {
      float* to = out + r * kTile + p * kPanel;
      const __m512 scale = _mm512_loadu_ps(tile.row_scales + p * kPanel);
      _mm512_storeu_ps(to, _mm512_mul_ps(_mm512_loadu_ps(to), scale));
    }
}

void multiply_int4_amx(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                       float* out) {
  if (count < kFewestRows) return avx512_kernels.multiply_int4(tile, a, rows, count, out);
  multiply<32>(tile, a, rows, count, out);
}

}  // namespace moescope
