// AVX2, with or without VNNI: included by kernels_avx2.cpp and kernels_avxvnni.cpp, whose compiler
// flags make the difference.
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "each.h"
#include "isa.h"
#include "kernels_records.h"
#include "records.h"

namespace moescope {
namespace {

constexpr int kRows = 4;
constexpr WeightFormat kInt8 = kWeightFormats[format_named("int8")];
constexpr int64_t kColumnBlock = 256;  // columns of a tile that stay in the first-level cache

inline __m256i load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

inline __m256i broadcast(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  return _mm256_set1_epi32(four);
}

inline __m256 bytes_at(const uint8_t* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
}

inline float sum_of(__m256 v) {
  const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_shuffle_ps(pair, pair, 1)));
}

// The sums start so as to make up for the zero point where weights are taken as they are stored, and
// at zero where it is taken off them first.
#ifdef __AVXVNNI__
constexpr bool kInt8AsStored = true;
// As an intrinsic, GCC 12 copies every sum.
MOESCOPE_INLINE inline __m256i dot_int8(__m256i sums, __m256i weights, __m256i x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(weights), "x"(x));
  return sums;
}
MOESCOPE_INLINE inline __m256i dot_int4(__m256i sums, __m256i weights, __m256i x) {
  return dot_int8(sums, weights, x);
}
MOESCOPE_INLINE inline __m256i whole_int4(__m256i sums) { return sums; }
#else
constexpr bool kInt8AsStored = false;
// `maddubs` saturates for bytes above 127, so magnitudes are multiplied with signs moved across.
inline __m256i dot_int8(__m256i sums, __m256i weights, __m256i x) {
  const __m256i signed_weights = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(signed_weights), _mm256_sign_epi8(x, signed_weights));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// The products of a chunk, 16 of 4 and 8 bits to a sum, fit 16 bits; `whole_int4` widens their sums.
inline __m256i dot_int4(__m256i sums, __m256i weights, __m256i x) {
  return _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights, x));
}
inline __m256i whole_int4(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
#endif

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
    uint32_t sum = 0;
    int32_t rounded[8];
    for (k = start; k + 8 <= filled; k += 8) {
      const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(x + k), _mm256_set1_ps(inverse));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded), _mm256_cvtps_epi32(scaled));
      for (int i = 0; i < 8; ++i) {
        values[k + i] = static_cast<int8_t>(rounded[i]);
        sum += static_cast<uint32_t>(rounded[i]);
      }
    }
    for (; k < end; ++k) {
      const int value = k < filled ? _mm_cvtss_si32(_mm_set_ss(x[k] * inverse)) : 0;
      values[k] = static_cast<int8_t>(value);
      sum += static_cast<uint32_t>(value);
    }
    scales[g] = most / 127;
    sums[g] = static_cast<int32_t>(sum);
  }
}

// Inlined by force: GCC takes a function that only fetches for one without effect.
MOESCOPE_INLINE inline void prefetch(const void* from) {
  _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1);
}

