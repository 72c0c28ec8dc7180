// Token and statistics of rows of logits, one block per row.
//
// Traffic: a row is read once; with filters about twelve times, from L2, and eight times more where
// equal logits stand at both filters' edges. Numerics: statistics and masses in float, sums of
// masses as integers.
#pragma once

#include "cuda/device/kernel_list.cuh"
#include "cuda/device/row_select.cuh"

namespace dlm_fast::device {

struct RowDrawScratch {
  SoftmaxState states[cuda::kRowDrawThreads / kWarp];
  Candidate candidates[cuda::kRowDrawThreads / kWarp];
};

// Of the target, by the thread that asks; NaN where there is none.
DLM_DEVICE float target_z(const DrawRow& row, Index target) {
  if (target < 0 || target >= row.params.rows.vocabulary) return nan_of<float>();
  const int lane = static_cast<int>(target % kNoiseColumns);
  float z[kNoiseColumns];
  row.read(static_cast<int>(target) - lane, z);
  return z[lane];
}

template <bool kFiltered>
DLM_DEVICE void row_draw(const RowDrawParams& params) {
  const TokenRows& rows = params.rows;
  const int number = static_cast<int>(block_x());
  if (source_of(rows, number) < 0) {
    if (thread_index() == 0) write_no_row(rows, number, 0.0f);
    return;
  }
  auto& scratch = *reinterpret_cast<RowDrawScratch*>(shared_bytes());
  const DrawRow row(params);
  const bool draws = rows.keys != nullptr;
  const RowNoise noise = draws ? noise_of(rows, number) : RowNoise{};
  SoftmaxStateOf<float> mine;
  Candidate best = no_candidate();
  row.visit_fours([&](int first, const float (&z)[kNoiseColumns]) {
    for (int i = 0; i < kNoiseColumns; ++i) add_column<float, true>(mine, z[i], first + i);
    if (!kFiltered && draws) best = race(best, noise, rows.draw_inverse, first, z);
  });
  const SoftmaxState state = merge_block(widened(mine), scratch.states);
  if (kFiltered) {
    auto& select_scratch = *reinterpret_cast<SelectScratch*>(shared_bytes() + sizeof(scratch));
    const Cut cut = filters_cut(row, select_scratch, static_cast<float>(state.max));
    row.visit_fours([&](int first, float (&z)[kNoiseColumns]) {
      bool any = false;
      for (int i = 0; i < kNoiseColumns; ++i) {
        const bool keeps = is_kept(cut, z[i], first + i);
        if (!keeps) z[i] = -infinity_of<float>();
        any = any || keeps;
      }
      if (any) best = race(best, noise, rows.draw_inverse, first, z);
    });
  }
  best = best_of_block(best, scratch.candidates);
  if (thread_index() == 0)
    write_token(rows, number, state, best, target_z(row, target_of(rows, number)));
}

}  // namespace dlm_fast::device

#define DLM_DRAW_KERNEL DLM_LARGE_KERNEL(dlm_fast::cuda::kRowDrawThreads)
#define DLM_KERNELS(KERNEL)                                             \
  KERNEL(DLM_DRAW_KERNEL, row_draw_all, RowDrawParams, row_draw<false>) \
  KERNEL(DLM_DRAW_KERNEL, row_draw_filtered, RowDrawParams, row_draw<true>)

DLM_KERNELS(DLM_DEFINE_KERNEL)
