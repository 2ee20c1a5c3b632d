// AVX2, with or without VNNI: included by kernels_avx2.cpp and kernels_avxvnni.cpp, whose compiler
// flags make the difference.
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "each.h"
#include "isa.h"
#include "kernels_avx2_blocks.h"
#include "kernels_avx2_tiles.h"
#include "kernels_records.h"
#include "records.h"

namespace moescope {
namespace {

inline float sum_of(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

void quantize(const float* x, int64_t columns, int64_t padded, int64_t group, int8_t* values,
              float* scales, int32_t* sums) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int64_t start = 0, g = 0; start < padded; start += group, ++g) {
    const int64_t end = start + group < padded ? start + group : padded;
    const int64_t filled = end < columns ? end : columns;
    __m256 largest = _mm256_setzero_ps();
    int64_t k = start;
    for (; k + 8 <= filled; k += 8)
      largest = _mm256_max_ps(largest, _mm256_and_ps(magnitude, _mm256_loadu_ps(x + k)));
    float lanes[8], most = 0;
    _mm256_storeu_ps(lanes, largest);
    for (float lane : lanes) most = lane > most ? lane : most;
    for (; k < filled; ++k) most = fabsf(x[k]) > most ? fabsf(x[k]) : most;
    const float inverse = most > 0 ? 127 / most : 0;
    __m256i rounded_sums = _mm256_setzero_si256();
    for (k = start; k + 8 <= filled; k += 8) {
      const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + k), _mm256_set1_ps(inverse));
      const __m256i rounded = _mm256_cvtps_epi32(scaled);
      const __m128i words =
          _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(values + k), _mm_packs_epi16(words, words));
      rounded_sums = _mm256_add_epi32(rounded_sums, rounded);
    }
    uint32_t eight[8], sum = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(eight), rounded_sums);
    for (uint32_t one : eight) sum += one;
    for (; k < end; ++k) {
      const int value = k < filled ? _mm_cvtss_si32(_mm_set_ss(x[k] * inverse)) : 0;
      values[k] = static_cast<int8_t>(value);
      sum += static_cast<uint32_t>(value);
    }
    scales[g] = most / 127;
    sums[g] = static_cast<int32_t>(sum);
  }
}

template <int F>
void multiply_few(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                  float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  if constexpr (f.order == Order::record)
    records::multiply<F>(tile, a, rows, count, out);
  else if (count == 1)
    with_constant<1, 2, 3, 4>(tile.panels, [&](auto panels) {
      multiply_line<F, panels>(tile, a, rows ? rows[0] : 0, out);
    });
  else if constexpr (is_float(f))
    multiply_parts<F>(tile, a, rows, count, a.columns, 1, out);
  else
    multiply_parts<F>(tile, a, rows, count, a.groups, a.group, out);
}

template <int F>
void multiply(const Tile& tile, const Activations& a, const int32_t* rows, int count, float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  if constexpr (is_float(f)) {
    multiply_few<F>(tile, a, rows, count, out);
  } else if (count >= blocks::kFrom<F>) {
    blocks::multiply<F>(tile, a, rows, count, out);
  } else {
    multiply_few<F>(tile, a, rows, count, out);
  }
  if constexpr (has_row_scale(f))
    for (int r = 0; r < count; ++r)
      for (int n = 0; n < tile.panels * kPanel; ++n) out[r * kTile + n] *= tile.row_scales[n];
}

template <int... F>
constexpr Multiplies multiplies(std::integer_sequence<int, F...>) {
  return {{multiply<F>...}};
}
constexpr Multiplies kMultiplies = multiplies(std::make_integer_sequence<int, kFormats>{});

// exp to about 2 units in the last place: exp(x) = 2^n * p(x - n ln 2), p the Taylor polynomial.
// What is no number stays none: of two operands, the bounds return the second.
inline __m256 exponential(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-87.0f), _mm256_min_ps(_mm256_set1_ps(88.0f), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.0f / 720);
  const float coefficients[] = {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  for (float c : coefficients) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(c));
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

