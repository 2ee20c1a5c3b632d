// Packed weights for Python: laid out, taken from files, multiplied.
#include <numeric>
#include <string>
#include <utility>

#include "bindings.h"
#include "expert_memory.h"
#include "file.h"
#include "pool.h"
#include "quantize.h"
#include "settling.h"

namespace moescope {
namespace {

SharedWeights pack(const Matrices& matrices, const std::string& format,
                   const std::optional<Floats<1>>& importance) {
  const int kind = format_of(format);
  const bool bf16 = is_bf16(matrices.dtype());
  require(bf16 || matrices.dtype() == nb::dtype<float>(), "weights must be float32 or bfloat16");
  require(matrices.size() > 0, "there are no weights");
  require(matrices.shape(2) == 1 || matrices.stride(2) == 1, "columns must lie side by side");
  const int64_t count = matrices.shape(0), outputs = matrices.shape(1), columns = matrices.shape(2);
  require(!importance || has_shape(*importance, {columns}), "a column has one importance");
  const Source source{matrices.data(), bf16, matrices.stride(0), matrices.stride(1),
                      importance ? importance->data() : nullptr};
  nb::gil_scoped_release unlocked;
  return std::make_shared<Weights>(kind, count, outputs, columns, source);
}

void quantize_blocks(const Floats<2>& rows, const std::string& name,
                     const nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& out) {
  const BlockType type = block_type_of(name);
  const auto [weights, bytes] = shape_of(type);
  const int64_t count = rows.shape(0), columns = rows.shape(1);
  require(columns % weights == 0, "rows must be whole blocks");
  require(has_shape(out, {count, columns / weights * bytes}), "out has another size");
  nb::gil_scoped_release unlocked;
  quantize(type, rows.data(), count, columns, out.data());
}

SharedWeights pack_blocks(const Bytes& blocks, const std::string& type, int64_t matrices,
                          int64_t outputs, int64_t columns) {
  const GgufType& of = gguf_type(type);
  const int64_t of_row = (columns + of.columns - 1) / of.columns;
  require(matrices > 0 && outputs > 0 && columns > 0 &&
              (columns % of.columns == 0 || of.read == nullptr) &&
              static_cast<int64_t>(blocks.size()) == matrices * outputs * of_row * of.bytes,
          "blocks of this shape are not of this size");
  nb::gil_scoped_release unlocked;
  return std::make_shared<Weights>(of, matrices, outputs, columns, blocks.data());
}

SharedWeights empty_weights(const std::string& format, int64_t matrices, int64_t outputs,
                            int64_t columns) {
  require(matrices > 0 && outputs > 0 && columns > 0, "there are no weights");
  return std::make_shared<Weights>(format_of(format), matrices, outputs, columns);
}

uint64_t checksum_of(const Bytes& data) {
  nb::gil_scoped_release unlocked;
  return checksum(data.data(), data.size());
}

// Weights of a shape, for so many bytes of a file.
SharedWeights unfilled(int kind, uint64_t bytes, int64_t matrices, int64_t outputs,
                       int64_t columns) {
  require(matrices > 0 && outputs > 0 && columns > 0, "there are no weights");
  auto weights = std::make_shared<Weights>(kind, matrices, outputs, columns);
  require(weights->stored().size() == bytes, "weights of this shape are not of this size");
  return weights;
}

std::pair<SharedWeights, uint64_t> read_weights(int descriptor, uint64_t offset, uint64_t bytes,
                                                const std::string& format, int64_t matrices,
                                                int64_t outputs, int64_t columns) {
  const int kind = format_of(format);
  nb::gil_scoped_release unlocked;
  const SharedWeights weights = unfilled(kind, bytes, matrices, outputs, columns);
  Buffer& stored = weights->stored();
  stored.fill(descriptor, offset);
  settle_later(weights);
  return {weights, checksum(stored.data(), bytes)};
}

// Experts' matrices that stay in their file until a token visits them.
SharedWeights stream_weights(int descriptor, uint64_t offset, uint64_t bytes,
                             const std::string& format, int64_t matrices, int64_t outputs,
                             int64_t columns) {
  const int kind = format_of(format);
  nb::gil_scoped_release unlocked;
  const SharedWeights weights = unfilled(kind, bytes, matrices, outputs, columns);
  Buffer& stored = weights->stored();
  if (!stored.stream(descriptor, offset, matrices * weights->matrix_bytes()))
    stored.fill(descriptor, offset);
  return weights;
}

// A view, which keeps the weights alive.
nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>> stored_bytes(const SharedWeights& weights) {
  const Buffer& stored = weights->stored();
  return {stored.data(), {stored.size()}, nb::cast(weights)};
}

void unpack(const Weights& weights, const Output<3>& out) {
  require(has_shape(out, {weights.matrices(), weights.outputs(), weights.columns()}),
          "out has another shape than the weights");
  weights.unpack(out.data());
}

void apply_linear(const Weights& weights, const FloatRows& x, const std::optional<Floats<1>>& bias,
                  const OutputRows& out) {
  const int64_t rows = rows_of(x);
  const int64_t outputs = weights.matrices() * weights.outputs();
  require(width_of(x) == weights.columns() && width_of(out) == outputs && rows_of(out) == rows &&
              (!bias || has_shape(*bias, {outputs})),
          "x, bias or out do not fit the weights");
  nb::gil_scoped_release unlocked;
  linear(weights, x.data(), rows, bias ? bias->data() : nullptr, out.data());
}

void take_rows(const Weights& weights, const Ids<1>& ids, const Output<2>& out) {
  require(weights.matrices() == 1 &&
              has_shape(out, {static_cast<int64_t>(ids.shape(0)), weights.columns()}),
          "out does not fit the weights");
  for (size_t at = 0; at < ids.shape(0); ++at)
    require(ids.data()[at] >= 0 && ids.data()[at] < weights.outputs(), "there is no such row");
  nb::gil_scoped_release unlocked;
  parallel_rows(static_cast<int64_t>(ids.shape(0)), [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at)
      weights.take_row(ids.data()[at], out.data() + at * weights.columns());
  });
}

}  // namespace

