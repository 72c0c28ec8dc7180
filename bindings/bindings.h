// One bind function per op; each adds the op's entry points to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace dlm_fast {

void bind_build_info(pybind11::module_& m);
void bind_fma_peak(pybind11::module_& m);
void bind_head_decode(pybind11::module_& m);
void bind_head_inputs(pybind11::module_& m);
void bind_nvcc_launch(pybind11::module_& m);
void bind_philox(pybind11::module_& m);
void bind_row_draw(pybind11::module_& m);
void bind_row_stats(pybind11::module_& m);
void bind_select_rows(pybind11::module_& m);
void bind_unmask_select(pybind11::module_& m);
void bind_interval_attention(pybind11::module_& m);
void bind_mask_tokens(pybind11::module_& m);
void bind_token_logprob(pybind11::module_& m);
void bind_trace_pack(pybind11::module_& m);
void bind_attention_merge(pybind11::module_& m);
void bind_tree_attention(pybind11::module_& m);
void bind_tree_pool(pybind11::module_& m);
void bind_token_stats(pybind11::module_& m);
void bind_weighted_logprob(pybind11::module_& m);
void bind_grad_accumulator(pybind11::module_& m);
void bind_sample_grad_norm(pybind11::module_& m);

// Tensors cross the boundary as addresses: the extension knows neither torch nor its ABI.
template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace dlm_fast
