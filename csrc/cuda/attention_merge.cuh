// Merges attention states by log-sum-exp: a warp takes one head of one row, its lanes the numbers.
// Traffic: every state is read once, every output written once. Sums are float, in the order of the
// states.
#pragma once

#include "common/real_math.h"
#include "cuda/attention_merge_params.h"
#include "cuda/device/kernel_list.cuh"
#include "cuda/device/numbers.cuh"
#include "cuda/device/warp.cuh"

namespace dlm_fast::device {

using cuda::AttentionMergeParams;

template <typename Element>
DLM_DEVICE void attention_merge(const AttentionMergeParams& params) {
  const int head = static_cast<int>(block_y() * (thread_count() / kWarp) + thread_index() / kWarp);
  if (head >= params.heads) return;
  const int begin = params.indptr[block_x()], end = params.indptr[block_x() + 1];
  const float* lse = params.state_lse + head;
  const float nothing = -infinity();
  float max = nothing;
  for (int s = begin; s < end; ++s) {
    const float one = lse[Index{s} * params.heads];
    if (one > max || one != one) max = one;  // NaN stays: an empty row must not hide it
  }
  const bool any = max != nothing;
  float total = 0;
  for (int s = begin; s < end && any; ++s) total += exp_of(lse[Index{s} * params.heads] - max);
  const Index row = params.places ? params.places[block_x()] : static_cast<int>(block_x());
  const Index place = row * params.heads + head;
  Element* out = static_cast<Element*>(params.out) + place * params.width;
  for (int d = static_cast<int>(lane_index()); d < params.width; d += static_cast<int>(kWarp)) {
    float sum = 0;
    for (int s = begin; s < end && any; ++s) {
      const Index state = Index{s} * params.heads + head;
      const float one = params.state_lse[state];
      // the output of an empty state may hold anything
      if (one != nothing)
        sum = multiply_add(exp_of(one - max), params.states[state * params.width + d], sum);
    }
    store_number(out + d, any ? sum / total : 0.0f);
  }
  if (lane_index() == 0) params.lse[place] = any ? max + log_of(total) : nothing;
}

}  // namespace dlm_fast::device

#define DLM_MERGE_KERNEL DLM_KERNEL(dlm_fast::cuda::kMergeThreads)
#define DLM_KERNELS(KERNEL)                                                                       \
  KERNEL(DLM_MERGE_KERNEL, attention_merge_f32, AttentionMergeParams, attention_merge<float>)     \
  KERNEL(DLM_MERGE_KERNEL, attention_merge_bf16, AttentionMergeParams, attention_merge<BFloat16>) \
  KERNEL(DLM_MERGE_KERNEL, attention_merge_f16, AttentionMergeParams, attention_merge<Float16>)

DLM_KERNELS(DLM_DEFINE_KERNEL)