void swiglu(float* gate, const float* up, int64_t n) {
  const __m256 one = _mm256_set1_ps(1);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 g = _mm256_loadu_ps(gate + i);
    const __m256 e = exponential(_mm256_sub_ps(_mm256_setzero_ps(), g));
    const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, e));
    _mm256_storeu_ps(gate + i, _mm256_mul_ps(silu, _mm256_loadu_ps(up + i)));
  }
  for (; i < n; ++i) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

void axpy(float a, const float* x, float* y, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(
        y + i, _mm256_fmadd_ps(_mm256_set1_ps(a), _mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i)));
  for (; i < n; ++i) y[i] += a * x[i];
}

// Of the bf16 numbers that stand in pairs, the first or the second of each, as floats.
template <int Second>
MOESCOPE_INLINE inline __m256 of_pairs(__m256i pairs) {
  return _mm256_castsi256_ps(
      Second ? _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))
             : _mm256_slli_epi32(pairs, 16));
}

// 8 * kStep<T> numbers; of pairs all that are first, then all that are second.
MOESCOPE_INLINE inline void read(const float* x, __m256 (&numbers)[1]) {
  numbers[0] = _mm256_loadu_ps(x);
}
MOESCOPE_INLINE inline void read(const Bf16* x, __m256 (&numbers)[2]) {
  const __m256i pairs = load(x);
  numbers[0] = of_pairs<0>(pairs), numbers[1] = of_pairs<1>(pairs);
}

inline float number(float x) { return x; }
inline float number(Bf16 x) { return float_of_bf16(x.bits); }

template <int R, typename T>
MOESCOPE_INLINE inline void add_dots(const T* x, int64_t stride, const T* q, int64_t q_stride,
                                     int64_t width, float* out, int64_t out_stride) {
  constexpr int kParts = kStep<T>;
  __m256 sums[kHeads][R];
  each<kHeads>([&](auto h) MOESCOPE_INLINE {
    each<R>([&](auto r) MOESCOPE_INLINE { sums[h][r] = _mm256_setzero_ps(); });
  });
  int64_t k = 0;
  for (; k + 8 * kParts <= width; k += 8 * kParts) {
    __m256 slots[R][kParts];
    each<R>([&](auto r) MOESCOPE_INLINE { read(x + r * stride + k, slots[r]); });
    each<kHeads>([&](auto h) MOESCOPE_INLINE {
      __m256 query[kParts];
      read(q + h * q_stride + k, query);
      each<R>([&](auto r) MOESCOPE_INLINE {
        each<kParts>([&](auto part) MOESCOPE_INLINE {
          sums[h][r] = _mm256_fmadd_ps(slots[r][part], query[part], sums[h][r]);
        });
      });
    });
  }
  each<kHeads>([&](auto h) MOESCOPE_INLINE {
    each<R>([&](auto r) MOESCOPE_INLINE {
      float sum = sum_of(sums[h][r]);
      for (int64_t rest = k; rest < width; ++rest)
        sum += number(x[r * stride + rest]) * number(q[h * q_stride + rest]);
      out[h * out_stride + r] += sum;
    });
  });
}

// Two slots at a time, so that a query's numbers are widened once for both.
template <typename T>
void dots(const T* x, int64_t stride, int64_t count, const T* q, int64_t q_stride, int64_t width,
          const T*, int, float* out, int64_t out_stride) {
  int64_t i = 0;
  for (; i + 2 <= count; i += 2)
    add_dots<2>(x + i * stride, stride, q, q_stride, width, out + i, out_stride);
  if (i < count) add_dots<1>(x + i * stride, stride, q, q_stride, width, out + i, out_stride);
}

