#include "kernels_avx2.h"

namespace moescope {
const Kernels avx2_kernels = {"avx2",       quantize,    kMultiplies, swiglu,          axpy,
                              dots,         dot_rows,    mix,         multiply_floats, softmax,
                              exponentials, log_sum_exp, rms_norm};
}  // namespace moescope
