// What the row kernels read and write: one row of finished logits per block (or cluster).
#pragma once

#include "cuda/device/plain_types.cuh"

namespace dlm_fast::cuda {

// Letters: N rows of this chunk, V vocabulary. "Real" is float, or double for double logits.
// z = (logits + bias) / temperature; the reciprocal comes in two parts, because a rounded one would
// stretch all logits.
struct RowStatsParams {
  const void* logits;        // Real [N, V]
  device::Index row_stride;  // elements between rows of logits, a multiple of 4
  int rows;                  // N
  int vocabulary;            // V
  const void* bias;          // Real [V] or null
  double inverse, inverse_low;
  const device::Index* targets;  // [N], -100 leaves a row out; null: none
  // Outputs, Real [N]; any may be null.
  void* logprob;
  void* lse;
  void* entropy;
  void* row_max;
  void* log_sum;  // lse = row_max + log_sum
  void* confidence;
  void* margin;
  device::Index* argmax;
};

// Gradient of the logits. Cotangents that are null are zero.
struct RowGradParams {
  RowStatsParams row;         // row.row_max, row.log_sum and row.entropy are read by row_grad
  const void* logprob_grad;   // Real [N]: row weights where they are known before
  const void* lse_grad;       // Real [N]
  const void* entropy_grad;   // Real [N]
  void* logits_grad;          // [N, V] in the type of the matrix product that follows
  device::Index grad_stride;  // elements between its rows
  // Rows of hidden states as the products read them, [N, D] in the type of logits_grad, or null. A
  // row without a cotangent is cleared: 0 * NaN would reach the head's gradient.
  void* hidden;
  int width;  // D
};

}  // namespace dlm_fast::cuda