void bind_weights(nb::module_& m) {
  m.def("weight_bytes_read", &weight_bytes_read);
  nb::class_<Weights>(m, "Weights")
      .def_prop_ro("matrix_bytes", &Weights::matrix_bytes)
      .def_prop_ro("format", [](const Weights& weights) { return weights.format().name; })
      .def("rows", &take_rows, "ids"_a, "out"_a)
      .def("put", &Weights::put, "matrix"_a, "one"_a)
      .def_prop_ro("stored", &stored_bytes)
      .def("__deepcopy__", &same)
      .def("unpack", &unpack, "out"_a)
      .def("linear", &apply_linear, "x"_a, "bias"_a.none(), "out"_a);
  m.def("pack", &pack, "matrices"_a, "format"_a, "importance"_a.none());
  m.def("quantize_blocks", &quantize_blocks, "rows"_a, "type"_a, "out"_a);
  m.def("pack_blocks", &pack_blocks, "blocks"_a, "type"_a, "matrices"_a, "outputs"_a, "columns"_a);
  m.def("empty_weights", &empty_weights, "format"_a, "matrices"_a, "outputs"_a, "columns"_a);
  m.def("layout", &Weights::layout);
  m.def("checksum", &checksum_of, "data"_a);
  m.def("read_weights", &read_weights, "descriptor"_a, "offset"_a, "bytes"_a, "format"_a,
        "matrices"_a, "outputs"_a, "columns"_a);
  m.def("stream_weights", &stream_weights, "descriptor"_a, "offset"_a, "bytes"_a, "format"_a,
        "matrices"_a, "outputs"_a, "columns"_a);
  m.def("limit_experts", [](int64_t bytes) { expert_memory().limit(bytes); }, "bytes"_a);
  m.def("expert_counts", [] {
    const ExpertCounts counts = expert_memory().counts();
    return std::vector<int64_t>{counts.visits, counts.hits, counts.bytes_read, counts.held,
                                counts.limit};
  });
  m.def("settle", &settle);
  m.def("unsettled", &unsettled);
}

}  // namespace moescope
