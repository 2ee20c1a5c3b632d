// The blocks are laid out as ggml has them (ggml-common.h).

// Vectors never cross a call: everything is inlined into `quantize_row`.
#pragma GCC diagnostic ignored "-Wpsabi"

#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>
#include <vector>

#include "each.h"
#include "halves.h"
#include "pool.h"
#include "weight_format.h"

// One function for AVX2 and one for any processor, chosen when the program is loaded: too early for
// ThreadSanitizer, which is not there yet.
#if defined(MOESCOPE_X86) && defined(__gnu_linux__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define MOESCOPE_CLONES __attribute__((flatten, target_clones("avx2", "default")))
#else
#define MOESCOPE_CLONES
#endif

namespace moescope {
namespace {

// Eight numbers: a register of AVX2, two of SSE2 or NEON.
typedef float Vec __attribute__((vector_size(32)));
constexpr int kLanes = 8;
constexpr int kGroup = 32;   // weights that share a scale, but in Q6_K
constexpr int kSuper = 256;  // weights of a K-quant's block
constexpr int kRefits = 1;   // rounds of: integers for the scale, then the best scale for those

MOESCOPE_INLINE inline Vec clamp(Vec x, float low, float high) {
  const Vec lows = Vec{} + low, highs = Vec{} + high;
  x = x > lows ? x : lows;
  return x < highs ? x : highs;
}

MOESCOPE_INLINE inline float total(Vec lanes) {
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}

// 1 / x, and 0 for 0 and for what has no finite inverse.
MOESCOPE_INLINE inline float inverse(float x) {
  const float y = 1 / x;
  return std::fabs(y) <= 3e38f ? y : 0;
}

// N weights and how much each one's error counts.
template <int N>
struct Group {
  static constexpr int kVecs = N / kLanes;
  Vec x[kVecs], w[kVecs];

  MOESCOPE_INLINE Group(const float* weights, const float* importance) {
    std::memcpy(x, weights, sizeof x);
    std::memcpy(w, importance, sizeof w);
  }
  MOESCOPE_INLINE float low() const {
    return fold([](float a, float b) { return a < b ? a : b; });
  }
  MOESCOPE_INLINE float high() const {
    return fold([](float a, float b) { return a > b ? a : b; });
  }

