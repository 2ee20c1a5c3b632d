// What the sets of AVX-512 with bf16 share.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "each.h"

namespace moescope {
namespace {

MOESCOPE_INLINE inline __mmask16 first_floats(int64_t n) {
  return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1 << n) - 1);
}

// 32 numbers of which the first `n` are there, rounded.
MOESCOPE_INLINE inline __m512i rounded(const float* x, int64_t n) {
  const __m512 low = _mm512_maskz_loadu_ps(first_floats(n), x);
  const __m512 high = _mm512_maskz_loadu_ps(first_floats(n - 16), x + 16);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

}  // namespace
}  // namespace moescope
