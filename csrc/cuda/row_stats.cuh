// Statistics of rows of logits and their gradient, one block per row; a row is read from memory
// twice where both are wanted.
#pragma once

#include "cuda/device/kernel_list.cuh"
#include "cuda/device/row.cuh"

namespace dlm_fast::device {

constexpr unsigned kRowThreads = 256;

template <typename Real>
DLM_DEVICE SoftmaxStateOf<Real>* state_scratch() {
  return reinterpret_cast<SoftmaxStateOf<Real>*>(shared_bytes());
}

template <typename Real, bool kTop>
DLM_DEVICE void row_stats(const RowStatsParams& params) {
  const int row = static_cast<int>(block_x());
  const RowSlice<Real> slice = slice_of<Real>(params, row, 0, params.vocabulary);
  const SoftmaxStateOf<Real> state =
      merge_block(thread_state<Real, kTop>(slice), state_scratch<Real>());
  const Index target = target_of(params, row);
  if (thread_index() == 0)
    write_stats(params, row, target, target_logit<Real>(params, row, target), state);
}

// With statistics of an earlier pass.
template <typename Real, typename Stored>
DLM_DEVICE void row_grad(const RowGradParams& params) {
  const int row = static_cast<int>(block_x());
  const RowSlice<Real> slice = slice_of<Real>(params.row, row, 0, params.row.vocabulary);
  const Index target = target_of(params.row, row);
  write_grad<Real, Stored>(params, slice, row, target,
                           static_cast<const Real*>(params.row.row_max)[row],
                           static_cast<const Real*>(params.row.log_sum)[row],
                           static_cast<const Real*>(params.row.entropy)[row]);
  clear_hidden<Real, Stored>(params, row, target, 0, 1);
}

// Statistics, and the gradient for cotangents known before.
template <typename Real, typename Stored>
DLM_DEVICE void row_step(const RowGradParams& params) {
  const int row = static_cast<int>(block_x());
  const RowSlice<Real> slice = slice_of<Real>(params.row, row, 0, params.row.vocabulary);
  const SoftmaxStateOf<Real> state =
      merge_block(thread_state<Real, false>(slice), state_scratch<Real>());
  const Index target = target_of(params.row, row);
  const Real target_z = target_logit<Real>(params.row, row, target);
  // In place, the gradient overwrites the logits: the target's is read before.
  sync_block();
  if (thread_index() == 0) write_stats(params.row, row, target, target_z, state);
  const SoftmaxSummaryOf<Real> summary = summarise(state);
  write_grad<Real, Stored>(params, slice, row, target, state.max, summary.log_sum, summary.entropy);
  clear_hidden<Real, Stored>(params, row, target, 0, 1);
}

}  // namespace dlm_fast::device

#define DLM_ROW_KERNEL DLM_KERNEL(dlm_fast::device::kRowThreads)
#define DLM_KERNELS(KERNEL)                                                           \
  KERNEL(DLM_ROW_KERNEL, row_stats_f32, RowStatsParams, row_stats<float, false>)      \
  KERNEL(DLM_ROW_KERNEL, row_stats_top_f32, RowStatsParams, row_stats<float, true>)   \
  KERNEL(DLM_ROW_KERNEL, row_stats_f64, RowStatsParams, row_stats<double, false>)     \
  KERNEL(DLM_ROW_KERNEL, row_stats_top_f64, RowStatsParams, row_stats<double, true>)  \
  KERNEL(DLM_ROW_KERNEL, row_grad_f32_f32, RowGradParams, row_grad<float, float>)     \
  KERNEL(DLM_ROW_KERNEL, row_grad_f32_bf16, RowGradParams, row_grad<float, BFloat16>) \
  KERNEL(DLM_ROW_KERNEL, row_grad_f32_f16, RowGradParams, row_grad<float, Float16>)   \
  KERNEL(DLM_ROW_KERNEL, row_grad_f64_f64, RowGradParams, row_grad<double, double>)   \
  KERNEL(DLM_ROW_KERNEL, row_step_f32_f32, RowGradParams, row_step<float, float>)     \
  KERNEL(DLM_ROW_KERNEL, row_step_f32_bf16, RowGradParams, row_step<float, BFloat16>) \
  KERNEL(DLM_ROW_KERNEL, row_step_f32_f16, RowGradParams, row_step<float, Float16>)   \
  KERNEL(DLM_ROW_KERNEL, row_step_f64_f64, RowGradParams, row_step<double, double>)

DLM_KERNELS(DLM_DEFINE_KERNEL)