 private:
  template <typename Pick>
  MOESCOPE_INLINE float fold(Pick pick) const {
    float picked = x[0][0];
    for (int i = 0; i < N; ++i) picked = pick(picked, x[i / kLanes][i % kLanes]);
    return picked;
  }
};

MOESCOPE_INLINE inline void put(uint8_t* out, float value) {
  const uint16_t half = to_f16(value);
  std::memcpy(out, &half, sizeof half);
}

// Levels that a quotient is rounded to.
template <int Low, int High>
struct Integers {
  template <typename T>
  MOESCOPE_INLINE static T near(T x) {
    return clamp(nearest(x), Low, High);
  }
};

// IQ4_NL's sixteen levels, closer together around zero.
struct Curve {
  static constexpr float levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                       1,    13,   25,  38,  53,  69,  89,  113};
  MOESCOPE_INLINE static Vec near(Vec x) {
    Vec level = Vec{} + levels[0];
    each<15>([&](auto i) MOESCOPE_INLINE {
      const Vec step = Vec{} + (levels[i + 1] - levels[i]);
      level += x > Vec{} + (levels[i] + levels[i + 1]) / 2 ? step : Vec{};
    });
    return level;
  }
};

// The scale of x ~ scale * level. Each of `places` is where the extreme of x is tried; with q the
// levels that result, the best scale is sum(wxq) / sum(wqq), and the error sum(wxx) less
// sum(wxq)^2 / sum(wqq).
template <typename Levels, int N, int Places>
MOESCOPE_INLINE inline float fit_scale(const Group<N>& group, const float (&places)[Places]) {
  const float low = group.low(), high = group.high();
  const float per_extreme = inverse(-low > high ? low : high);
  float best = 0, scale = 0;
  for (int at = 0; at < Places + kRefits; ++at) {
    const float per_scale = at < Places ? places[at] * per_extreme : inverse(scale);
    Vec xq{}, qq{};
    for (int i = 0; i < Group<N>::kVecs; ++i) {
      const Vec q = Levels::near(group.x[i] * per_scale), wq = group.w[i] * q;
      xq += wq * group.x[i];
      qq += wq * q;
    }
    const float explained = total(xq), square = total(qq);
    const float refit = square > 0 ? explained / square : 0;
    if (explained * refit > best) best = explained * refit, scale = refit;
  }
  return scale;
}

struct Line {
  float scale, minimum;
};

constexpr float kSteps[] = {-1.5f, -1, -0.5f, 0, 0.5f, 1, 2};  // tried: levels more than there are

// x ~ scale * q + minimum with q in [0, top]; in K-quants the minimum is at most 0.
template <int N>
MOESCOPE_INLINE inline Line fit_line(const Group<N>& group, float top, bool below_zero) {
  const float lowest = group.low(), high = group.high();
  const float low = below_zero && lowest > 0 ? 0 : lowest;
  if (!(high > low)) return {0, low};
  Vec sums[2] = {};
  for (int i = 0; i < Group<N>::kVecs; ++i)
    sums[0] += group.w[i], sums[1] += group.w[i] * group.x[i];
  const float weight = total(sums[0]), mean = total(sums[1]);
  Line best{(high - low) / top, low};
  float least = INFINITY;
  for (float step : kSteps) {
    Line line{(high - low) / (top + step), low};
    for (int round = 0; round <= kRefits; ++round) {
      const float per_scale = inverse(line.scale);
      Vec q[Group<N>::kVecs], wqs{}, qqs{}, xqs{}, errors{};
      for (int i = 0; i < Group<N>::kVecs; ++i) {
        q[i] = clamp(nearest((group.x[i] - line.minimum) * per_scale), 0, top);
        const Vec wq = group.w[i] * q[i];
        wqs += wq, qqs += wq * q[i], xqs += wq * group.x[i];
      }
      const float wq = total(wqs), qq = total(qqs), xq = total(xqs);
      const float determinant = weight * qq - wq * wq;
      if (determinant > 1e-6f * weight * qq) {
        line.scale = (weight * xq - mean * wq) / determinant;
        line.minimum = (qq * mean - wq * xq) / determinant;
      }
      if (below_zero && line.minimum > 0) line = {xq / qq, 0};
      for (int i = 0; i < Group<N>::kVecs; ++i) {
        const Vec off = q[i] * line.scale + line.minimum - group.x[i];
        errors += group.w[i] * off * off;
      }
      const float error = total(errors);
      if (error < least) least = error, best = line;
    }
  }
  return best;
}

MOESCOPE_INLINE inline void nibbles(const uint8_t* q, uint8_t* out, int half) {
  for (int i = 0; i < half; ++i)
    out[i] = static_cast<uint8_t>((q[i] & 15) | (q[i + half] & 15) << 4);
}

MOESCOPE_INLINE inline void fifth_bits(const uint8_t* q, uint8_t* out) {
  uint32_t bits = 0;
  for (int i = 0; i < kGroup; ++i) bits |= static_cast<uint32_t>(q[i] >> 4 & 1) << i;
  std::memcpy(out, &bits, sizeof bits);
}

constexpr float kPlaces4[] = {-6.6f, -6.8f, -7.0f, -7.2f, -7.4f, -7.6f,
                              -7.8f, -8.0f, -8.2f, -8.4f, -8.6f, -8.8f};
constexpr float kPlaces5[] = {-14.6f, -14.9f, -15.2f, -15.5f, -15.8f, -16.1f, -16.4f, -16.7f};
constexpr float kPlaces6[] = {-30, -30.5f, -31, -31.5f, -32, -32.5f};
constexpr float kPlaces8[] = {127};
constexpr float kPlacesCurve[] = {-151, -147, -143, -139, -135, -131, -127, -123, -119, -115, -111,
                                  -107, -103, 97,   101,  105,  109,  113,  117,  121,  125};

template <int Bits>
MOESCOPE_INLINE inline void symmetric(const float* x, const float* w, uint8_t* out) {
  constexpr int kZero = 1 << (Bits - 1);
  using Levels = Integers<-kZero, kZero - 1>;
  float scale;
  if constexpr (Bits == 4)
    scale = fit_scale<Levels, kGroup>({x, w}, kPlaces4);
  else
    scale = fit_scale<Levels, kGroup>({x, w}, kPlaces5);
  put(out, scale);
  const float per_scale = inverse(halved(scale));
  uint8_t q[kGroup];
  for (int i = 0; i < kGroup; ++i)
    q[i] = static_cast<uint8_t>(Levels::near(x[i] * per_scale) + kZero);
  if constexpr (Bits == 5) fifth_bits(q, out + 2);
  nibbles(q, out + (Bits == 5 ? 6 : 2), kGroup / 2);
}

MOESCOPE_INLINE inline void curved(const float* x, const float* w, uint8_t* out) {
  const float scale = fit_scale<Curve, kGroup>({x, w}, kPlacesCurve);
  put(out, scale);
  const float per_scale = inverse(halved(scale));
  uint8_t q[kGroup];
  for (int i = 0; i < kGroup; ++i) {
    q[i] = 0;
    for (int level = 0; level < 15; ++level)
      q[i] += x[i] * per_scale > (Curve::levels[level] + Curve::levels[level + 1]) / 2;
  }
  nibbles(q, out + 2, kGroup / 2);
}

// A power of two and e2m1 (OCP Microscaling v1.0): the power that keeps the largest magnitude below 8,
// as the standard has it, though 6 is the largest level, or twice that, where the error is less.
MOESCOPE_INLINE inline void microscaled(const float* x, const float* w, uint8_t* out) {
  const Group<kGroup> group(x, w);
  const float most = std::max(std::fabs(group.low()), std::fabs(group.high()));
  uint32_t bits;
  std::memcpy(&bits, &most, sizeof bits);
  const int exponent = static_cast<int>(bits >> 23) - 2;
  float least = INFINITY;
  for (int at = std::max(exponent, 0); at <= std::max(exponent, 0) + 1; ++at) {
    const float unit = std::ldexp(1.0f, at - 128), per_unit = inverse(unit);  // levels are doubled
    float error = 0;
    uint8_t q[kGroup];
    for (int i = 0; i < kGroup; ++i) {
      const float magnitude = std::fabs(x[i]), quotient = magnitude * per_unit;
      int level = 0;
      for (int above = 1; above < 8; ++above)
        level += 2 * quotient > static_cast<float>(kMxfp4Words[above - 1] + kMxfp4Words[above]);
      const float off = static_cast<float>(kMxfp4Words[level]) * unit - magnitude;
      error += w[i] * off * off;
      q[i] = static_cast<uint8_t>(x[i] < 0 && level ? level | 8 : level);
    }
    if (error >= least) continue;
    least = error;
    out[0] = static_cast<uint8_t>(at);
    nibbles(q, out + 1, kGroup / 2);
  }
}

MOESCOPE_INLINE inline void bytes(const float* x, const float* w, uint8_t* out) {
  using Levels = Integers<-127, 127>;
  const float scale = fit_scale<Levels, kGroup>({x, w}, kPlaces8);
  put(out, scale);
  const float per_scale = inverse(halved(scale));
  for (int i = 0; i < kGroup; ++i)
    out[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(Levels::near(x[i] * per_scale)));
}

template <int Bits>
MOESCOPE_INLINE inline void with_minimum(const float* x, const float* w, uint8_t* out) {
  constexpr float kTop = (1 << Bits) - 1;
  const Line line = fit_line<kGroup>({x, w}, kTop, false);
  put(out, line.scale);
  put(out + 2, line.minimum);
  const float per_scale = inverse(halved(line.scale)), minimum = halved(line.minimum);
  uint8_t q[kGroup];
  for (int i = 0; i < kGroup; ++i)
    q[i] = static_cast<uint8_t>(clamp(nearest((x[i] - minimum) * per_scale), 0, kTop));
  if constexpr (Bits == 5) fifth_bits(q, out + 4);
  nibbles(q, out + (Bits == 5 ? 8 : 4), kGroup / 2);
}

// Eight groups, each with a scale and a minimum of six bits; what these count in is an f16 each.
template <int Bits>
MOESCOPE_INLINE inline void k_quant(const float* x, const float* w, uint8_t* out) {
  constexpr float kTop = (1 << Bits) - 1;
  constexpr int kGroups = kSuper / kGroup;
  Line lines[kGroups];
  float scale_unit = 0, minimum_unit = 0;
  for (int g = 0; g < kGroups; ++g) {
    lines[g] = fit_line<kGroup>({x + g * kGroup, w + g * kGroup}, kTop, true);
    scale_unit = std::max(scale_unit, lines[g].scale / 63);
    minimum_unit = std::max(minimum_unit, -lines[g].minimum / 63);
  }
  float scales[kGroups], minima[kGroups], q[kSuper];
  for (int round = 0;; ++round) {
    scale_unit = halved(scale_unit), minimum_unit = halved(minimum_unit);
    const float per_scale_unit = inverse(scale_unit), per_minimum_unit = inverse(minimum_unit);
    float aa = 0, ab = 0, bb = 0, xa = 0, xb = 0;  // of x ~ scale_unit * a - minimum_unit * b
    for (int g = 0; g < kGroups; ++g) {
      const Group<kGroup> group(x + g * kGroup, w + g * kGroup);
      const float scale = clamp(nearest(lines[g].scale * per_scale_unit), 0, 63);
      const float minimum = clamp(nearest(-lines[g].minimum * per_minimum_unit), 0, 63);
      scales[g] = scale, minima[g] = minimum;
      const float per_scale = inverse(scale_unit * scale), lifted = minimum_unit * minimum;
      Vec ws{}, wxs{}, wqs{}, qqs{}, xqs{};
      for (int i = 0; i < Group<kGroup>::kVecs; ++i) {
        const Vec qs = clamp(nearest((group.x[i] + lifted) * per_scale), 0, kTop);
        const Vec wq = group.w[i] * qs;
        ws += group.w[i], wxs += group.w[i] * group.x[i];
        wqs += wq, qqs += wq * qs, xqs += wq * group.x[i];
        std::memcpy(q + g * kGroup + i * kLanes, &qs, sizeof qs);
      }
      aa += scale * scale * total(qqs);
      ab += scale * minimum * total(wqs);
      bb += minimum * minimum * total(ws);
      xa += scale * total(xqs);
      xb += minimum * total(wxs);
    }
    if (round == kRefits) break;
    const float determinant = aa * bb - ab * ab;
    if (determinant > 1e-6f * aa * bb) {
      const float a = (bb * xa - ab * xb) / determinant, b = (ab * xa - aa * xb) / determinant;
      if (a > 0 && b > 0) scale_unit = a, minimum_unit = b;
    }
  }
  put(out, scale_unit);
  put(out + 2, minimum_unit);
  uint8_t* packed = out + 4;
  for (int g = 0; g < 4; ++g) {
    const auto low = [](float value) { return static_cast<uint8_t>(value); };
    const uint8_t scale = low(scales[g + 4]), minimum = low(minima[g + 4]);
    packed[g] = static_cast<uint8_t>(low(scales[g]) | (scale >> 4) << 6);
    packed[g + 4] = static_cast<uint8_t>(low(minima[g]) | (minimum >> 4) << 6);
    packed[g + 8] = static_cast<uint8_t>((scale & 15) | (minimum & 15) << 4);
  }
  uint8_t whole[kSuper];
  for (int i = 0; i < kSuper; ++i) whole[i] = static_cast<uint8_t>(q[i]);
  packed += 12;
  if constexpr (Bits == 5) {
    for (int i = 0; i < kGroup; ++i) {
      int bits = 0;
      for (int g = 0; g < kGroups; ++g) bits |= (whole[g * kGroup + i] >> 4) << g;
      packed[i] = static_cast<uint8_t>(bits);
    }
    packed += kGroup;
  }
  for (int pair = 0; pair < kSuper; pair += 2 * kGroup)
    nibbles(whole + pair, packed + pair / 2, kGroup);
}

// Sixteen groups of 16, each with a scale of eight bits.
MOESCOPE_INLINE inline void six_bits(const float* x, const float* w, uint8_t* out) {
  constexpr int kGroups = 16, kSmall = kSuper / kGroups;
  using Levels = Integers<-32, 31>;
  float fitted[kGroups], extreme = 0;
  for (int g = 0; g < kGroups; ++g) {
    fitted[g] = fit_scale<Levels, kSmall>({x + g * kSmall, w + g * kSmall}, kPlaces6);
    if (std::fabs(fitted[g]) > std::fabs(extreme)) extreme = fitted[g];
  }
  const float unit = halved(extreme / -128), per_unit = inverse(unit);
  uint8_t q[kSuper];
  for (int g = 0; g < kGroups; ++g) {
    const float scale = clamp(nearest(fitted[g] * per_unit), -128, 127);
    out[192 + g] = static_cast<uint8_t>(static_cast<int8_t>(scale));
    const float per_scale = inverse(unit * scale);
    for (int i = 0; i < kSmall; ++i)
      q[g * kSmall + i] = static_cast<uint8_t>(Levels::near(x[g * kSmall + i] * per_scale) + 32);
  }
  put(out + 208, unit);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* from = q + 128 * half;
    for (int i = 0; i < 64; ++i)
      out[64 * half + i] = static_cast<uint8_t>((from[i] & 15) | (from[i + 64] & 15) << 4);
    for (int i = 0; i < 32; ++i)
      out[128 + 32 * half + i] =
          static_cast<uint8_t>(from[i] >> 4 | (from[i + 32] >> 4) << 2 | (from[i + 64] >> 4) << 4 |
                               (from[i + 96] >> 4) << 6);
  }
}

