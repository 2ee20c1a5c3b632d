// The Python module `moescope.kernels._native`: checks shapes, lets go of the interpreter's lock,
// and calls what ops.h declares. Arrays cross as DLPack, so no PyTorch is needed to build this.
#include <nanobind/stl/tuple.h>

#include <string>
#include <tuple>
#include <utility>
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
  const std::vector<float> scales(rows, scale);
  log_sums(logits.data(), rows, vocab, scales.data(), out.data());
}

// The likeliest of each row and the sums of all its tokens, as they are and times its `scale`: as
// lists, which a few numbers cross in sooner than in arrays.
std::tuple<std::vector<std::vector<int64_t>>, std::vector<std::vector<float>>, std::vector<float>,
           std::vector<float>>
apply_shortlist(const Floats<2>& logits, int64_t count, const std::vector<float>& scales) {
  const int64_t rows = logits.shape(0), vocab = logits.shape(1);
  require(count > 0 && count <= vocab && static_cast<int64_t>(scales.size()) == rows,
          "count or scales do not fit the logits");
  std::vector<int64_t> ids(rows * count);
  std::vector<float> values(rows * count), sums(rows), scaled;
  {
    nb::gil_scoped_release unlocked;
    const std::vector<float> ones(rows, 1.0f);
    likeliest(logits.data(), rows, vocab, count, ids.data(), values.data());
    log_sums(logits.data(), rows, vocab, ones.data(), sums.data());
    scaled = sums;
    if (scales != ones) log_sums(logits.data(), rows, vocab, scales.data(), scaled.data());
  }
  std::vector<std::vector<int64_t>> id_rows;
  std::vector<std::vector<float>> value_rows;
  for (int64_t first = 0; first < rows * count; first += count) {
    id_rows.emplace_back(ids.begin() + first, ids.begin() + first + count);
    value_rows.emplace_back(values.begin() + first, values.begin() + first + count);
  }
  return {std::move(id_rows), std::move(value_rows), std::move(sums), std::move(scaled)};
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
  m.def("shortlist", &apply_shortlist, "logits"_a, "count"_a, "scales"_a);
  m.def("log_sums", &apply_log_sums, "logits"_a, "scale"_a, "out"_a);
}