// Adds M rows of panel `p` over the columns of groups [first, last) to `out`, or sets it there.
// Meanwhile fetches as many bytes that stand `ahead`, one line behind the other, as the processor's
// own prefetcher wants it.
template <bool Fetch, int M>
MOESCOPE_INLINE inline void add_int8(const Tile& tile, int p, const Activations& a,
                                     const int64_t* row, int64_t first, int64_t last,
                                     const uint8_t* ahead, bool fresh, float* out) {
  const int64_t step = tile.panels * 64;
  const uint8_t* panel = tile.weights + p * 64;
  __m256 sums[M][2];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < 2; ++p)
      sums[m][p] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(out + m * kTile + p * 8);
  for (int64_t g = first; g < last; ++g) {
    __m256i dots[M][2];
    for (int m = 0; m < M; ++m)
      dots[m][0] = dots[m][1] = _mm256_set1_epi32(
          kInt8AsStored ? start_of_dots(kInt8.zero, a.sums[row[m] * a.groups + g]) : 0);
    const int64_t begin = g * a.group;
    const int64_t end = begin + a.group < a.columns ? begin + a.group : a.columns;
    const uint8_t* w = panel + begin / 4 * step;
    for (int64_t k = begin; k < end; k += 4, w += step, ahead += 64) {
      if (Fetch) prefetch(ahead);
      const __m256i left = load(w), right = load(w + 32);
      for (int m = 0; m < M; ++m) {
        const __m256i x = broadcast(a.values + row[m] * a.columns + k);
        dots[m][0] = dot_int8(dots[m][0], left, x);
        dots[m][1] = dot_int8(dots[m][1], right, x);
      }
    }
    for (int m = 0; m < M; ++m) {
      const __m256 scale = _mm256_set1_ps(a.scales[row[m] * a.groups + g]);
      for (int p = 0; p < 2; ++p)
        sums[m][p] = _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(dots[m][p]), sums[m][p]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < 2; ++p) _mm256_storeu_ps(out + m * kTile + p * 8, sums[m][p]);
}

template <bool Fetch, int M>
MOESCOPE_INLINE inline void add_int4(const Tile& tile, int p, const Activations& a,
                                     const int64_t* row, int64_t first, int64_t last,
                                     const uint8_t* ahead, bool fresh, float* out) {
  const int64_t step = tile.panels * 64, chunk_bytes = tile.panels * 288;
  const __m256i low = _mm256_set1_epi8(15);
  __m256 sums[M][2];
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < 2; ++p)
      sums[m][p] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(out + m * kTile + p * 8);
  for (int64_t g = first; g < last; ++g, ahead += 288) {
    const uint8_t* chunk = tile.weights + g * chunk_bytes;
    if (Fetch) prefetch(ahead + 256);
    __m256i dots[M][2];
    for (int m = 0; m < M; ++m) dots[m][0] = dots[m][1] = _mm256_setzero_si256();
    for (int s = 0; s < 4; ++s) {
      if (Fetch) prefetch(ahead + s * 64);
      for (int half = 0; half < 2; ++half) {
        const __m256i both = load(chunk + s * step + p * 64 + half * 32);
        const __m256i first_half = _mm256_and_si256(both, low);
        const __m256i second_half = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        for (int m = 0; m < M; ++m) {
          const int8_t* values = a.values + row[m] * a.columns + g * kChunk + s * 4;
          dots[m][half] = dot_int4(dots[m][half], first_half, broadcast(values));
          dots[m][half] = dot_int4(dots[m][half], second_half, broadcast(values + 16));
        }
      }
    }
    const uint8_t* scales = chunk + 4 * step + p * kPanel;
    for (int half = 0; half < 2; ++half) {
      const __m256 scale = bytes_at(scales + half * 8);
      const __m256 minimum = bytes_at(scales + tile.panels * kPanel + half * 8);
      for (int m = 0; m < M; ++m) {
        const int64_t group = row[m] * a.groups + g;
        const float size = a.scales[group];
        const float sum = size * static_cast<float>(start_of_dots(kInt4Minimum, a.sums[group]));
        sums[m][half] =
            _mm256_fmadd_ps(_mm256_mul_ps(scale, _mm256_set1_ps(size)),
                            _mm256_cvtepi32_ps(whole_int4(dots[m][half])), sums[m][half]);
        sums[m][half] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(sum), sums[m][half]);
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int p = 0; p < 2; ++p) _mm256_storeu_ps(out + m * kTile + p * 8, sums[m][p]);
}

