// The loops in plain C++: right on any processor, and what the others are read against.
#include <math.h>
#include <string.h>

#include <utility>

#include "isa.h"
#include "records.h"

namespace moescope {
namespace {

constexpr WeightFormat kInt8 = kWeightFormats[format_named("int8")];

void quantize(const float* x, int64_t columns, int64_t padded, int64_t group, int8_t* values,
              float* scales, int32_t* sums) {
  for (int64_t start = 0, g = 0; start < padded; start += group, ++g) {
    const int64_t end = start + group < padded ? start + group : padded;
    const int64_t filled = end < columns ? end : columns;
    float largest = 0;
    for (int64_t k = start; k < filled; ++k) largest = fmaxf(largest, fabsf(x[k]));
    const float inverse = largest > 0 ? 127 / largest : 0;
    uint32_t sum = 0;
    for (int64_t k = start; k < end; ++k) {
      const float scaled = k < filled ? x[k] * inverse : 0;
      const int rounded = fabsf(scaled) < 128 ? static_cast<int>(rintf(scaled)) : 0;  // no NaN
      values[k] = static_cast<int8_t>(rounded);
      sum += static_cast<uint32_t>(rounded);
    }
    scales[g] = largest / 127;
    sums[g] = static_cast<int32_t>(sum);
  }
}

void multiply_int8(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                   float* out) {
  const int width = tile.panels * kPanel;
  for (int r = 0; r < count; ++r) {
    const int64_t row = rows ? rows[r] : r;
    float* sums = out + r * kTile;
    memset(sums, 0, kTile * sizeof(float));
    for (int64_t g = 0; g < a.groups; ++g) {
      int32_t dots[kTile];
      for (int n = 0; n < width; ++n)
        dots[n] = start_of_dots(kInt8.zero, a.sums[row * a.groups + g]);
      const int64_t start = g * a.group;
      const int64_t end = start + a.group < a.columns ? start + a.group : a.columns;
      for (int64_t k = start; k < end; k += 4) {
        const int8_t* x = a.values + row * a.columns + k;
        const uint8_t* w = tile.weights + k * width;
        for (int n = 0; n < width; ++n)
          dots[n] +=
              w[4 * n] * x[0] + w[4 * n + 1] * x[1] + w[4 * n + 2] * x[2] + w[4 * n + 3] * x[3];
      }
      const float scale = a.scales[row * a.groups + g];
      for (int n = 0; n < width; ++n) sums[n] += scale * static_cast<float>(dots[n]);
    }
    for (int n = 0; n < width; ++n) sums[n] *= tile.row_scales[n];
  }
}

void multiply_int4(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                   float* out) {
  const int width = tile.panels * kPanel;
  const int64_t chunk_bytes = width * (kChunk / 2 + 2);
  for (int r = 0; r < count; ++r) {
    const int64_t row = rows ? rows[r] : r;
    float* sums = out + r * kTile;
    memset(sums, 0, kTile * sizeof(float));
    for (int64_t g = 0; g < a.groups; ++g) {
      int32_t dots[kTile];
      memset(dots, 0, sizeof dots);
      const uint8_t* chunk = tile.weights + g * chunk_bytes;
      for (int step = 0; step < 4; ++step) {
        const int8_t* x = a.values + row * a.columns + g * kChunk + step * 4;
        const uint8_t* w = chunk + step * width * 4;
        for (int n = 0; n < width; ++n)
          for (int j = 0; j < 4; ++j)
            dots[n] += (w[4 * n + j] & 15) * x[j] + (w[4 * n + j] >> 4) * x[16 + j];
      }
      const float scale = a.scales[row * a.groups + g];
      const int32_t offset = start_of_dots(kInt4Minimum, a.sums[row * a.groups + g]);
      const float sum = scale * static_cast<float>(offset);
      const uint8_t *scales = chunk + width * 16, *minimums = scales + width;
      for (int n = 0; n < width; ++n)
        sums[n] += scale * static_cast<float>(scales[n]) * static_cast<float>(dots[n]) +
                   sum * static_cast<float>(minimums[n]);
    }
    for (int n = 0; n < width; ++n) sums[n] *= tile.row_scales[n];
  }
}

void multiply_bf16(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                   float* out) {
  const int width = tile.panels * kPanel;
  for (int r = 0; r < count; ++r) {
    const float* x = a.numbers + (rows ? rows[r] : r) * a.columns;
    float* sums = out + r * kTile;
    memset(sums, 0, kTile * sizeof(float));
    for (int64_t k = 0; k < a.columns; k += 2)
      for (int n = 0; n < width; ++n) {
        uint16_t pair[2];
        memcpy(pair, tile.weights + (k / 2 * width + n) * 4, sizeof pair);
        sums[n] += float_of_bf16(pair[0]) * x[k] + float_of_bf16(pair[1]) * x[k + 1];
      }
  }
}

// Values of a record, integers without their zero: [columns / 4][16 outputs][4 columns].
template <int F>
void spread(const uint8_t* record, int64_t columns, int16_t* values) {
  static constexpr WeightFormat f = kWeightFormats[F];
  for (int64_t k = 0; k < columns; k += 4, values += 4 * kPanel) {
    const uint8_t* chunk = record + k / kChunk * chunk_bytes(f);
    const int step = static_cast<int>(k % kChunk / 4);
    const uint8_t* low = chunk + (f.bits == 8 ? step : step % 4) * 64;
    const int shift = f.bits == 8 || step < 4 ? 0 : 4, mask = f.bits == 8 ? 255 : 15;
    for (int i = 0; i < 4 * kPanel; ++i) values[i] = static_cast<int16_t>(low[i] >> shift & mask);
    if constexpr (f.bits > 4 && f.bits < 8) {
      constexpr int kUpper = f.bits - 4, kPerByte = 8 / kUpper;
      for (int half = 0; half < 2; ++half) {
        const uint8_t* upper = chunk + upper_at(half, kUpper) + step / kPerByte * 32;
        for (int i = 0; i < 32; ++i)
          values[half * 32 + i] = static_cast<int16_t>(
              values[half * 32 + i] | (upper[i] >> step % kPerByte * kUpper & ((1 << kUpper) - 1))
                                          << 4);
      }
    }
    for (int i = 0; i < 4 * kPanel; ++i) values[i] = static_cast<int16_t>(integer_of(f, values[i]));
  }
}

// Adds one row's products with the columns of a record.
template <int F>
void add_integers(const uint8_t* record, const int16_t* values, int64_t columns,
                  const Activations& a, int64_t row, int64_t first_column, float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  for (int64_t g = 0; g < columns / f.group; ++g) {
    int32_t dots[kPanel] = {};
    for (int64_t k = g * f.group; k < (g + 1) * f.group; k += 4) {
      const int8_t* x = a.values + row * a.columns + first_column + k;
      const int16_t* w = values + k * kPanel;
      for (int n = 0; n < kPanel; ++n)
        dots[n] +=
            w[4 * n] * x[0] + w[4 * n + 1] * x[1] + w[4 * n + 2] * x[2] + w[4 * n + 3] * x[3];
    }
    const int64_t at = row * a.groups + first_column / f.group + g;
    for (int n = 0; n < kPanel; ++n)
      out[n] +=
          a.scales[at] * (scale_of(f, record, columns, g, n) * static_cast<float>(dots[n]) +
                          minimum_of(f, record, columns, g, n) * static_cast<float>(a.sums[at]));
  }
}

template <int F>
void add_floats(const uint8_t* record, int64_t columns, const float* x, float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  for (int64_t first = 0; first < columns; first += kFloatGroup) {
    const int64_t last = first + kFloatGroup < columns ? first + kFloatGroup : columns;
    float sums[kPanel] = {};
    for (int64_t k = first; k < last; ++k)
      for (int n = 0; n < kPanel; ++n) sums[n] += float_at(f, record, k, n) * x[k];
    for (int n = 0; n < kPanel; ++n)
      out[n] += sums[n] * float_scale_of(f, record, columns, first / kFloatGroup, n);
  }
}

template <int F>
void multiply_records(const Tile& tile, const Activations& a, const int32_t* rows, int count,
                      float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  memset(out, 0, count * kTile * sizeof(float));
  for (int64_t first = 0; first < a.columns; first += kRecord) {
    const int64_t columns = a.columns - first < kRecord ? a.columns - first : kRecord;
    const uint8_t* record = tile.weights + panel_bytes(f, first) * tile.panels;
    for (int p = 0; p < tile.panels; ++p, record += panel_bytes(f, columns)) {
      int16_t values[kRecord * kPanel];
      if constexpr (!is_float(f)) spread<F>(record, columns, values);
      for (int r = 0; r < count; ++r) {
        const int64_t row = rows ? rows[r] : r;
        float* to = out + r * kTile + p * kPanel;
        if constexpr (is_float(f))
          add_floats<F>(record, columns, a.numbers + row * a.columns + first, to);
        else
          add_integers<F>(record, values, columns, a, row, first, to);
      }
    }
  }
}

template <int F>
void multiply(const Tile& tile, const Activations& a, const int32_t* rows, int count, float* out) {
  static constexpr WeightFormat f = kWeightFormats[F];
  if constexpr (f.order == Order::record)
    multiply_records<F>(tile, a, rows, count, out);
  else if constexpr (f.bits == 8)
    multiply_int8(tile, a, rows, count, out);
  else if constexpr (f.bits == 4)
    multiply_int4(tile, a, rows, count, out);
  else
    multiply_bf16(tile, a, rows, count, out);
}

template <int... F>
constexpr Multiplies multiplies(std::integer_sequence<int, F...>) {
  return {{multiply<F>...}};
}
constexpr Multiplies kMultiplies = multiplies(std::make_integer_sequence<int, kFormats>{});

void swiglu(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1 + expf(-gate[i])) * up[i];
}

void axpy(float a, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

void dot_rows(const float* x, int64_t count, const float* q, int64_t width, float* out) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0;
    for (int64_t k = 0; k < width; ++k) sum += x[i * width + k] * q[k];
    out[i] = sum;
  }
}

