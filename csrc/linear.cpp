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

void multiply_all(const std::vector<Product>& products, const Activations& activations,
                  int64_t rows) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  std::vector<int64_t> first_task(1, 0);
  for (const Product& product : products) {
    const Weights& weights = *product.weights;
    first_task.push_back(first_task.back() + weights.matrices() * weights.tiles() * blocks);
    count_weight_bytes(weights.matrices() * weights.matrix_bytes());
  }
  parallel(first_task.back(), [&](int64_t task) {
    size_t which = 0;
    while (task >= first_task[which + 1]) ++which;
    const Product& product = products[which];
    task -= first_task[which];
    const Weights& weights = *product.weights;
    const int64_t matrix = task / blocks / weights.tiles(), tile = task / blocks % weights.tiles();
    const int64_t first = task % blocks * kRowBlock;
    const int count = static_cast<int>(std::min<int64_t>(kRowBlock, rows - first));
    int32_t index[kRowBlock];
    for (int r = 0; r < count; ++r) index[r] = static_cast<int32_t>(first + r);
    alignas(64) float result[kRowBlock * kTile];
    weights.multiply(matrix, tile, activations, index, count, result);
    const int64_t width = std::min<int64_t>(kTile, weights.outputs() - tile * kTile);
    const int64_t outputs = weights.matrices() * weights.outputs();
    const int64_t start = matrix * weights.outputs() + tile * kTile;
    for (int r = 0; r < count; ++r) {
      float* to = product.out + (first + r) * outputs + start;
      const float* from = result + r * kTile;
      for (int64_t n = 0; n < width; ++n) {
        const float value = product.bias ? from[n] + product.bias[start + n] : from[n];
        to[n] = product.add ? to[n] + value : value;
      }
    }
  });
}

void linear(const Weights& weights, const float* x, int64_t rows, const float* bias, float* out) {
  static thread_local QuantizedRows scratch;
  QuantizedRows& quantized = scratch;  // the caller's, seen by all threads
  const int64_t columns = weights.columns();
  quantized.resize(weights, rows);
  parallel_rows(rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) quantized.set_row(row, x + row * columns);
  });
  multiply_all({{&weights, bias, out}}, quantized.view(), rows);
}

}  // namespace moescope
