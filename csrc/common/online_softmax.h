// One-pass softmax statistics of a row: partial states, their merge, the finished numbers.
// Compiles under NVRTC.
#pragma once

#include "common/real_math.h"

namespace dlm_fast {

// State of the columns seen so far. A column of minus infinity adds nothing; NaN ends up in sum.
template <typename Real>
struct SoftmaxStateOf {
  Real max = -infinity_of<Real>();
  Real sum = 0;                        // of e^(z - max)
  Real weighted = 0;                   // of e^(z - max) * (z - max)
  Real second = -infinity_of<Real>();  // second largest z
  long long index = -1;                // of max, the lowest on ties
};

using SoftmaxState = SoftmaxStateOf<double>;

// Scales the sums of a state to another maximum. Without a column there is nothing to scale, and
// 0 * (-inf) would turn it into NaN.
template <typename Real>
DLM_HOST_DEVICE inline void rescale(SoftmaxStateOf<Real>& state, Real max) {
  if (state.sum == 0 || state.max == max) return;
  const Real shift = state.max - max;
  const Real ratio = exp_of(shift);
  state.weighted = ratio * (state.weighted + state.sum * shift);
  state.sum *= ratio;
}

// Of the two maxima; -1 stands for no column.
template <typename Real>
DLM_HOST_DEVICE inline long long merged_index(const SoftmaxStateOf<Real>& left,
                                              const SoftmaxStateOf<Real>& right) {
  if (left.index < 0 || right.max > left.max) return right.index;
  if (right.index < 0 || left.max > right.max) return left.index;
  return smaller_of(left.index, right.index);
}

// The order of merging is part of the result.
template <typename Real>
DLM_HOST_DEVICE inline SoftmaxStateOf<Real> merge(SoftmaxStateOf<Real> left,
                                                  SoftmaxStateOf<Real> right) {
  SoftmaxStateOf<Real> merged;
  merged.max = larger_of(left.max, right.max);
  merged.index = merged_index(left, right);
  merged.second = larger_of(smaller_of(left.max, right.max), larger_of(left.second, right.second));
  rescale(left, merged.max);
  rescale(right, merged.max);
  merged.sum = left.sum + right.sum;
  merged.weighted = left.weighted + right.weighted;
  return merged;
}

// These forms avoid the cancellation of lse - sum p z.
template <typename Real>
struct SoftmaxSummaryOf {
  Real log_sum;  // lse - max
  Real lse;
  Real entropy;
  Real confidence;  // of the largest logit
  Real margin;
};

using SoftmaxSummary = SoftmaxSummaryOf<double>;

template <typename Real>
DLM_HOST_DEVICE inline SoftmaxSummaryOf<Real> summarise(const SoftmaxStateOf<Real>& state) {
  SoftmaxSummaryOf<Real> summary;
  summary.log_sum = log_of(state.sum);
  summary.lse = state.max + summary.log_sum;
  summary.entropy = summary.log_sum - state.weighted / state.sum;
  // Without a column above minus infinity there is no distribution.
  summary.confidence = state.sum == 0 ? nan_of<Real>() : 1 / state.sum;
  summary.margin = (1 - exp_of(state.second - state.max)) / state.sum;
  return summary;
}

}  // namespace dlm_fast
