// AVX-512 with VNNI.
#include "kernels_avx512.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "each.h"
#include "isa.h"
#include "kernels_avx512_records.h"
#include "kernels_avx512_tiles.h"
#include "records.h"

namespace moescope {
namespace {

void quantize(const float* x, int64_t columns, int64_t padded, int64_t group, int8_t* values,
              float* scales, int32_t* sums) {
  for (int64_t start = 0, g = 0; start < padded; start += group, ++g) {
    const int64_t end = start + group < padded ? start + group : padded;
    __m512 largest = _mm512_setzero_ps();
    for (int64_t k = start; k < end && k < columns; k += 16) {
      const int64_t left = columns - k;
      const __mmask16 mask = left >= 16 ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, x + k)));
    }
    const float most = _mm512_reduce_max_ps(largest);
    const __m512 inverse = _mm512_set1_ps(most > 0 ? 127 / most : 0);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = start; k < end; k += 16) {
      const int64_t left = columns - k;
      const __mmask16 mask = left >= 16  ? 0xffff
                             : left <= 0 ? 0
                                         : static_cast<__mmask16>((1 << left) - 1);
      const __m512i rounded =
          _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + k), inverse));
      sum = _mm512_add_epi32(sum, rounded);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(values + k), _mm512_cvtepi32_epi8(rounded));
    }
    scales[g] = most / 127;
    sums[g] = _mm512_reduce_add_epi32(sum);
  }
}

template <int W>
void multiply(const Tile& tile, const Activations& a, const int32_t* rows, int count, float* out) {
  if constexpr (kWeightFormats[W].order == Order::record) {
    if constexpr (is_float(kWeightFormats[W]))
      records::multiply<W>(tile, a, rows, count, out);
    else if (count >= records::kManyFrom)
      records::multiply_many<W>(tile, a, rows, count, out);
    else
      records::multiply_few<W>(tile, a, rows, count, out);
  } else {
    switch (tile.panels) {
      case 1: return multiply_panels<W, 1>(tile, a, rows, count, out);
      case 2: return multiply_panels<W, 2>(tile, a, rows, count, out);
      case 3: return multiply_panels<W, 3>(tile, a, rows, count, out);
      default: return multiply_panels<W, 4>(tile, a, rows, count, out);
    }
  }
}

template <int... W>
constexpr Multiplies multiplies(std::integer_sequence<int, W...>) {
  return {{multiply<W>...}};
}
constexpr Multiplies kMultiplies = multiplies(std::make_integer_sequence<int, kFormats>{});

// exp to about 2 units in the last place: exp(x) = 2^n * p(x - n ln 2), p the Taylor polynomial.
// What is no number stays none: of two operands, the bounds return the second.
inline __m512 exponential(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(88.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.0f / 720);
  const float coefficients[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float c : coefficients) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(p, n);
}

void swiglu(float* gate, const float* up, int64_t n) {
  const __m512 one = _mm512_set1_ps(1);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
    const __m512 u = _mm512_maskz_loadu_ps(mask, up + i);
    const __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), g));
    _mm512_mask_storeu_ps(gate + i, mask,
                          _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(one, e)), u));
  }
}

void axpy(float a, const float* x, float* y, int64_t n) {
  const __m512 factor = _mm512_set1_ps(a);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m512 sum = _mm512_fmadd_ps(factor, _mm512_maskz_loadu_ps(mask, x + i),
                                       _mm512_maskz_loadu_ps(mask, y + i));
    _mm512_mask_storeu_ps(y + i, mask, sum);
  }
}

MOESCOPE_INLINE inline __m512 numbers(__mmask16 mask, const float* x) {
  return _mm512_maskz_loadu_ps(mask, x);
}
MOESCOPE_INLINE inline __m512 numbers(__mmask16 mask, const Bf16* x) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