void dot_rows(const float* x, int64_t count, const float* q, int64_t width, float* out) {
  for (int64_t i = 0; i < count; ++i, x += width) {
    __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    int64_t k = 0;
    for (; k + 16 <= width; k += 16) {
      sums[0] = _mm256_fmadd_ps(_mm256_loadu_ps(x + k), _mm256_loadu_ps(q + k), sums[0]);
      sums[1] = _mm256_fmadd_ps(_mm256_loadu_ps(x + k + 8), _mm256_loadu_ps(q + k + 8), sums[1]);
    }
    float sum = sum_of(_mm256_add_ps(sums[0], sums[1]));
    for (; k < width; ++k) sum += x[k] * q[k];
    out[i] = sum;
  }
}

// Adds numbers as `read` gives them to those at `to`.
MOESCOPE_INLINE inline void add_in_order(const __m256 (&numbers)[1], float* to) {
  _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), numbers[0]));
}
MOESCOPE_INLINE inline void add_in_order(const __m256 (&numbers)[2], float* to) {
  const __m256 low = _mm256_unpacklo_ps(numbers[0], numbers[1]);
  const __m256 high = _mm256_unpackhi_ps(numbers[0], numbers[1]);
  const __m256 in_order[2] = {_mm256_permute2f128_ps(low, high, 0x20),
                              _mm256_permute2f128_ps(low, high, 0x31)};
  each<2>([&](auto part) MOESCOPE_INLINE {
    _mm256_storeu_ps(to + part * 8, _mm256_add_ps(_mm256_loadu_ps(to + part * 8), in_order[part]));
  });
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
  constexpr int kParts = kStep<T>;
  int64_t k = 0;
  for (; k + 8 * kParts <= width; k += 8 * kParts) {
    __m256 sums[kHeads][kParts] = {};
    for (int64_t i = 0; i < count; ++i) {
      __m256 numbers[kParts];
      read(x + i * stride + k, numbers);
      each<kHeads>([&](auto h) MOESCOPE_INLINE {
        const __m256 weight = _mm256_broadcast_ss(&weights[h][i]);
        each<kParts>([&](auto part) MOESCOPE_INLINE {
          sums[h][part] = _mm256_fmadd_ps(weight, numbers[part], sums[h][part]);
        });
      });
    }
    each<kHeads>([&](auto h)
                     MOESCOPE_INLINE { add_in_order(sums[h], mixed + h * mixed_stride + k); });
  }
  for (; k < width; ++k)
    for (int h = 0; h < kHeads; ++h)
      for (int64_t i = 0; i < count; ++i)
        mixed[h * mixed_stride + k] += weights[h][i] * number(x[i * stride + k]);
}

// Eight outputs' numbers of the first or second of the steps that stand together.
template <int Second>
MOESCOPE_INLINE inline __m256 of_step(const float* steps, int half) {
  return _mm256_loadu_ps(steps + half * 8);
}
template <int Second>
MOESCOPE_INLINE inline __m256 of_step(const Bf16* steps, int half) {
  return of_pairs<Second>(load(steps + half * 16));
}

// What the outputs of such a step are multiplied with.
template <int Second>
MOESCOPE_INLINE inline __m256 factor_of_step(const float* x) {
  return _mm256_broadcast_ss(x);
}
template <int Second>
MOESCOPE_INLINE inline __m256 factor_of_step(const Bf16* x) {
  return of_pairs<Second>(broadcast(reinterpret_cast<const int8_t*>(x)));
}

