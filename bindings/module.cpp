// The extension module dlm_fast._C: the list of ops.
#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ and CUDA kernels of dlm_fast; use them through dlm_fast.ops";
  dlm_fast::bind_build_info(m);
  dlm_fast::bind_fma_peak(m);
  dlm_fast::bind_head_inputs(m);
  dlm_fast::bind_philox(m);
  dlm_fast::bind_unmask_select(m);
  dlm_fast::bind_interval_attention(m);
  dlm_fast::bind_mask_tokens(m);
  dlm_fast::bind_token_logprob(m);
  dlm_fast::bind_token_stats(m);
  dlm_fast::bind_trace_pack(m);
  dlm_fast::bind_attention_merge(m);
  dlm_fast::bind_tree_pool(m);
  dlm_fast::bind_tree_attention(m);
  dlm_fast::bind_weighted_logprob(m);
  dlm_fast::bind_row_stats(m);
  dlm_fast::bind_select_rows(m);
  dlm_fast::bind_head_decode(m);
  dlm_fast::bind_row_draw(m);
  dlm_fast::bind_nvcc_launch(m);
  dlm_fast::bind_grad_accumulator(m);
  dlm_fast::bind_sample_grad_norm(m);
}