template <int Fetched, typename T>
void dots_fetching(const T* x, int64_t stride, int64_t count, const T* q, int64_t q_stride,
                   int64_t width, const T* ahead, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < count; i += 4) {
    const int64_t left = count - i;
    const T* row[4];
    each<4>([&](auto r) MOESCOPE_INLINE { row[r] = x + (i + (r < left ? r : 0)) * stride; });
    __m512 sums[16];  // [heads][rows]
    const T* next = ahead + i / 4 * Fetched * stride;
    each<16>([&](auto s) MOESCOPE_INLINE { sums[s] = _mm512_setzero_ps(); });
    const auto step = [&](int64_t k, __mmask16 mask) MOESCOPE_INLINE {
      __m512 slots[4];
      each<Fetched>([&](auto r) MOESCOPE_INLINE { prefetch(next + r * stride + k); });
      each<4>([&](auto r) MOESCOPE_INLINE { slots[r] = numbers(mask, row[r] + k); });
      each<kHeads>([&](auto h) MOESCOPE_INLINE {
        const __m512 query = numbers(mask, q + h * q_stride + k);
        each<4>([&](auto r) MOESCOPE_INLINE {
          sums[h * 4 + r] = _mm512_fmadd_ps(slots[r], query, sums[h * 4 + r]);
        });
      });
    };
    int64_t k = 0;
    for (; k + 16 <= width; k += 16) step(k, 0xffff);
    if (k < width) step(k, static_cast<__mmask16>((1 << (width - k)) - 1));
    alignas(64) float found[16];
    _mm512_store_ps(found, sums_of(sums));
    for (int h = 0; h < kHeads; ++h)
      for (int64_t r = 0; r < 4 && r < left; ++r) out[h * out_stride + i + r] += found[h * 4 + r];
  }
}

template <typename T>
void dots(const T* x, int64_t stride, int64_t count, const T* q, int64_t q_stride, int64_t width,
          const T* ahead, int fetched, float* out, int64_t out_stride) {
  with_constant<0, 1, 2, 4>(fetched, [&](auto rows) {
    dots_fetching<rows>(x, stride, count, q, q_stride, width, ahead, out, out_stride);
  });
}

// Which of the next 32 numbers are there, sixteen and sixteen, where so many are left.
struct Halves {
  __mmask16 low, high;
};
MOESCOPE_INLINE inline Halves halves(int64_t left) {
  const uint32_t there = left >= 32 ? 0xffffffffu : (1u << left) - 1;
  return {static_cast<__mmask16>(there), static_cast<__mmask16>(there >> 16)};
}

// out[i] = dot(x_i, q) for M rows, each in the order that a row alone has.
template <int M>
void dot_some(const float* x, const float* q, int64_t width, float* out) {
  __m512 sums[M][2];
  each<M>([&](auto m) MOESCOPE_INLINE { sums[m][0] = sums[m][1] = _mm512_setzero_ps(); });
  for (int64_t k = 0; k < width; k += 32) {
    const Halves there = halves(width - k);
    const __mmask16 low = there.low, high = there.high;
    const __m512 first = _mm512_maskz_loadu_ps(low, q + k);
    const __m512 second = _mm512_maskz_loadu_ps(high, q + k + 16);
    each<M>([&](auto m) MOESCOPE_INLINE {
      const float* from = x + m * width + k;
      prefetch<2>(from + kPrefetch / sizeof(float));
      sums[m][0] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(low, from), first, sums[m][0]);
      sums[m][1] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(high, from + 16), second, sums[m][1]);
    });
  }
  each<M>([&](auto m) MOESCOPE_INLINE {
    out[m] = _mm512_reduce_add_ps(_mm512_add_ps(sums[m][0], sums[m][1]));
  });
}