// How much an error in each weight of a row counts: its magnitude plus the row's root mean square.
MOESCOPE_INLINE inline void weigh(const float* x, int64_t columns, float* w) {
  float squares[kLanes] = {};
  for (int64_t i = 0; i < columns; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) squares[lane] += x[i + lane] * x[i + lane];
  float total = 0;
  for (float lane : squares) total += lane;
  const float rms = std::sqrt(total / static_cast<float>(columns));
  for (int64_t i = 0; i < columns; ++i) w[i] = std::fabs(x[i]) + rms;
}

MOESCOPE_CLONES void quantize_row(BlockType type, const float* x, int64_t columns, float* w,
                                  uint8_t* out) {
  const auto [weights, bytes_each] = shape_of(type);
  weigh(x, columns, w);
  for (int64_t at = 0; at < columns; at += weights, out += bytes_each) {
    switch (type) {
      case BlockType::q4_0: symmetric<4>(x + at, w + at, out); break;
      case BlockType::q4_1: with_minimum<4>(x + at, w + at, out); break;
      case BlockType::q5_0: symmetric<5>(x + at, w + at, out); break;
      case BlockType::q5_1: with_minimum<5>(x + at, w + at, out); break;
      case BlockType::q8_0: bytes(x + at, w + at, out); break;
      case BlockType::iq4_nl: curved(x + at, w + at, out); break;
      case BlockType::mxfp4: microscaled(x + at, w + at, out); break;
      case BlockType::q4_k: k_quant<4>(x + at, w + at, out); break;
      case BlockType::q5_k: k_quant<5>(x + at, w + at, out); break;
      case BlockType::q6_k: six_bits(x + at, w + at, out); break;
    }
  }
}