inline float number(float x) { return x; }
inline float number(Bf16 x) { return float_of_bf16(x.bits); }

template <typename T>
void dots(const T* x, int64_t stride, int64_t count, const T* q, int64_t q_stride, int64_t width,
          const T*, int, float* out, int64_t out_stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int h = 0; h < kHeads; ++h) {
      float sum = 0;
      for (int64_t k = 0; k < width; ++k)
        sum += number(x[i * stride + k]) * number(q[h * q_stride + k]);
      out[h * out_stride + i] += sum;
    }
}

template <typename T>
void mix(const T* x, int64_t stride, int64_t count, const float* p, int64_t p_stride, int64_t width,
         float* mixed, int64_t mixed_stride) {
  for (int64_t i = 0; i < count; ++i)
    for (int h = 0; h < kHeads; ++h) {
      float weight = p[h * p_stride + i];
      if constexpr (kStep<T> == 2) weight = float_of_bf16(bf16_of(weight));
      for (int64_t k = 0; k < width; ++k)
        mixed[h * mixed_stride + k] += weight * number(x[i * stride + k]);
    }
}

template <typename T>
void multiply_panels(const T* x, int64_t stride, int count, const T* matrix, int64_t panel_stride,
                     int64_t depth, int panels, bool add, float* out, int64_t out_stride) {
  for (int r = 0; r < count; ++r)
    for (int p = 0; p < panels; ++p) {
      float sums[kPanel] = {}, *to = out + r * out_stride + p * kPanel;
      if (add) memcpy(sums, to, sizeof sums);
      for (int64_t k = 0; k < depth; ++k) {
        const T* from = matrix + p * panel_stride + k / kStep<T> * (kPanel * kStep<T>)+k % kStep<T>;
        for (int n = 0; n < kPanel; ++n)
          sums[n] += number(x[r * stride + k]) * number(from[n * kStep<T>]);
      }
      memcpy(to, sums, sizeof sums);
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
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] = expf(scale * (x[i] - largest));
  return sum;
}

float greatest(const float* x, int64_t n) {
  float most = x[0];
  for (int64_t i = 1; i < n; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

void softmax(float* x, float scale, int64_t n) {
  const float sum = exponentials(x, scale, greatest(x, n), n);
  for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

float log_sum_exp(const float* x, float scale, int64_t n) {
  const float largest = greatest(x, n);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += expf(scale * (x[i] - largest));
  return scale * largest + logf(sum);
}

void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
  const float factor = 1 / sqrtf(sum / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

}  // namespace

const Kernels portable_kernels = {"portable", quantize,      kMultiplies, swiglu,       axpy,
                                  dot_rows,   softmax,       greatest,    exponentials, log_sum_exp,
                                  rms_norm,   kLoops<float>, kLoops<Bf16>};

}  // namespace moescope