void dot_rows(const float* x, int64_t count, const float* q, int64_t width, float* out) {
  constexpr int kAtOnce = 4;  // rows, so that sums need not wait for those before them
  int64_t i = 0;
  for (; i + kAtOnce <= count; i += kAtOnce) dot_some<kAtOnce>(x + i * width, q, width, out + i);
  for (; i < count; ++i) dot_some<1>(x + i * width, q, width, out + i);
}

template <typename T>
void mix(const T* x, int64_t stride, int64_t count, const float* p, int64_t p_stride, int64_t width,
         float* mixed, int64_t mixed_stride) {
  float weights[kHeads][kSlotBlock];
  for (int h = 0; h < kHeads; ++h)
    for (int64_t i = 0; i < count; ++i) {
      weights[h][i] = p[h * p_stride + i];
      if constexpr (kStep<T> == 2) weights[h][i] = float_of_bf16(bf16_of(weights[h][i]));
    }
  for (int64_t k = 0; k < width; k += 32) {
    const Halves there = halves(width - k);
    const __mmask16 low = there.low, high = there.high;
    __m512 sums[kHeads][2];
    for (int h = 0; h < kHeads; ++h) {
      sums[h][0] = _mm512_maskz_loadu_ps(low, mixed + h * mixed_stride + k);
      sums[h][1] = _mm512_maskz_loadu_ps(high, mixed + h * mixed_stride + k + 16);
    }
    for (int64_t i = 0; i < count; ++i) {
      const __m512 a = numbers(low, x + i * stride + k);
      const __m512 b = numbers(high, x + i * stride + k + 16);
      for (int h = 0; h < kHeads; ++h) {
        const __m512 weight = _mm512_set1_ps(weights[h][i]);
        sums[h][0] = _mm512_fmadd_ps(weight, a, sums[h][0]);
        sums[h][1] = _mm512_fmadd_ps(weight, b, sums[h][1]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      _mm512_mask_storeu_ps(mixed + h * mixed_stride + k, low, sums[h][0]);
      _mm512_mask_storeu_ps(mixed + h * mixed_stride + k + 16, high, sums[h][1]);
    }
  }
}

// Sixteen outputs' numbers of the first or second of the steps that stand together.
MOESCOPE_INLINE inline __m512 of_step(const float* steps, int) { return _mm512_loadu_ps(steps); }
MOESCOPE_INLINE inline __m512 of_step(const Bf16* steps, int second) {
  const __m512i pairs = _mm512_loadu_si512(steps);
  return _mm512_castsi512_ps(
      second ? _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))
             : _mm512_slli_epi32(pairs, 16));
}

MOESCOPE_INLINE inline float number(float x) { return x; }
MOESCOPE_INLINE inline float number(Bf16 x) { return float_of_bf16(x.bits); }

template <int M, int P, typename T>
__attribute__((noinline)) void multiply_block(const T* x, int64_t stride, const T* matrix,
                                              int64_t panel_stride, int64_t depth, bool add,
                                              float* out, int64_t out_stride) {
  __m512 sums[M][P];
  each<M>([&](auto m) MOESCOPE_INLINE {
    each<P>([&](auto p) MOESCOPE_INLINE {
      sums[m][p] = add ? _mm512_loadu_ps(out + m * out_stride + p * kPanel) : _mm512_setzero_ps();
    });
  });
  for (int64_t k = 0; k < depth; k += kStep<T>)
    each<kStep<T>>([&](auto s) MOESCOPE_INLINE {
      __m512 panel[P];
      each<P>([&](auto p) MOESCOPE_INLINE {
        panel[p] = of_step(matrix + p * panel_stride + k * kPanel, s);
      });
      each<M>([&](auto m) MOESCOPE_INLINE {
        const __m512 factor = _mm512_set1_ps(number(x[m * stride + k + s]));
        each<P>([&](auto p) MOESCOPE_INLINE {
          sums[m][p] = _mm512_fmadd_ps(factor, panel[p], sums[m][p]);
        });
      });
    });
  each<M>([&](auto m) MOESCOPE_INLINE {
    each<P>([&](auto p) MOESCOPE_INLINE {
      _mm512_storeu_ps(out + m * out_stride + p * kPanel, sums[m][p]);
    });
  });
}

