// The parts that attention under intervals is made of: one table per instruction set.
#pragma once

#include <cstdint>

#include "cpu/interval_attention_plan.h"
#include "dlm_fast/interval_attention.h"

namespace dlm_fast::cpu {

// Query lines that one item of the forward pass takes: each copy of a key tile serves all of them.
// A multiple of every panel (8, 16, 32).
constexpr int64_t kBlockLines = 128;
// Key tiles that one item of the backward pass takes: their copies and gradients stay in L2 while
// all query panels pass. Fixed, so that results never depend on the threads.
constexpr int64_t kChunkTiles = 4;

struct AttentionForward {
  const IntervalAttentionInputs& inputs;
  const IntervalAttentionPlan& plan;
  void* out;  // [Tq, Hq, d]
  void* lse;  // [Tq, Hq]
};

struct AttentionBackward {
  const IntervalAttentionInputs& inputs;
  const IntervalAttentionPlan& plan;
  const IntervalAttentionCotangents& cotangents;
  const IntervalAttentionGradients& gradients;
  void* delta;  // [Tq, Hq], sum of grad_out * out, less grad_lse
};

template <typename Real>
struct AttentionKernels {
  int64_t panel;  // query lines in the lanes of two vectors
  // Outputs of the lines [block * kBlockLines, ...) of a key head.
  void (*forward)(const AttentionForward& call, int64_t head, int64_t block);
  // All heads of a row.
  void (*delta)(const AttentionBackward& call, int64_t row);
  // Gradients of the keys and values of a chunk; the chunk's share of the queries' gradients stays
  // in query_panels [panels, d, panel], where the chunk meets the panel at all.
  void (*backward)(const AttentionBackward& call, int64_t head, int64_t chunk, Real* query_panels);
  // Adds that share.
  void (*add_queries)(const AttentionBackward& call, int64_t head, int64_t chunk,
                      const Real* query_panels);
};

namespace portable {
const AttentionKernels<float>& float_attention();
const AttentionKernels<double>& double_attention();
}  // namespace portable
#ifdef DLM_SIMD_X86
namespace avx2 {
const AttentionKernels<float>& float_attention();
}
namespace avx512 {
const AttentionKernels<float>& float_attention();
}
#endif

}  // namespace dlm_fast::cpu
