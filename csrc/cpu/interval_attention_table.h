// Fills the table of attention kernels for a vector type.
#pragma once

#include "cpu/interval_attention_backward.h"
#include "cpu/interval_attention_forward.h"

namespace dlm_fast::cpu {

template <class V>
AttentionKernels<typename V::Real> make_attention_kernels() {
  using Real = typename V::Real;
  using Backward = AttentionBackwardChunk<V>;
  return {
      2 * V::kLanes,
      [](const AttentionForward& call, int64_t head, int64_t block) {
        AttentionForwardBlock<V>(call, head, block).run();
      },
      Backward::find_delta,
      [](const AttentionBackward& call, int64_t head, int64_t chunk, Real* query_panels) {
        Backward(call, head, chunk, query_panels).run();
      },
      Backward::add_queries,
  };
}

}  // namespace dlm_fast::cpu
