// What every instruction set provides: the innermost loops, behind one table of functions.
//
// The files that implement it (kernels_*.cpp) are compiled with flags of their own and must not
// use inline functions of the standard library: the linker keeps one copy of those for all files,
// and it could be one that this processor cannot run.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "weight_format.h"

namespace moescope {

constexpr int kRowBlock = 96;       // rows at a time, so that their results stay in the cache
constexpr int64_t kSlotBlock = 64;  // slots at a time, so that all heads find them in the cache
constexpr int kHeads = 4;           // heads that attention's loops take at once, but for AMX's
constexpr int kMostHeads = 16;      // that any take
constexpr int64_t kQueryStep = 32;  // a query's room is a multiple of this

// Where a dot product starts so that it ends as if the weights had been stored without their zero
// point; wraps where infinities, whose integers mean nothing, overflow it.
static constexpr int32_t start_of_dots(int zero, int32_t sum) {
  return static_cast<int32_t>(0 - static_cast<uint32_t>(zero) * static_cast<uint32_t>(sum));
}

// Rows of activations in int8, symmetric, with one scale a group of columns, whose integers' sum is
// kept too. Weights in floating point take `numbers`, which are not rounded, and nothing else.
struct Activations {
  const int8_t* values;  // (rows, columns)
  const float* scales;   // (rows, groups)
  const int32_t* sums;   // (rows, groups)
  const float* numbers;  // (rows, columns)
  int64_t columns;       // padded
  int64_t group;         // columns that share a scale
  int64_t groups;
};

// The weights of one tile: `panels` panels of 16 outputs over all columns.
//   Order::record: [columns / 256][panels] records (weight_format.h).
//   Order::tile: int8: [columns / 4][panels][16 outputs][4 columns] bytes; `row_scales` are
//                (panels * 16).
//                int4: for each 32 columns, [4][panels][16 outputs][4 columns] bytes, whose low
//                nibbles are the first 16 columns and whose high nibbles the others; then
//                [panels][16] bytes of scales and [panels][16] bytes of minimums, of which one
//                counts eight times as much as one of a scale; `row_scales` as for int8.
//                bf16: [columns / 2][panels][16 outputs][2 columns].
struct Tile {
  const uint8_t* weights;
  const float* row_scales;
  int panels;
  const uint8_t* end;   // of the weights
  const uint8_t* next;  // what will be read after them
};

// out (count, kTile) = activations[rows] times the tile's weights; `rows` null means 0, 1, 2 ...
using Multiply = void (*)(const Tile&, const Activations&, const int32_t* rows, int count,
                          float* out);

struct Multiplies {
  Multiply of[kFormats];
};

struct Bf16 {
  uint16_t bits;
};

// Numbers that stand together for each output in a matrix in panels.
template <typename T>
constexpr int kStep = sizeof(float) / sizeof(T);

// The loops of attention over what a cache holds: float32, or bf16, to which queries and
// probabilities are then rounded too. All sums are float32.
template <typename T>
struct AttentionLoops {
  int heads;  // that `dots` and `mix` take at once
  // Lays a head's query of `n` numbers beside the others' as `dots` wants them, for each of which there
  // is room for `stride` numbers.
  void (*put_query)(const float* query, int64_t n, int64_t head, T* queries, int64_t stride);
  // out[h * out_stride + i] += dot(x_i, q_h) for `heads` heads and `count` rows of `width`, at most
  // kSlotBlock. Meanwhile rows from `ahead` on are fetched, `fetched` (0, 1, 2 or 4) for every four.
  void (*dots)(const T* x, int64_t stride, int64_t count, const T* queries, int64_t q_stride,
               int64_t width, const T* ahead, int fetched, float* out, int64_t out_stride);
  // mix_h += sum_i p[h * p_stride + i] * x_i for `heads` heads, of `count` rows, at most kSlotBlock
  void (*mix)(const T* x, int64_t stride, int64_t count, const float* p, int64_t p_stride,
              int64_t width, float* mixed, int64_t mixed_stride);
  // out (count, panels * 16) = x (count, depth) times a matrix whose columns stand in panels of 16,
  // plus what it holds if `add`: [panels][depth / kStep][16][kStep], `panel_stride` numbers from
  // panel to panel.
  void (*multiply)(const T* x, int64_t stride, int count, const T* matrix, int64_t panel_stride,
                   int64_t depth, int panels, bool add, float* out, int64_t out_stride);
  // out = x, to nearest, ties to even
  void (*store)(const float* x, int64_t n, T* out);
};

// `put_query` for loops that want a row a head.
template <typename T, void (*Store)(const float* x, int64_t n, T* out)>
static void put_row(const float* query, int64_t n, int64_t head, T* queries, int64_t stride) {
  Store(query, n, queries + head * stride);
}

struct Kernels {
  const char* name;
  // Round one row `x` (columns) to int8; padding becomes zero.
  void (*quantize)(const float* x, int64_t columns, int64_t padded, int64_t group, int8_t* values,
                   float* scales, int32_t* sums);
  Multiplies multiply;
  // gate = silu(gate) * up
  void (*swiglu)(float* gate, const float* up, int64_t n);
  // y += a * x
  void (*axpy)(float a, const float* x, float* y, int64_t n);
  // out[i] = dot(x_i, q) for `count` rows of `width`, one behind the other
  void (*dot_rows)(const float* x, int64_t count, const float* q, int64_t width, float* out);
  // x = softmax(scale * x)
  void (*softmax)(float* x, float scale, int64_t n);
  float (*greatest)(const float* x, int64_t n);
  // x = exp(scale * (x - largest)); returns their sum
  float (*exponentials)(float* x, float scale, float largest, int64_t n);
  // log(sum(exp(scale * x)))
  float (*log_sum_exp)(const float* x, float scale, int64_t n);
  // out = x / sqrt(mean(x^2) + eps) * weight
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  AttentionLoops<float> attend_floats;
  AttentionLoops<Bf16> attend_bf16;
};

template <typename T>
const AttentionLoops<T>& attention_loops(const Kernels& set) {
  if constexpr (sizeof(T) == sizeof(Bf16))
    return set.attend_bf16;
  else
    return set.attend_floats;
}

extern const Kernels portable_kernels;
#ifdef MOESCOPE_X86
// How a processor best gets ahead of what single tokens read, each weight once.
enum class ReadAhead { by_itself, into_second_level, past_caches };
extern const ReadAhead read_ahead;
extern const Kernels avx2_kernels, avxvnni_kernels, avx512_kernels;
extern const AttentionLoops<Bf16> avx512bf16_loops;
// AMX takes the place of AVX-512 where it is faster.
void use_tiles(Multiplies& products);
void use_tiles(AttentionLoops<Bf16>& loops);
#endif

// The sets that this processor runs, the best first.
std::vector<const Kernels*> available_kernels();

// The set in use: the best one, or the one that MOESCOPE_ISA or `use_kernels` names. Throws
// std::invalid_argument where that name is unknown or the processor lacks it.
const Kernels& kernels();
void use_kernels(const std::string& name);

}  // namespace moescope