MOESCOPE_CLONES void int4_row(const float* x, int64_t columns, const float* w, Line* lines,
                              uint8_t* q, uint8_t* scales, uint8_t* minimums, float* unit) {
  constexpr float kTop = 15, kMost = 255;
  float largest = 0;  // that a unit must reach
  for (int64_t g = 0; g < columns / kGroup; ++g) {
    lines[g] = fit_line<kGroup>({x + g * kGroup, w + g * kGroup}, kTop, true);
    largest = std::max(largest, std::max(lines[g].scale, -lines[g].minimum / kInt4Minimum));
  }
  const float one = inverse(largest) > 0 ? largest / kMost : 0, per_one = inverse(one);
  const float step = one * kInt4Minimum, per_step = inverse(step);
  for (int64_t g = 0; g < columns / kGroup; ++g) {
    const Group<kGroup> group(x + g * kGroup, w + g * kGroup);
    const float scale = clamp(nearest(lines[g].scale * per_one), 0, kMost);
    float minimum = clamp(nearest(-lines[g].minimum * per_step), 0, kMost);
    const float per_scale = inverse(one * scale);
    Vec level[Group<kGroup>::kVecs];
    for (int round = 0; round <= kRefits; ++round) {
      Vec ws{}, offs{};
      for (int i = 0; i < Group<kGroup>::kVecs; ++i) {
        level[i] = clamp(nearest((group.x[i] + minimum * step) * per_scale), 0, kTop);
        ws += group.w[i], offs += group.w[i] * (level[i] * (one * scale) - group.x[i]);
      }
      if (round < kRefits)
        minimum = clamp(nearest(total(offs) * inverse(total(ws)) * per_step), 0, kMost);
    }
    scales[g] = static_cast<uint8_t>(scale), minimums[g] = static_cast<uint8_t>(minimum);
    for (int i = 0; i < kGroup; ++i)
      q[g * kGroup + i] = static_cast<uint8_t>(level[i / kLanes][i % kLanes]);
  }
  *unit = one;
}

}  // namespace

