// Attention's loops on bf16 with AVX-512: one `vdpbf16ps` multiplies 2 numbers of 16 lanes.
#include "kernels_avx512bf16.h"

#include <immintrin.h>
#include <string.h>

#include "each.h"
#include "isa.h"
#include "kernels_avx512.h"

namespace moescope {
namespace {

constexpr int kRows = 6;  // 6 x 4 sums, 4 panels and a broadcast fill the registers

// sums += a * b, two products to a sum. As an intrinsic, GCC 12 copies every sum of a large block
// through the stack.
MOESCOPE_INLINE inline void dot(__m512& sums, __m512i a, __m512i b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}

MOESCOPE_INLINE inline __m512i broadcast_pair(const void* pair) {
  int32_t both;
  memcpy(&both, pair, sizeof both);
  return _mm512_set1_epi32(both);
}

MOESCOPE_INLINE inline __mmask32 first(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }

// 32 numbers, or the first `n` of them and zeros.
template <bool Whole>
MOESCOPE_INLINE inline __m512i numbers(const Bf16* x, int64_t n) {
  return Whole ? _mm512_loadu_si512(x) : _mm512_maskz_loadu_epi16(first(n), x);
}

// What the caller will meet with all heads stays in the second-level cache.
MOESCOPE_INLINE inline void prefetch(const void* from) {
  _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1);
}

template <int Fetched>
void dots_fetching(const Bf16* x, int64_t stride, int64_t count, const Bf16* q, int64_t q_stride,
                   int64_t width, const Bf16* ahead, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < count; i += 4) {
    const int64_t left = count - i;
    const Bf16* row[4];
    each<4>([&](auto r) MOESCOPE_INLINE { row[r] = x + (i + (r < left ? r : 0)) * stride; });
    __m512 sums[16];  // [heads][rows]
    const Bf16* next = ahead + i / 4 * Fetched * stride;
    each<16>([&](auto s) MOESCOPE_INLINE { sums[s] = _mm512_setzero_ps(); });
    const auto step = [&](int64_t k, auto whole) MOESCOPE_INLINE {
      __m512i slots[4];
      each<Fetched>([&](auto r) MOESCOPE_INLINE { prefetch(next + r * stride + k); });
      each<4>([&](auto r) MOESCOPE_INLINE { slots[r] = numbers<whole>(row[r] + k, width - k); });
      each<kHeads>([&](auto h) MOESCOPE_INLINE {
        const __m512i query = numbers<whole>(q + h * q_stride + k, width - k);
        each<4>([&](auto r) MOESCOPE_INLINE { dot(sums[h * 4 + r], slots[r], query); });
      });
    };
    int64_t k = 0;
    for (; k + 32 <= width; k += 32) step(k, Index<1>{});
    if (k < width) step(k, Index<0>{});
    alignas(64) float found[16];
    _mm512_store_ps(found, sums_of(sums));
    for (int h = 0; h < kHeads; ++h)
      for (int64_t r = 0; r < 4 && r < left; ++r) out[h * out_stride + i + r] += found[h * 4 + r];
  }
}

void dots(const Bf16* x, int64_t stride, int64_t count, const Bf16* q, int64_t q_stride,
          int64_t width, const Bf16* ahead, int fetched, float* out, int64_t out_stride) {
  with_constant<0, 1, 2, 4>(fetched, [&](auto rows) {
    dots_fetching<rows>(x, stride, count, q, q_stride, width, ahead, out, out_stride);
  });
}

