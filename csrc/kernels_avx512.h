// What the sets of AVX-512 share.
#pragma once
#include <immintrin.h>

#include "each.h"

namespace moescope {
namespace {

// Lane i holds the sum of all lanes of v[i].
inline __m512 sums_of(const __m512 (&v)[16]) {
  __m512 pairs[8], fours[4];
  each<8>([&](auto i) MOESCOPE_INLINE {
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                             _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  });
  each<4>([&](auto i) MOESCOPE_INLINE {
    const __m512d low = _mm512_castps_pd(pairs[2 * i]), high = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  });
  const auto join = [](__m512 a, __m512 b) MOESCOPE_INLINE {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  return join(join(fours[0], fours[1]), join(fours[2], fours[3]));
}

}  // namespace
}  // namespace moescope