template <int M, typename T>
MOESCOPE_INLINE inline void multiply_panel(const T* x, int64_t stride, const T* panel,
                                           int64_t depth, bool add, float* out,
                                           int64_t out_stride) {
  __m256 sums[M][2];
  each<M>([&](auto m) MOESCOPE_INLINE {
    each<2>([&](auto half) MOESCOPE_INLINE {
      sums[m][half] = add ? _mm256_loadu_ps(out + m * out_stride + half * 8) : _mm256_setzero_ps();
    });
  });
  for (int64_t k = 0; k < depth; k += kStep<T>)
    each<kStep<T>>([&](auto s) MOESCOPE_INLINE {
      const T* steps = panel + k * kPanel;
      const __m256 left = of_step<s>(steps, 0), right = of_step<s>(steps, 1);
      each<M>([&](auto m) MOESCOPE_INLINE {
        const __m256 factor = factor_of_step<s>(x + m * stride + k);
        sums[m][0] = _mm256_fmadd_ps(factor, left, sums[m][0]);
        sums[m][1] = _mm256_fmadd_ps(factor, right, sums[m][1]);
      });
    });
  each<M>([&](auto m) MOESCOPE_INLINE {
    _mm256_storeu_ps(out + m * out_stride, sums[m][0]);
    _mm256_storeu_ps(out + m * out_stride + 8, sums[m][1]);
  });
}

template <typename T>
void multiply_panels(const T* x, int64_t stride, int count, const T* matrix, int64_t panel_stride,
                     int64_t depth, int panels, bool add, float* out, int64_t out_stride) {
  for (int p = 0; p < panels; ++p) {
    const T* panel = matrix + p * panel_stride;
    float* to = out + p * kPanel;
    int r = 0;
    for (; r + 6 <= count; r += 6)
      multiply_panel<6>(x + r * stride, stride, panel, depth, add, to + r * out_stride, out_stride);
    for (; r < count; ++r)
      multiply_panel<1>(x + r * stride, stride, panel, depth, add, to + r * out_stride, out_stride);
  }
}

void store(const float* x, int64_t n, float* out) { memcpy(out, x, n * sizeof *x); }

void store(const float* x, int64_t n, Bf16* out) {
  for (int64_t i = 0; i < n; ++i) out[i].bits = bf16_of(x[i]);
}

template <typename T>
constexpr AttentionLoops<T> kLoops = {kHeads, put_row<T, store>,  dots<T>,
                                      mix<T>, multiply_panels<T>, store};

float exponentials(float* x, float scale, float largest, int64_t n) {
  const __m256 most = _mm256_set1_ps(largest), factor = _mm256_set1_ps(scale);
  __m256 sums = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 below = _mm256_sub_ps(_mm256_loadu_ps(x + i), most);
    const __m256 e = exponential(_mm256_mul_ps(below, factor));
    sums = _mm256_add_ps(sums, e);
    _mm256_storeu_ps(x + i, e);
  }
  float sum = sum_of(sums);
  for (; i < n; ++i) sum += x[i] = expf(scale * (x[i] - largest));
  return sum;
}

float greatest(const float* x, int64_t n) {
  __m256 lanes = _mm256_set1_ps(-INFINITY);
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) lanes = _mm256_max_ps(lanes, _mm256_loadu_ps(x + i));
  float each[8], most = -INFINITY;
  _mm256_storeu_ps(each, lanes);
  for (float lane : each) most = lane > most ? lane : most;
  for (; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

void softmax(float* x, float scale, int64_t n) {
  const float inverse = 1 / exponentials(x, scale, greatest(x, n), n);
  for (int64_t i = 0; i < n; ++i) x[i] *= inverse;
}

float log_sum_exp(const float* x, float scale, int64_t n) {
  const float largest = greatest(x, n);
  const __m256 most = _mm256_set1_ps(largest), factor = _mm256_set1_ps(scale);
  __m256 sums = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 below = _mm256_sub_ps(_mm256_loadu_ps(x + i), most);
    sums = _mm256_add_ps(sums, exponential(_mm256_mul_ps(below, factor)));
  }
  float sum = sum_of(sums);
  for (; i < n; ++i) sum += expf(scale * (x[i] - largest));
  return scale * largest + logf(sum);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  __m256 squares = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    squares = _mm256_fmadd_ps(v, v, squares);
  }
  float sum = sum_of(squares);
  for (; i < n; ++i) sum += x[i] * x[i];
  const float factor = 1 / sqrtf(sum / static_cast<float>(n) + eps);
  for (i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

}  // namespace
}  // namespace moescope
