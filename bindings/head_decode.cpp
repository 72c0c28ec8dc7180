// Launch plans of the small-N head kernel, and the rows whose tokens it chooses.
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "bindings.h"
#include "cuda/head_decode_plan.h"
#include "dlm_fast/check.h"
#include "launch.h"
#include "token_rows.h"

namespace py = pybind11;

namespace dlm_fast {
namespace {

using Address = uintptr_t;

// TokenRows((rows N, vocabulary V), temperature, (bias, rows, targets), skip_ignored,
//           (forbidden, their number), (keys, position, step), draw, draw_temperature, outputs)
//   temperature       of all outputs: z = (logit + bias) / temperature
//   bias              float32 [V]; rows int32 [N]; NaN comes out for one outside;
//                     targets int64 [N], -100: logprob 0 (with skip_ignored: no row)
//   forbidden         int64, sorted, different, on the device
//   keys              int64 [N]; 0: argmax. position, step int32 [N]; 0: zeros
//   draw_temperature  of the draw, on top of temperature; not read without keys
//   outputs           token int64 [N], then float32 [N]: confidence, lse, entropy, margin, logprob,
//                     row_max, log_sum; 0 leaves one out
// All addresses may be 0 but are read at the launch: the tensors must live until it is over.
BoundTokenRows token_rows(std::pair<int, int> sizes, double temperature,
                          std::array<Address, 3> inputs, bool skip_ignored,
                          std::pair<Address, int> forbidden, std::array<Address, 3> rng,
                          int64_t draw, double draw_temperature, std::array<Address, 8> outputs) {
  DLM_CHECK(temperature > 0, "TokenRows: temperature must be above 0");
  DLM_CHECK(draw >= 0 && draw < (int64_t{1} << 32), "TokenRows: draw must fit 32 bits");
  const double inverse = 1.0 / temperature;
  cuda::TokenRows rows = {};
  rows.count = sizes.first;
  rows.vocabulary = sizes.second;
  rows.bias = pointer<const float>(inputs[0]);
  rows.rows = pointer<const int>(inputs[1]);
  rows.targets = pointer<const device::Index>(inputs[2]);
  rows.skip_ignored = skip_ignored;
  rows.inverse = static_cast<float>(inverse);
  rows.inverse_low = static_cast<float>(inverse - static_cast<double>(rows.inverse));
  rows.forbidden = pointer<const device::Index>(forbidden.first);
  rows.num_forbidden = forbidden.second;
  rows.keys = pointer<const device::Wide>(rng[0]);
  rows.position = pointer<const int>(rng[1]);
  rows.step = pointer<const int>(rng[2]);
  rows.draw = static_cast<unsigned>(draw);
  rows.draw_inverse = rows.keys ? static_cast<float>(1.0 / draw_temperature) : 0.0f;
  rows.token = pointer<device::Index>(outputs[0]);
  float** const numbers[] = {&rows.confidence, &rows.lse,     &rows.entropy, &rows.margin,
                             &rows.logprob,    &rows.row_max, &rows.log_sum};
  for (size_t i = 0; i < 7; ++i) *numbers[i] = pointer<float>(outputs[i + 1]);
  return {rows};
}

// plan_head_decode(token_rows, dtype, (hidden, stride, T), (weight, stride), D,
//                  (partials, target_logit), (multiprocessors, shared bytes of a block))
//   -> [plan of the pass over the head, plan of the merge], to be launched in this order
//   dtype         of hidden [T, D] and weight [V, D], row strides in elements, any alignment
//   partials      head_decode_workspace_bytes(N, V) bytes, aligned to 16; target_logit float32 [N]
// N is at most head_decode_max_rows.
py::list plan_head_decode(const BoundTokenRows& bound, int dtype,
                          std::tuple<Address, int64_t, int> hidden,
                          std::pair<Address, int64_t> weight, int width,
                          std::pair<Address, Address> workspace, std::pair<int, int64_t> device) {
  cuda::HeadDecodeParams params = {};
  params.rows = bound.rows;
  params.hidden = pointer<const void>(std::get<0>(hidden));
  params.hidden_stride = std::get<1>(hidden);
  params.hidden_rows = std::get<2>(hidden);
  params.weight = pointer<const void>(weight.first);
  params.weight_stride = weight.second;
  params.width = width;
  params.partials = pointer<cuda::DecodePartial>(workspace.first);
  params.target_logit = pointer<float>(workspace.second);
  py::list plans;
  for (const cuda::Launch& launch :
       cuda::plan_head_decode(params, static_cast<Dtype>(dtype), {device.first, device.second}))
    plans.append(to_python(launch));
  return plans;
}

}  // namespace

void bind_head_decode(py::module_& m) {
  py::class_<BoundTokenRows>(m, "TokenRows").def(py::init(&token_rows));
  m.attr("head_decode_max_rows") = cuda::kDecodeRows;
  m.def("head_decode_workspace_bytes", &cuda::head_decode_workspace_bytes);
  m.def("plan_head_decode", &plan_head_decode);
}

}  // namespace dlm_fast