// Two rows' numbers meet in pairs as `unpack` makes them: of every eight columns the first four in one
// register, the others in another.
void mix(const Bf16* x, int64_t stride, int64_t count, const float* p, int64_t p_stride,
         int64_t width, float* mixed, int64_t mixed_stride) {
  const __m512i to_first =
      _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
  const __m512i to_second =
      _mm512_setr_epi32(4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  const __m512i to_low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i to_high =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  alignas(64) Bf16 weights[kHeads][kSlotBlock];
  for (int h = 0; h < kHeads; ++h)
    for (int64_t i = 0; i < count; i += 32)
      _mm512_store_si512(weights[h] + i, rounded(p + h * p_stride + i, count - i));
  const auto mix_columns = [&](int64_t k, auto whole) MOESCOPE_INLINE {
    const __mmask16 low = first_floats(width - k), high = first_floats(width - k - 16);
    __m512 sums[kHeads][2];
    each<kHeads>([&](auto h) MOESCOPE_INLINE {
      const float* from = mixed + h * mixed_stride + k;
      const __m512 a = _mm512_maskz_loadu_ps(low, from), b = _mm512_maskz_loadu_ps(high, from + 16);
      sums[h][0] = _mm512_permutex2var_ps(a, to_first, b);
      sums[h][1] = _mm512_permutex2var_ps(a, to_second, b);
    });
    const auto add = [&](int64_t i, __m512i a, __m512i b) MOESCOPE_INLINE {
      const __m512i left = _mm512_unpacklo_epi16(a, b), right = _mm512_unpackhi_epi16(a, b);
      each<kHeads>([&](auto h) MOESCOPE_INLINE {
        const __m512i pair = broadcast_pair(weights[h] + i);
        dot(sums[h][0], left, pair);
        dot(sums[h][1], right, pair);
      });
    };
    const Bf16* from = x + k;
    int64_t i = 0;
    for (; i + 2 <= count; i += 2, from += 2 * stride)
      add(i, numbers<whole>(from, width - k), numbers<whole>(from + stride, width - k));
    if (i < count) add(i, numbers<whole>(from, width - k), _mm512_setzero_si512());
    each<kHeads>([&](auto h) MOESCOPE_INLINE {
      float* to = mixed + h * mixed_stride + k;
      _mm512_mask_storeu_ps(to, low, _mm512_permutex2var_ps(sums[h][0], to_low, sums[h][1]));
      _mm512_mask_storeu_ps(to + 16, high, _mm512_permutex2var_ps(sums[h][0], to_high, sums[h][1]));
    });
  };
  int64_t k = 0;
  for (; k + 32 <= width; k += 32) mix_columns(k, Index<1>{});
  if (k < width) mix_columns(k, Index<0>{});
}

template <int M, int P>
__attribute__((noinline)) void multiply_block(const Bf16* x, int64_t stride, const Bf16* matrix,
                                              int64_t panel_stride, int64_t depth, bool add,
                                              float* out, int64_t out_stride) {
  __m512 sums[M][P];
  each<M>([&](auto m) MOESCOPE_INLINE {
    each<P>([&](auto p) MOESCOPE_INLINE {
      sums[m][p] = add ? _mm512_loadu_ps(out + m * out_stride + p * kPanel) : _mm512_setzero_ps();
    });
  });
  for (int64_t k = 0; k < depth; k += 2) {
    __m512i panel[P];
    each<P>([&](auto p) MOESCOPE_INLINE {
      panel[p] = _mm512_loadu_si512(matrix + p * panel_stride + k * kPanel);
    });
    each<M>([&](auto m) MOESCOPE_INLINE {
      const __m512i pair = broadcast_pair(x + m * stride + k);
      each<P>([&](auto p) MOESCOPE_INLINE { dot(sums[m][p], panel[p], pair); });
    });
  }
  each<M>([&](auto m) MOESCOPE_INLINE {
    each<P>([&](auto p) MOESCOPE_INLINE {
      _mm512_storeu_ps(out + m * out_stride + p * kPanel, sums[m][p]);
    });
  });
}

template <int P>
void multiply_blocks(const Bf16* x, int64_t stride, int count, const Bf16* matrix,
                     int64_t panel_stride, int64_t depth, bool add, float* out,
                     int64_t out_stride) {
  int r = 0;
  for (; r + kRows <= count; r += kRows)
    multiply_block<kRows, P>(x + r * stride, stride, matrix, panel_stride, depth, add,
                             out + r * out_stride, out_stride);
  for (; r < count; ++r)
    multiply_block<1, P>(x + r * stride, stride, matrix, panel_stride, depth, add,
                         out + r * out_stride, out_stride);
}

void multiply(const Bf16* x, int64_t stride, int count, const Bf16* matrix, int64_t panel_stride,
              int64_t depth, int panels, bool add, float* out, int64_t out_stride) {
  int p = 0;
  for (; p + 4 <= panels; p += 4)
    multiply_blocks<4>(x, stride, count, matrix + p * panel_stride, panel_stride, depth, add,
                       out + p * kPanel, out_stride);
  for (; p < panels; ++p)
    multiply_blocks<1>(x, stride, count, matrix + p * panel_stride, panel_stride, depth, add,
                       out + p * kPanel, out_stride);
}

void store(const float* x, int64_t n, Bf16* out) {
  for (int64_t i = 0; i < n; i += 32)
    _mm512_mask_storeu_epi16(out + i, first(n - i), rounded(x + i, n - i));
}

}  // namespace

const AttentionLoops<Bf16> avx512bf16_loops = {kHeads, put_row<Bf16, store>, dots, mix, multiply,
                                               store};

}  // namespace moescope
