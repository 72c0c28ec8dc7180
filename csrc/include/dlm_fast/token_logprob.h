// Log-probability, log-sum-exp and entropy of selected rows, and their gradient.
#pragma once

#include "dlm_fast/head_inputs.h"

namespace dlm_fast {

// All arrays are float, double where the inputs are kFloat64.
struct TokenLogprobOutputs {
  void* logprob;  // [N]
  void* lse;      // [N]
  void* entropy;  // [N]
  void* row_max;  // [N], with log_sum what the backward pass needs: lse = row_max + log_sum, but
  void* log_sum;  // [N]  their sum is rounded once more
};

struct TokenLogprobCotangents {
  const void* logprob;  // [N] or null: zero
  const void* lse;      // [N] or null
  const void* entropy;  // [N] or null
};

// Room for logits that the forward pass leaves to the backward pass, aligned to 64 bytes. Without
// it, or for what does not fit, the backward pass computes them again.
struct KeptLogits {
  void* data;
  int64_t bytes;
};
// All logits of N rows take the room of N and V rounded up to multiples of these; more than
// kKeptBytes is not asked for, so that what a call leaves behind is bounded.
constexpr int64_t kKeptRows = 32, kKeptColumns = 252;

// Null where a gradient is not wanted.
struct HeadGradients {
  void* hidden;     // [T, D], added to
  void* weight;     // [V, D]
  void* bias;       // [V]
  bool accumulate;  // add to weight and bias; otherwise overwrite them
  double alpha;     // factor of the gradients of weight and bias
  bool round;       // weight is bfloat16: the sums are rounded, once; never with accumulate
};

namespace cpu {

// What is useful in `kept` depends on the inputs alone.
void token_logprob(const HeadInputs& inputs, const TokenLogprobOutputs& outputs,
                   const KeptLogits& kept);

// `forward` and `kept` hold what the forward pass on the same inputs left there.
void token_logprob_bwd(const HeadInputs& inputs, const TokenLogprobOutputs& forward,
                       const KeptLogits& kept, const TokenLogprobCotangents& cotangents,
                       const HeadGradients& gradients);

}  // namespace cpu
}  // namespace dlm_fast
