#include "kernels_avx2.h"

namespace moescope {
const Kernels avxvnni_kernels = {"avxvnni", quantize, multiply<false>, multiply<true>, swiglu,
                                 axpy,      dots,     dot_rows,        mix,            softmax, rms_norm};
}  // namespace moescope
