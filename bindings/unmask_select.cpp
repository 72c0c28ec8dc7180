// Bindings of the unmasking rules: the CPU backend and the launch plan.
#include "dlm_fast/unmask_select.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "cuda/unmask_select_plan.h"
#include "dlm_fast/check.h"
#include "launch.h"

namespace py = pybind11;

namespace dlm_fast {
namespace {

void check_call(int64_t rows, int64_t length, int rule, int64_t draw) {
  DLM_CHECK(rows >= 0 && length >= 0 && length < (int64_t{1} << 31) - 4,
            "unmask_select: rows and length must not be negative, nor length reach 2^31");
  DLM_CHECK(rule >= 0 && rule <= static_cast<int>(UnmaskRule::kSequential),
            "unmask_select: no such rule");
  DLM_CHECK(draw >= 0 && draw < (int64_t{1} << 32), "unmask_select: draw must fit 32 bits");
}

template <typename Score>
void bind_for(py::module_& m, const char* name) {
  m.def(name, [](int64_t rows, int64_t length, int rule, int64_t draw, uintptr_t score,
                 uintptr_t selectable, uintptr_t quota, uintptr_t bound, uintptr_t uncertainty,
                 uintptr_t keys, uintptr_t position, uintptr_t step, uintptr_t selected,
                 int threads) {
    check_call(rows, length, rule, draw);
    py::gil_scoped_release release;
    cpu::unmask_select<Score>(
        {rows, length, static_cast<UnmaskRule>(rule), static_cast<uint32_t>(draw)},
        pointer<const Score>(score), pointer<const bool>(selectable), pointer<const int32_t>(quota),
        pointer<const Score>(bound), pointer<const Score>(uncertainty),
        pointer<const int64_t>(keys), pointer<const int32_t>(position),
        pointer<const int32_t>(step), pointer<bool>(selected), threads);
  });
}

}  // namespace

void bind_unmask_select(py::module_& m) {
  bind_for<float>(m, "unmask_select_cpu");
  bind_for<double>(m, "unmask_select_f64_cpu");
  m.def("unmask_select_capacity", &cuda::unmask_select_capacity);
  // inputs: score, selectable, quota, bound, uncertainty, keys, position, step; outputs: order,
  // selected
  m.def("plan_unmask_select",
        [](int64_t rows, int64_t length, int rule, int64_t draw, bool wide,
           std::array<uintptr_t, 8> inputs, std::array<uintptr_t, 2> outputs) {
          check_call(rows, length, rule, draw);
          DLM_CHECK(rows < int64_t{1} << 31, "unmask_select: rows must stay below 2^31");
          cuda::UnmaskSelectParams params{};
          params.length = static_cast<int>(length);
          params.rule = static_cast<UnmaskRule>(rule);
          params.draw = static_cast<unsigned>(draw);
          params.score = pointer<const void>(inputs[0]);
          params.selectable = pointer<const bool>(inputs[1]);
          params.quota = pointer<const int>(inputs[2]);
          params.bound = pointer<const void>(inputs[3]);
          params.uncertainty = pointer<const void>(inputs[4]);
          params.keys = pointer<const device::Index>(inputs[5]);
          params.position = pointer<const int>(inputs[6]);
          params.step = pointer<const int>(inputs[7]);
          params.order = pointer<unsigned>(outputs[0]);
          params.selected = pointer<bool>(outputs[1]);
          return to_python(cuda::plan_unmask_select(params, static_cast<int>(rows), wide));
        });
}

}  // namespace dlm_fast
