// What the bindings share: arrays as they cross, and checks of their shapes.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <initializer_list>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "ops.h"

namespace moescope {

namespace nb = nanobind;
using namespace nb::literals;

template <int Dimensions>
using Floats = nb::ndarray<const float, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <int Dimensions>
using Output = nb::ndarray<float, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <int Dimensions>
using Ids = nb::ndarray<const int64_t, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <int Dimensions>
using MutableIds = nb::ndarray<int64_t, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
// Rows of any number of axes, whose last is their width.
using FloatRows = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using OutputRows = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using CacheArray = nb::ndarray<nb::ndim<3>, nb::device::cpu>;  // bf16 or float32
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using MutableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrices = nb::ndarray<nb::ro, nb::ndim<3>, nb::device::cpu>;
using SharedWeights = std::shared_ptr<Weights>;

inline void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

template <typename Array>
bool has_shape(const Array& array, std::initializer_list<int64_t> shape) {
  size_t axis = 0;
  for (int64_t size : shape)
    if (static_cast<int64_t>(array.shape(axis++)) != size) return false;
  return true;
}

inline bool is_bf16(const nb::dlpack::dtype& type) {
  return type.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat) && type.bits == 16;
}

template <typename Array>
int64_t width_of(const Array& rows) {
  require(rows.ndim() > 0, "a number is no row");
  return static_cast<int64_t>(rows.shape(rows.ndim() - 1));
}

template <typename Array>
int64_t rows_of(const Array& rows) {
  int64_t count = 1;
  for (size_t axis = 0; axis + 1 < rows.ndim(); ++axis) count *= rows.shape(axis);
  return count;
}

// Weights never change, so that a copy of a network shares them.
inline nb::object same(nb::object self, nb::handle) { return self; }

template <typename Array>
std::vector<float> copied(const std::optional<Array>& array) {
  if (!array) return {};
  return {array->data(), array->data() + array->size()};
}

inline Norm norm_of(const std::optional<Floats<1>>& weight, float eps) {
  return {copied(weight), eps};
}

inline Slots slots_of(const CacheArray& array) {
  const bool bf16 = is_bf16(array.dtype());
  require(bf16 || array.dtype() == nb::dtype<float>(), "a cache holds bf16 or float32");
  return {array.data(),
          bf16,
          array.stride(0),
          array.stride(1),
          static_cast<int64_t>(array.shape(2)),
          static_cast<int64_t>(array.shape(1))};
}

// Each adds its part to the module.
void bind_weights(nb::module_& m);
void bind_attention(nb::module_& m);
void bind_layers(nb::module_& m);

}  // namespace moescope
