// Merging what the threads of a block found, in an order that does not depend on timing.
#pragma once

#include "common/online_softmax.h"
#include "device_api.cuh"

namespace dlm_fast::device {

template <typename Real>
DLM_DEVICE SoftmaxStateOf<Real> shuffle_xor(const SoftmaxStateOf<Real>& state, unsigned mask) {
  SoftmaxStateOf<Real> other;
  other.max = shuffle_xor(state.max, mask);
  other.sum = shuffle_xor(state.sum, mask);
  other.weighted = shuffle_xor(state.weighted, mask);
  other.second = shuffle_xor(state.second, mask);
  other.index = shuffle_xor(state.index, mask);
  return other;
}

// The state of all lanes, in every lane.
template <typename Real>
DLM_DEVICE SoftmaxStateOf<Real> merge_warp(SoftmaxStateOf<Real> state) {
  for (unsigned mask = 1; mask < kWarp; mask *= 2) {
    const SoftmaxStateOf<Real> other = shuffle_xor(state, mask);
    // the lower lane comes first in both lanes, so that both get the same bits
    state = thread_index() & mask ? merge(other, state) : merge(state, other);
  }
  return state;
}

// The state of all threads, in every thread. `scratch` holds one state per warp of the block.
template <typename Real>
DLM_DEVICE SoftmaxStateOf<Real> merge_block(SoftmaxStateOf<Real> state,
                                            SoftmaxStateOf<Real>* scratch) {
  state = merge_warp(state);
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = state;
  sync_block();
  SoftmaxStateOf<Real> merged = scratch[0];
  for (unsigned warp = 1; warp < thread_count() / kWarp; ++warp)
    merged = merge(merged, scratch[warp]);
  return merged;
}

}  // namespace dlm_fast::device