template <int P, typename T>
void multiply_blocks(const T* x, int64_t stride, int count, const T* matrix, int64_t panel_stride,
                     int64_t depth, bool add, float* out, int64_t out_stride) {
  int r = 0;
  for (; r + kRows <= count; r += kRows)
    multiply_block<kRows, P>(x + r * stride, stride, matrix, panel_stride, depth, add,
                             out + r * out_stride, out_stride);
  for (; r < count; ++r)
    multiply_block<1, P>(x + r * stride, stride, matrix, panel_stride, depth, add,
                         out + r * out_stride, out_stride);
}

template <typename T>
void multiply_all_panels(const T* x, int64_t stride, int count, const T* matrix,
                         int64_t panel_stride, int64_t depth, int panels, bool add, float* out,
                         int64_t out_stride) {
  int p = 0;
  for (; p + 4 <= panels; p += 4)
    multiply_blocks<4>(x, stride, count, matrix + p * panel_stride, panel_stride, depth, add,
                       out + p * kPanel, out_stride);
  for (; p < panels; ++p)
    multiply_blocks<1>(x, stride, count, matrix + p * panel_stride, panel_stride, depth, add,
                       out + p * kPanel, out_stride);
}

void store(const float* x, int64_t n, float* out) { memcpy(out, x, n * sizeof *x); }

void store(const float* x, int64_t n, Bf16* out) {
  for (int64_t i = 0; i < n; ++i) out[i].bits = bf16_of(x[i]);
}

template <typename T>
constexpr AttentionLoops<T> kLoops = {kHeads, put_row<T, store>,      dots<T>,
                                      mix<T>, multiply_all_panels<T>, store};

float exponentials(float* x, float scale, float largest, int64_t n) {
  __m512 sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(largest));
    const __m512 e =
        _mm512_maskz_mov_ps(mask, exponential(_mm512_mul_ps(below, _mm512_set1_ps(scale))));
    sums = _mm512_add_ps(sums, e);
    _mm512_mask_storeu_ps(x + i, mask, e);
  }
  return _mm512_reduce_add_ps(sums);
}

float greatest(const float* x, int64_t n) {
  __m512 most = _mm512_set1_ps(-INFINITY);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    most = _mm512_mask_max_ps(most, mask, most, _mm512_maskz_loadu_ps(mask, x + i));
  }
  return _mm512_reduce_max_ps(most);
}

void softmax(float* x, float scale, int64_t n) {
  const float sum = exponentials(x, scale, greatest(x, n), n);
  const __m512 factor = _mm512_set1_ps(1 / sum);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    _mm512_mask_storeu_ps(x + i, mask, _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor));
  }
}

float log_sum_exp(const float* x, float scale, int64_t n) {
  const float most = greatest(x, n);
  __m512 sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), _mm512_set1_ps(most));
    const __m512 e = exponential(_mm512_mul_ps(below, _mm512_set1_ps(scale)));
    sums = _mm512_mask_add_ps(sums, mask, sums, e);
  }
  return scale * most + logf(_mm512_reduce_add_ps(sums));
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(mask, x + i);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(n);
  const __m512 factor = _mm512_set1_ps(1 / sqrtf(mean + eps));
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 mask = n - i >= 16 ? 0xffff : static_cast<__mmask16>((1 << (n - i)) - 1);
    const __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
    _mm512_mask_storeu_ps(out + i, mask, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, weight + i)));
  }
}

}  // namespace

const Kernels avx512_kernels = {"avx512", quantize,      kMultiplies, swiglu,       axpy,
                                dot_rows, softmax,       greatest,    exponentials, log_sum_exp,
                                rms_norm, kLoops<float>, kLoops<Bf16>};

}  // namespace moescope
