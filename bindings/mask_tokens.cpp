// Bindings of the Monte-Carlo masks: the CPU backend and the launch plan.
#include "dlm_fast/mask_tokens.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings.h"
#include "cuda/mask_tokens_plan.h"
#include "dlm_fast/check.h"
#include "launch.h"

namespace py = pybind11;

namespace dlm_fast {
namespace {

cpu::MaskShape mask_shape(int64_t sequences, int64_t num_samples, int64_t first, int64_t count,
                          int64_t draw, bool paired) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  DLM_CHECK(sequences >= 0, "mask_tokens: the number of sequences must not be negative");
  DLM_CHECK(num_samples >= 1 && num_samples < kLimit, "mask_tokens: num_samples must be 1..2^31-1");
  DLM_CHECK(first >= 0 && count >= 0 && first + count <= num_samples,
            "mask_tokens: samples must lie in 0..num_samples");
  DLM_CHECK(draw >= 0 && draw < 2 * kLimit, "mask_tokens: draw must fit 32 bits");
  return {sequences, num_samples, first, count, static_cast<uint32_t>(draw), paired};
}

}  // namespace

void bind_mask_tokens(py::module_& m) {
  m.def("mask_counts_cpu", [](int64_t sequences, int64_t num_samples, int64_t first, int64_t count,
                              int64_t draw, bool paired, int sampler, double min_t, uintptr_t keys,
                              uintptr_t num_maskable, uintptr_t quadrature, uintptr_t counts,
                              uintptr_t weights, int threads) {
    const cpu::MaskShape shape = mask_shape(sequences, num_samples, first, count, draw, paired);
    DLM_CHECK(sampler >= 0 && sampler <= static_cast<int>(cpu::MaskSampler::kQuadT),
              "mask_tokens: no such sampler");
    py::gil_scoped_release release;
    cpu::mask_counts(shape, static_cast<cpu::MaskSampler>(sampler), min_t,
                     pointer<const int64_t>(keys), pointer<const int64_t>(num_maskable),
                     pointer<const double>(quadrature), pointer<int32_t>(counts),
                     pointer<float>(weights), threads);
  });
  m.def("mask_fill_cpu", [](int64_t sequences, int64_t num_samples, int64_t first, int64_t count,
                            int64_t draw, bool paired, int64_t mask_id, int64_t num_masked,
                            uintptr_t keys, uintptr_t start, uintptr_t token_ids,
                            uintptr_t maskable, uintptr_t counts, uintptr_t noisy_ids,
                            uintptr_t rows, uintptr_t targets, int threads) {
    const cpu::MaskShape shape = mask_shape(sequences, num_samples, first, count, draw, paired);
    py::gil_scoped_release release;
    cpu::mask_fill(shape, mask_id, num_masked, pointer<const int64_t>(keys),
                   pointer<const int64_t>(start), pointer<const int64_t>(token_ids),
                   pointer<const bool>(maskable), pointer<const int32_t>(counts),
                   pointer<int64_t>(noisy_ids), pointer<int32_t>(rows), pointer<int64_t>(targets),
                   threads);
  });
  // inputs: keys, start, first_row, token_ids, maskable; outputs: noisy_ids, rows, targets
  m.def("plan_mask_fill", [](int64_t sequences, int64_t num_samples, int64_t first, int64_t count,
                             int64_t draw, bool paired, int64_t mask_id,
                             std::array<uintptr_t, 5> inputs, std::array<uintptr_t, 3> outputs) {
    const cpu::MaskShape shape = mask_shape(sequences, num_samples, first, count, draw, paired);
    cuda::MaskFillParams params{};
    params.copies = static_cast<int>(shape.count);
    params.first = static_cast<unsigned>(shape.first);
    params.draw = shape.draw;
    params.paired = shape.paired;
    params.mask_id = mask_id;
    params.keys = pointer<const device::Index>(inputs[0]);
    params.start = pointer<const device::Index>(inputs[1]);
    params.first_row = pointer<const device::Index>(inputs[2]);
    params.token_ids = pointer<const device::Index>(inputs[3]);
    params.maskable = pointer<const bool>(inputs[4]);
    params.noisy_ids = pointer<device::Index>(outputs[0]);
    params.rows = pointer<int>(outputs[1]);
    params.targets = pointer<device::Index>(outputs[2]);
    return to_python(cuda::plan_mask_fill(params, shape.sequences));
  });
}

}  // namespace dlm_fast