BlockType block_type_of(const std::string& name) {
  static const std::map<std::string, BlockType> kNames = {
      {"Q4_0", BlockType::q4_0},   {"Q4_1", BlockType::q4_1}, {"Q5_0", BlockType::q5_0},
      {"Q5_1", BlockType::q5_1},   {"Q8_0", BlockType::q8_0}, {"IQ4_NL", BlockType::iq4_nl},
      {"MXFP4", BlockType::mxfp4}, {"Q4_K", BlockType::q4_k}, {"Q5_K", BlockType::q5_k},
      {"Q6_K", BlockType::q6_k}};
  const auto found = kNames.find(name);
  if (found == kNames.end()) throw std::invalid_argument("there is no quantiser for " + name);
  return found->second;
}

BlockShape shape_of(BlockType type) {
  switch (type) {
    case BlockType::q4_0: return {kGroup, 18};
    case BlockType::q4_1: return {kGroup, 20};
    case BlockType::q5_0: return {kGroup, 22};
    case BlockType::q5_1: return {kGroup, 24};
    case BlockType::q8_0: return {kGroup, 34};
    case BlockType::iq4_nl: return {kGroup, 18};
    case BlockType::mxfp4: return {kGroup, 17};
    case BlockType::q4_k: return {kSuper, 144};
    case BlockType::q5_k: return {kSuper, 176};
    default: return {kSuper, 210};
  }
}

void quantize(BlockType type, const float* rows, int64_t count, int64_t columns, uint8_t* out) {
  const auto [weights, bytes_each] = shape_of(type);
  const int64_t row_bytes = columns / weights * bytes_each;
  parallel_rows(count, [&](int64_t first, int64_t last) {
    std::vector<float> importance(columns);
    for (int64_t row = first; row < last; ++row)
      quantize_row(type, rows + row * columns, columns, importance.data(), out + row * row_bytes);
  });
}

void quantize_int4(const float* row, const float* importance, int64_t columns, int64_t padded,
                   uint8_t* q, uint8_t* scales, uint8_t* minimums, float* unit) {
  std::vector<float> w(padded);
  std::vector<Line> lines(padded / kGroup);
  weigh(row, padded, w.data());
  for (int64_t k = 0; importance != nullptr && k < columns; ++k) w[k] *= importance[k];
  int4_row(row, padded, w.data(), lines.data(), q, scales, minimums, unit);
}

}  // namespace moescope
