// Bindings of attention under intervals and its gradient.
#include "dlm_fast/interval_attention.h"

#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bindings.h"

namespace py = pybind11;

namespace dlm_fast {

namespace {

// Address, elements between rows, elements between heads.
using BoundRows = std::tuple<uintptr_t, int64_t, int64_t>;

AttentionRows rows_at(const BoundRows& rows) {
  return {pointer<const void>(std::get<0>(rows)), std::get<1>(rows), std::get<2>(rows)};
}

// sizes: query rows, keys, query heads, key heads, width
IntervalAttentionInputs inputs_at(const std::array<int64_t, 5>& sizes, int dtype,
                                  const std::array<BoundRows, 3>& qkv, uintptr_t intervals,
                                  double scale, int threads) {
  return {sizes[0],        sizes[1],
          sizes[2],        sizes[3],
          sizes[4],        static_cast<Dtype>(dtype),
          rows_at(qkv[0]), rows_at(qkv[1]),
          rows_at(qkv[2]), pointer<const int32_t>(intervals),
          scale,           threads};
}

}  // namespace

void bind_interval_attention(py::module_& m) {
  py::class_<IntervalAttentionInputs>(m, "IntervalAttentionInputs").def(py::init(&inputs_at));
  m.def("interval_attention_cpu",
        [](const IntervalAttentionInputs& inputs, uintptr_t out, uintptr_t lse) {
          py::gil_scoped_release release;
          cpu::interval_attention(inputs, pointer<void>(out), pointer<void>(lse));
        });
  // results: out and its cotangent; scalars: lse and its cotangent, or 0
  m.def("interval_attention_bwd_cpu", [](const IntervalAttentionInputs& inputs,
                                         const std::array<BoundRows, 2>& results,
                                         std::array<uintptr_t, 2> scalars,
                                         std::array<uintptr_t, 3> gradients) {
    py::gil_scoped_release release;
    cpu::interval_attention_bwd(
        inputs,
        {rows_at(results[0]), rows_at(results[1]), pointer<const void>(scalars[0]),
         pointer<const void>(scalars[1])},
        {pointer<void>(gradients[0]), pointer<void>(gradients[1]), pointer<void>(gradients[2])});
  });
}

}  // namespace dlm_fast
