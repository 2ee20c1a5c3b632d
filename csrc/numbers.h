// Small loops over float32 numbers that any compiler makes vectors of.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace moescope {

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Makes room for `size` numbers; what a kernel's scratch holds is kept from call to call.
template <typename T>
void grow(std::vector<T>& held, int64_t size) {
  if (static_cast<int64_t>(held.size()) < size) held.resize(size);
}

// `size` zeros that begin where a line of the cache does.
inline float* zeros(std::vector<float>& held, int64_t size) {
  constexpr uintptr_t kLine = 64;
  held.assign(size + kLine / sizeof(float), 0.0f);
  const uintptr_t start = reinterpret_cast<uintptr_t>(held.data());
  return held.data() + (kLine - start % kLine) % kLine / sizeof(float);
}

inline float largest(const float* x, int64_t n) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes], most = -std::numeric_limits<float>::infinity();
  std::fill_n(lanes, kLanes, most);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane)
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  for (float lane : lanes) most = std::max(most, lane);
  for (; i < n; ++i) most = std::max(most, x[i]);
  return most;
}

}  // namespace moescope
