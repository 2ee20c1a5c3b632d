// AMX: attention's loops on bf16. One `tdpbf16ps` multiplies 32 numbers of 16 rows with 16 columns.
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "amx.h"
#include "each.h"
#include "isa.h"
#include "kernels_avx512bf16.h"

namespace moescope {
namespace {

constexpr int kDepth = 32;  // numbers of a row of a tile

// Tiles for products of so many rows: 0 to 3 hold sums of a panel each; 4 rows over 32 numbers and 6 a
// panel over as many; 5 and 7 the same over the `rest` of the depth, an even number.
TileShapes product_shapes(int rows, int rest) {
  TileShapes shapes;
  for (int sums = 0; sums < 4; ++sums) shapes.set(sums, rows, 64);
  shapes.set(4, rows, 64);
  shapes.set(5, rows, 2 * rest);
  shapes.set(6, kDepth / 2, 64);
  shapes.set(7, rest / 2, 64);
  return shapes;
}

// out (rows, P * 16) = x times P panels, plus what it holds if `add`; tiles say how many rows.
template <int P>
void multiply_tiles(const Bf16* x, int64_t stride, const Bf16* matrix, int64_t panel_stride,
                    int64_t depth, bool add, float* out, int64_t out_stride) {
  const int64_t row_bytes = stride * sizeof(Bf16), out_bytes = out_stride * sizeof(float);
  each<P>([&](auto p) MOESCOPE_INLINE {
    if (add)
      tiles::load<p>(out + p * kPanel, out_bytes);
    else
      tiles::zero<p>();
  });
  int64_t k = 0;
  for (; k + kDepth <= depth; k += kDepth) {
    tiles::load<4>(x + k, row_bytes);
    each<P>([&](auto p) MOESCOPE_INLINE {
      tiles::load<6>(matrix + p * panel_stride + k * kPanel, 64);
      tiles::add_bf16<p, 4, 6>();
    });
  }
  if (k < depth) {
    tiles::load<5>(x + k, row_bytes);
    each<P>([&](auto p) MOESCOPE_INLINE {
      tiles::load<7>(matrix + p * panel_stride + k * kPanel, 64);
      tiles::add_bf16<p, 5, 7>();
    });
  }
  each<P>([&](auto p) MOESCOPE_INLINE { tiles::store<p>(out + p * kPanel, out_bytes); });
}

void multiply(const Bf16* x, int64_t stride, int count, const Bf16* matrix, int64_t panel_stride,
              int64_t depth, int panels, bool add, float* out, int64_t out_stride) {
  int configured = 0;
  for (int r = 0; r < count; r += kTileRows) {
    const int rows = count - r < kTileRows ? count - r : kTileRows;
    if (rows != configured) {
      const TileShapes shapes = product_shapes(rows, static_cast<int>(depth % kDepth));
      tiles::configure(&shapes);
      configured = rows;
    }
    for (int p = 0; p < panels; p += kPanels)
      with_constant<1, 2, 3, 4>(panels - p < kPanels ? panels - p : kPanels, [&](auto together) {
        multiply_tiles<together>(x + r * stride, stride, matrix + p * panel_stride, panel_stride,
                                 depth, add, out + r * out_stride + p * kPanel, out_stride);
      });
  }
  tiles::release();
}

constexpr int kTileHeads = 16;

// Tiles for the scores of 16 slots at a time with all heads: 0 to 3 hold sums, of which the last has
// `rest` slots; 4 slots over 32 numbers, 5 the last ones, and 6 as many numbers of the queries.
TileShapes dot_shapes(int rest) {
  TileShapes shapes;
  for (int sums = 0; sums < 3; ++sums) shapes.set(sums, kTileRows, 64);
  shapes.set(3, rest, 64);
  shapes.set(4, kTileRows, 64);
  shapes.set(5, rest, 64);
  shapes.set(6, kDepth / 2, 64);
  return shapes;
}

// As tiles want a matrix: pairs of numbers, [n / 2][16 heads][2].
void put_query(const float* query, int64_t n, int64_t head, Bf16* queries, int64_t) {
  alignas(64) uint32_t pairs[16];
  for (int64_t start = 0; start < n; start += kDepth) {
    _mm512_store_si512(pairs, rounded(query + start, n - start));
    for (int i = 0; i < 16; ++i)
      memcpy(queries + (start + 2 * i) * kTileHeads + 2 * head, pairs + i, sizeof pairs[i]);
  }
}

// Columns of 16 registers become rows.
MOESCOPE_INLINE inline void transpose(__m512 (&v)[16]) {
  __m512 t[16];
  each<8>([&](auto i) MOESCOPE_INLINE {
    t[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  });
  const auto pd = [](__m512 x) MOESCOPE_INLINE { return _mm512_castps_pd(x); };
  const auto ps = [](__m512d x) MOESCOPE_INLINE { return _mm512_castpd_ps(x); };
  each<4>([&](auto i) MOESCOPE_INLINE {
    each<2>([&](auto j) MOESCOPE_INLINE {
      const __m512d a = pd(t[4 * i + j]), b = pd(t[4 * i + 2 + j]);
      v[4 * i + 2 * j] = ps(_mm512_unpacklo_pd(a, b));
      v[4 * i + 2 * j + 1] = ps(_mm512_unpackhi_pd(a, b));
    });
  });
  each<4>([&](auto i) MOESCOPE_INLINE {
    const __m512 a = _mm512_shuffle_f32x4(v[i], v[4 + i], 0x88);
    const __m512 b = _mm512_shuffle_f32x4(v[i], v[4 + i], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(v[8 + i], v[12 + i], 0xdd);
    t[i] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[8 + i] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[4 + i] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(b, d, 0xdd);
  });
  each<16>([&](auto i) MOESCOPE_INLINE { v[i] = t[i]; });
}

MOESCOPE_INLINE inline void fetch_rows(const Bf16* ahead, int rows, int64_t stride) {
  for (int r = 0; r < rows; ++r)
    _mm_prefetch(reinterpret_cast<const char*>(ahead + r * stride), _MM_HINT_T1);
}

void dots(const Bf16* x, int64_t stride, int64_t count, const Bf16* queries, int64_t, int64_t width,
          const Bf16* ahead, int fetched, float* out, int64_t out_stride) {
  const int whole = static_cast<int>(count - 1) / kTileRows;  // tiles but the last
  const TileShapes shapes = dot_shapes(static_cast<int>(count) - whole * kTileRows);
  tiles::configure(&shapes);
  each<4>([&](auto sums) MOESCOPE_INLINE { tiles::zero<sums>(); });
  const int fetched_rows = fetched * static_cast<int>(kSlotBlock) / 4;
  alignas(64) Bf16 edge[kSlotBlock][kDepth];
  for (int64_t k = 0; k < width; k += kDepth) {
    const Bf16* from = x + k;
    int64_t step = stride;
    if (width - k < kDepth) {  // what stands behind the numbers is none of them
      const __mmask32 mask = (1u << (width - k)) - 1;
      for (int64_t i = 0; i < count; ++i)
        _mm512_store_si512(edge[i], _mm512_maskz_loadu_epi16(mask, from + i * stride));
      from = edge[0];
      step = kDepth;
    }
    fetch_rows(ahead + k, fetched_rows, stride);
    tiles::load<6>(queries + k * kTileHeads, 64);
    each<3>([&](auto tile) MOESCOPE_INLINE {
      if (tile >= whole) return;
      tiles::load<4>(from + tile * kTileRows * step, step * sizeof(Bf16));
      tiles::add_bf16<tile, 4, 6>();
    });
    tiles::load<5>(from + whole * kTileRows * step, step * sizeof(Bf16));
    tiles::add_bf16<3, 5, 6>();
  }
  alignas(64) float found[kSlotBlock][kTileHeads];
  each<3>([&](auto tile) MOESCOPE_INLINE {
    if (tile < whole) tiles::store<tile>(found[tile * kTileRows], sizeof found[0]);
  });
  tiles::store<3>(found[whole * kTileRows], sizeof found[0]);
  tiles::release();
  for (int tile = 0; tile <= whole; ++tile) {
    const int64_t left = count - tile * kTileRows;
    const __mmask16 mask = left >= kTileRows ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
    __m512 scores[16];
    each<16>([&](auto i)
                 MOESCOPE_INLINE { scores[i] = _mm512_load_ps(found[tile * kTileRows + i]); });
    transpose(scores);
    each<kTileHeads>([&](auto h) MOESCOPE_INLINE {
      float* to = out + h * out_stride + tile * kTileRows;
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), scores[h]));
    });
  }
}

// Tiles for `mix`: 0 and 1 hold sums; 2 and 3 pairs of slots; 4 and 5 the weights of 32 slots each.
TileShapes mix_shapes() {
  TileShapes shapes;
  for (int tile = 0; tile < 6; ++tile) shapes.set(tile, kTileRows, 64);
  return shapes;
}

// Two slots' numbers meet in pairs as `unpack` makes them: of every eight columns the first four in one
// tile, the others in another.
void mix(const Bf16* x, int64_t stride, int64_t count, const float* p, int64_t p_stride,
         int64_t width, float* mixed, int64_t mixed_stride) {
  const __m512i to_low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i to_high =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  static const TileShapes shapes = mix_shapes();
  alignas(64) Bf16 weights[kTileHeads][kSlotBlock];
  for (int h = 0; h < kTileHeads; ++h)
    for (int64_t i = 0; i < kSlotBlock; i += 32)
      _mm512_store_si512(weights[h] + i, rounded(p + h * p_stride + i, count - i));
  tiles::configure(&shapes);
  tiles::load<4>(weights[0], sizeof weights[0]);
  tiles::load<5>(weights[0] + 32, sizeof weights[0]);
  const int pairs = count > 32 ? 32 : 16;
  alignas(64) uint32_t first[32][16], second[32][16];  // [pairs of slots][columns]
  alignas(64) float sums[2][kTileHeads][16];
  for (int64_t k = 0; k < width; k += 32) {
    const int64_t left = width - k;
    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
    for (int i = 0; i < pairs; ++i) {
      const Bf16* from = x + 2 * i * stride + k;
      const __m512i a = _mm512_maskz_loadu_epi16(2 * i < count ? mask : 0, from);
      const __m512i b = _mm512_maskz_loadu_epi16(2 * i + 1 < count ? mask : 0, from + stride);
      _mm512_store_si512(first[i], _mm512_unpacklo_epi16(a, b));
      _mm512_store_si512(second[i], _mm512_unpackhi_epi16(a, b));
    }
    tiles::zero<0>();
    tiles::zero<1>();
    tiles::load<2>(first[0], 64);
    tiles::add_bf16<0, 4, 2>();
    tiles::load<3>(second[0], 64);
    tiles::add_bf16<1, 4, 3>();
    if (pairs > 16) {
      tiles::load<2>(first[16], 64);
      tiles::add_bf16<0, 5, 2>();
      tiles::load<3>(second[16], 64);
      tiles::add_bf16<1, 5, 3>();
    }
    tiles::store<0>(sums[0], 64);
    tiles::store<1>(sums[1], 64);
    const __mmask16 low = static_cast<__mmask16>(mask), high = static_cast<__mmask16>(mask >> 16);
    for (int h = 0; h < kTileHeads; ++h) {
      const __m512 a = _mm512_load_ps(sums[0][h]), b = _mm512_load_ps(sums[1][h]);
      float* to = mixed + h * mixed_stride + k;
      _mm512_mask_storeu_ps(
          to, low,
          _mm512_add_ps(_mm512_maskz_loadu_ps(low, to), _mm512_permutex2var_ps(a, to_low, b)));
      _mm512_mask_storeu_ps(to + 16, high,
                            _mm512_add_ps(_mm512_maskz_loadu_ps(high, to + 16),
                                          _mm512_permutex2var_ps(a, to_high, b)));
    }
  }
  tiles::release();
}

}  // namespace

void use_tiles(AttentionLoops<Bf16>& loops) {
  loops = {kTileHeads, put_query, dots, mix, multiply, loops.store};
}

}  // namespace moescope
