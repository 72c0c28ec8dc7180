// What decides the token of a row and where its statistics go; for kernels that choose tokens.
#pragma once

#include "cuda/device/plain_types.cuh"

namespace dlm_fast::cuda {

// N rows of a call, V vocabulary. z = (logit + bias) / temperature, minus infinity where forbidden.
// Statistics are those of z; a draw is the argmax of z * draw_inverse + Gumbel noise.
struct TokenRows {
  int count;                       // N
  int vocabulary;                  // V
  const float* bias;               // [V] or null
  float inverse, inverse_low;      // 1 / temperature in two parts, see RowStatsParams
  const device::Index* forbidden;  // [num_forbidden] sorted token ids
  int num_forbidden;
  const int* rows;  // [N] row of hidden, NaN comes out for one outside; null: row i is i
  const device::Index* targets;  // [N], -100: logprob is 0; null: logprob is the token's
  int skip_ignored;              // rows with target -100 are no rows: all outputs are 0
  // Noise; without keys the token is the argmax, the lowest id on ties.
  const device::Wide* keys;  // [N] or null
  const int* position;       // [N] or null: zeros
  const int* step;           // [N] or null: zeros
  unsigned draw;
  float draw_inverse;
  // Outputs [N]; any may be null.
  device::Index* token;
  float* confidence;  // probability of the token
  float* lse;
  float* entropy;
  float* margin;
  float* logprob;
  float* row_max;
  float* log_sum;  // lse = row_max + log_sum
};

}  // namespace dlm_fast::cuda