template <bool Fetch, int M>
MOESCOPE_INLINE inline void add_bf16(const Tile& tile, int p, const Activations& a,
                                     const int64_t* row, int64_t first, int64_t last,
                                     const uint8_t* ahead, bool fresh, float* out) {
  const int64_t step = tile.panels * 64;
  const uint8_t* panel = tile.weights + p * 64;
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  __m256 sums[M][2];
  const float* x[M];
  each<M>([&](auto m) MOESCOPE_INLINE {
    x[m] = a.numbers + row[m] * a.columns;
    sums[m][0] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(out + m * kTile);
    sums[m][1] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(out + m * kTile + 8);
  });
  for (int64_t k = first; k < last; k += 2, ahead += 64) {
    if (Fetch) prefetch(ahead);
    const uint8_t* w = panel + k / 2 * step;
    const __m256i left = load(w), right = load(w + 32);
    const auto add = [&](int64_t column, __m256i low, __m256i high) MOESCOPE_INLINE {
      each<M>([&](auto m) MOESCOPE_INLINE {
        const __m256 factor = _mm256_broadcast_ss(x[m] + column);
        sums[m][0] = _mm256_fmadd_ps(factor, _mm256_castsi256_ps(low), sums[m][0]);
        sums[m][1] = _mm256_fmadd_ps(factor, _mm256_castsi256_ps(high), sums[m][1]);
      });
    };
    add(k, _mm256_slli_epi32(left, 16), _mm256_slli_epi32(right, 16));
    add(k + 1, _mm256_and_si256(left, upper), _mm256_and_si256(right, upper));
  }
  each<M>([&](auto m) MOESCOPE_INLINE {
    _mm256_storeu_ps(out + m * kTile, sums[m][0]);
    _mm256_storeu_ps(out + m * kTile + 8, sums[m][1]);
  });
}

template <int F, bool Fetch, int M>
void add(const Tile& tile, const Activations& a, const int64_t* row, int64_t first, int64_t last,
         const uint8_t* ahead, int64_t ahead_bytes, float* out) {
  for (int p = 0; p < tile.panels; ++p, ahead += ahead_bytes, out += kPanel) {
    if constexpr (kWeightFormats[F].bits == 4)
      add_int4<Fetch, M>(tile, p, a, row, first, last, ahead, first == 0, out);
    else if constexpr (kWeightFormats[F].bits == 8)
      add_int8<Fetch, M>(tile, p, a, row, first, last, ahead, first == 0, out);
    else
      add_bf16<Fetch, M>(tile, p, a, row, first, last, ahead, first == 0, out);
  }
}

template <int F, bool Fetch>
void add_rows(int count, const Tile& tile, const Activations& a, const int64_t* row, int64_t first,
              int64_t last, const uint8_t* ahead, int64_t ahead_bytes, float* out) {
  switch (count) {
    case 1: return add<F, Fetch, 1>(tile, a, row, first, last, ahead, ahead_bytes, out);
    case 2: return add<F, Fetch, 2>(tile, a, row, first, last, ahead, ahead_bytes, out);
    case 3: return add<F, Fetch, 3>(tile, a, row, first, last, ahead, ahead_bytes, out);
    default: return add<F, Fetch, 4>(tile, a, row, first, last, ahead, ahead_bytes, out);
  }
}

// Goes block by block, so that each block of weights is read from the first-level cache by all
// panels and rows but the first rows, which fetch the next block meanwhile. Parts are groups, or
// bf16's columns.
template <int F>
void multiply_parts(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                    int64_t parts, int64_t columns, float* out) {
  const int64_t step = kColumnBlock / columns;
  const int64_t part_bytes = panel_bytes(kWeightFormats[F], columns);
  for (int64_t first = 0; first < parts; first += step) {
    const int64_t last = first + step < parts ? first + step : parts;
    const uint8_t* ahead = tile.weights + (first + step) * part_bytes * tile.panels;
    if (ahead >= tile.end) ahead = tile.next;
    for (int start = 0; start < count; start += kRows) {
      const int m = count - start < kRows ? count - start : kRows;
      int64_t row[kRows];
      for (int i = 0; i < m; ++i) row[i] = rows ? rows[start + i] : start + i;
      float* to = out + start * kTile;
      if (start == 0)
        add_rows<F, true>(m, tile, a, row, first, last, ahead, step * part_bytes, to);
      else
        add_rows<F, false>(m, tile, a, row, first, last, ahead, 0, to);
    }
  }
}

