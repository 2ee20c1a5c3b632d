#include "kernels_avx2.h"

namespace moescope {
const Kernels avx2_kernels = {"avx2",   quantize,      kMultiplies, swiglu,       axpy,
                              dot_rows, softmax,       greatest,    exponentials, log_sum_exp,
                              rms_norm, kLoops<float>, kLoops<Bf16>};
}  // namespace moescope
