// The Python module `moescope.kernels._native`: checks shapes, lets go of the interpreter's lock,
// and calls what ops.h declares. Arrays cross as DLPack, so no PyTorch is needed to build this.
#include <string>
#include <vector>

#include "bindings.h"
#include "pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace moescope;

namespace {

void apply_likeliest(const Floats<2>& logits, const MutableIds<2>& ids, const Output<2>& values) {
  const int64_t rows = logits.shape(0), vocab = logits.shape(1), count = ids.shape(1);
  require(has_shape(ids, {rows, count}) && has_shape(values, {rows, count}) && count > 0 &&
              count <= vocab,
          "ids or values do not fit the logits");
  nb::gil_scoped_release unlocked;
  likeliest(logits.data(), rows, vocab, count, ids.data(), values.data());
}

void apply_log_sums(const Floats<2>& logits, float scale, const Output<1>& out) {
  const int64_t rows = logits.shape(0), vocab = logits.shape(1);
  require(has_shape(out, {rows}) && vocab > 0, "out does not fit the logits");
  nb::gil_scoped_release unlocked;
  log_sums(logits.data(), rows, vocab, scale, out.data());
}

void apply_rms_norm(const FloatRows& x, const Floats<1>& weight, float eps, const OutputRows& out) {
  const int64_t rows = rows_of(x), width = width_of(x);
  require(has_shape(weight, {width}) && width_of(out) == width && rows_of(out) == rows && width > 0,
          "weight or out do not fit x");
  nb::gil_scoped_release unlocked;
  parallel_rows(rows, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      kernels().rms_norm(x.data() + row * width, weight.data(), eps, width,
                         out.data() + row * width);
  });
}

}  // namespace

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a model that a script holds to its end is no leak

  bind_weights(m);
  bind_attention(m);
  bind_layers(m);

  m.def("instruction_set", [] { return kernels().name; });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const Kernels* set : available_kernels()) names.push_back(set->name);
    return names;
  });
  m.def("use_instruction_set", &use_kernels, "name"_a);
  m.def("threads", &threads);
  m.def("set_threads", &set_threads, "count"_a);
  m.def("rms_norm", &apply_rms_norm, "x"_a, "weight"_a, "eps"_a, "out"_a);
  nb::class_<ReadProbe>(m, "ReadProbe")
      .def(
          "__init__",
          [](ReadProbe* self, int64_t size, bool huge_pages) {
            require(size > 0, "the size must be positive");
            new (self) ReadProbe(size, huge_pages ? Pages::huge : Pages::small);
          },
          "bytes"_a, "huge_pages"_a)
      .def("read", &ReadProbe::read, nb::call_guard<nb::gil_scoped_release>());
  m.def("likeliest", &apply_likeliest, "logits"_a, "ids"_a, "values"_a);
  m.def("log_sums", &apply_log_sums, "logits"_a, "scale"_a, "out"_a);
}
