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

void multiply_all(const std::vector<Product>& products, const QuantizedRows& activations,
                  int64_t rows) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  std::vector<int64_t> first_task(1, 0);
  for (const Product& product : products) {
    const Weights& weights = *product.weights;
    first_task.push_back(first_task.back() + weights.matrices() * weights.tiles() * blocks);
    count_weight_bytes(weights.matrices() * weights.matrix_bytes());
  }
  struct Place {
    const Product* product;
    int64_t matrix, tile, first_row;
  };
  const auto place_of = [&](int64_t task) -> Place {
    size_t which = 0;
    while (task >= first_task[which + 1]) ++which;
    const int64_t part = (task - first_task[which]) / blocks;
    const int64_t tiles = products[which].weights->tiles();
    return {&products[which], part / tiles, part % tiles, task % blocks * kRowBlock};
  };
  // A thread mostly goes on with the task behind.
  const auto next_after = [&](int64_t task) -> const uint8_t* {
    ++task;
    if (task >= first_task.back()) return nullptr;
    const Place place = place_of(task);
    return place.product->weights->start(place.matrix, place.tile);
  };
  parallel(first_task.back(), [&](int64_t task) {
    const auto [product_at, matrix, tile, first] = place_of(task);
    const Product& product = *product_at;
    const Weights& weights = *product.weights;
    const int count = static_cast<int>(std::min<int64_t>(kRowBlock, rows - first));
    int32_t index[kRowBlock];
    for (int r = 0; r < count; ++r) index[r] = static_cast<int32_t>(first + r);
    alignas(64) float result[kRowBlock * kTile];
    weights.multiply(matrix, tile, activations, index, count, result, next_after(task));
    const int64_t width = std::min<int64_t>(kTile, weights.outputs() - tile * kTile);
    const int64_t outputs = weights.matrices() * weights.outputs();
    const int64_t start = matrix * weights.outputs() + tile * kTile;
    for (int r = 0; r < count; ++r) {
      float* to = product.out + (first + r) * outputs + start;
      const float* from = result + r * kTile;
      for (int64_t n = 0; n < width; ++n) {
        const float value = product.bias ? from[n] + product.bias[start + n] : from[n];
        to[n] = product.add ? to[n] + product.factor * value : product.factor * value;
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
  multiply_all({{&weights, bias, out}}, quantized, rows);
}

}  // namespace moescope
