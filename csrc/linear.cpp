#include <algorithm>
#include <atomic>

#include "ops.h"
#include "pool.h"

namespace moescope {
namespace {
std::atomic<int64_t> bytes_read{0};
}

int64_t weight_bytes_read() { return bytes_read.load(std::memory_order_relaxed); }

void count_weight_bytes(int64_t bytes) { bytes_read.fetch_add(bytes, std::memory_order_relaxed); }

void linear(const Weights& weights, const float* x, int64_t rows, const float* bias, float* out) {
  static thread_local QuantizedRows scratch;
  QuantizedRows& quantized = scratch;  // the caller's, seen by all threads
  const int64_t columns = weights.columns(), outputs = weights.outputs();
  quantized.resize(weights, rows);
  const auto quantize = [&](int64_t row) {
    quantized.set(row, 0, x + row * columns, columns, weights.padded_columns());
  };
  if (rows < threads() * 4)
    for (int64_t row = 0; row < rows; ++row) quantize(row);
  else
    parallel(rows, quantize);

  const Activations activations = quantized.view();
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  parallel(weights.tiles() * blocks, [&](int64_t task) {
    const int64_t tile = task / blocks, first = task % blocks * kRowBlock;
    const int count = static_cast<int>(std::min<int64_t>(kRowBlock, rows - first));
    int32_t index[kRowBlock];
    for (int r = 0; r < count; ++r) index[r] = static_cast<int32_t>(first + r);
    alignas(64) float product[kRowBlock * kTile];
    weights.multiply(0, tile, activations, index, count, product);
    const int64_t start = tile * kTile;
    const int64_t width = std::min<int64_t>(kTile, outputs - start);
    for (int r = 0; r < count; ++r)
      for (int64_t n = 0; n < width; ++n)
        out[(first + r) * outputs + start + n] =
            product[r * kTile + n] + (bias ? bias[start + n] : 0.0f);
  });
  count_weight_bytes(weights.matrix_bytes());
}

}  // namespace moescope
