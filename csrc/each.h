// Loops over registers.
#pragma once

#define MOESCOPE_INLINE __attribute__((always_inline))

namespace moescope {
namespace {

template <int I>
struct Index {
  MOESCOPE_INLINE constexpr operator int() const { return I; }
};

template <int I, int N, typename Body>
MOESCOPE_INLINE inline void each_from(Body body) {
  if constexpr (I < N) {
    body(Index<I>{});
    each_from<I + 1, N>(body);
  }
}

// body(0), body(1) ... body(N - 1), with constants: a loop that is unrolled later would leave the
// arrays that it indexes in memory.
template <int N, typename Body>
MOESCOPE_INLINE inline void each(Body body) {
  each_from<0, N>(body);
}

// body(n) with a constant, for an `n` that is one of `Known`.
template <int... Known, typename Body>
MOESCOPE_INLINE inline void with_constant(int n, Body body) {
  (void)((n == Known && (body(Index<Known>{}), true)) || ...);
}

}  // namespace
}  // namespace moescope