template <int F>
void multiply(const Tile& tile, const Activations& a, const int32_t* rows, int count, float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  if constexpr (f.order == Order::record)
    records::multiply<F>(tile, a, rows, count, out);
  else if constexpr (is_float(f))
    multiply_parts<F>(tile, a, rows, count, a.columns, 1, out);
  else
    multiply_parts<F>(tile, a, rows, count, a.groups, a.group, out);
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

inline __m256 numbers(const float* x) { return _mm256_loadu_ps(x); }
inline __m256 numbers(const Bf16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline float number(float x) { return x; }
inline float number(Bf16 x) { return float_of_bf16(x.bits); }

template <int R, typename T>
MOESCOPE_INLINE inline void add_dots(const T* x, int64_t stride, const T* q, int64_t q_stride,
                                     int64_t width, float* out, int64_t out_stride) {
  __m256 sums[kHeads][R];
  each<kHeads>([&](auto h) MOESCOPE_INLINE {
    each<R>([&](auto r) MOESCOPE_INLINE { sums[h][r] = _mm256_setzero_ps(); });
  });
  int64_t k = 0;
  for (; k + 8 <= width; k += 8) {
    __m256 slots[R];
    each<R>([&](auto r) MOESCOPE_INLINE { slots[r] = numbers(x + r * stride + k); });
    each<kHeads>([&](auto h) MOESCOPE_INLINE {
      const __m256 query = numbers(q + h * q_stride + k);
      each<R>([&](auto r)
                  MOESCOPE_INLINE { sums[h][r] = _mm256_fmadd_ps(slots[r], query, sums[h][r]); });
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

template <typename T>
void mix(const T* x, int64_t stride, int64_t count, const float* p, int64_t p_stride, int64_t width,
         float* mixed, int64_t mixed_stride) {
  float weights[kHeads][kSlotBlock];
  for (int h = 0; h < kHeads; ++h)
    for (int64_t i = 0; i < count; ++i) {
      weights[h][i] = p[h * p_stride + i];
      if constexpr (kStep<T> == 2) weights[h][i] = float_of_bf16(bf16_of(weights[h][i]));
    }
  int64_t k = 0;
  for (; k + 8 <= width; k += 8) {
    __m256 sums[kHeads];
    for (int h = 0; h < kHeads; ++h) sums[h] = _mm256_loadu_ps(mixed + h * mixed_stride + k);
    for (int64_t i = 0; i < count; ++i) {
      const __m256 a = numbers(x + i * stride + k);
      for (int h = 0; h < kHeads; ++h)
        sums[h] = _mm256_fmadd_ps(_mm256_set1_ps(weights[h][i]), a, sums[h]);
    }
    for (int h = 0; h < kHeads; ++h) _mm256_storeu_ps(mixed + h * mixed_stride + k, sums[h]);
  }
  for (; k < width; ++k)
    for (int h = 0; h < kHeads; ++h)
      for (int64_t i = 0; i < count; ++i)
        mixed[h * mixed_stride + k] += weights[h][i] * number(x[i * stride + k]);
}

// Eight outputs' numbers of the first or second of the steps that stand together.
MOESCOPE_INLINE inline __m256 of_step(const float* steps, int half, int) {
  return _mm256_loadu_ps(steps + half * 8);
}
MOESCOPE_INLINE inline __m256 of_step(const Bf16* steps, int half, int second) {
  const __m256i pairs = load(steps + half * 16);
  return _mm256_castsi256_ps(
      second ? _mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))
             : _mm256_slli_epi32(pairs, 16));
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
      const __m256 left = of_step(steps, 0, s), right = of_step(steps, 1, s);
      each<M>([&](auto m) MOESCOPE_INLINE {
        const __m256 factor = _mm256_set1_ps(number(x[m * stride + k + s]));
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
constexpr AttentionLoops<T> kLoops = {dots<T>, mix<T>, multiply_panels<T>, store};

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
