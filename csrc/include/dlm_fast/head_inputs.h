// What every language-model-head op reads: hidden states, head, selection, shape of the logits.
#pragma once

#include <cstdint>

#include "dlm_fast/dtype.h"

namespace dlm_fast {

// logits = (hidden[rows] @ weight.T + bias) / temperature, minus infinity where forbidden.
struct HeadInputs {
  int64_t n;           // selected rows
  int64_t t;           // rows of hidden
  int64_t d;           // width
  int64_t v;           // vocabulary
  Dtype dtype;         // of hidden and weight
  const void* hidden;  // [T, D], rows hidden_stride elements apart
  int64_t hidden_stride;
  const void* weight;  // [V, D], rows weight_stride elements apart
  int64_t weight_stride;
  const int64_t* targets;  // [N] token ids, kIgnored leaves a row out; may be null for token_stats
  const int32_t* rows;     // [N] rows of hidden, null: all T in order
  const void* bias;        // [V] float, double for kFloat64; may be null
  double temperature;
  const int64_t* forbidden;  // [num_forbidden] sorted token ids
  int64_t num_forbidden;
  int num_threads;
};

constexpr int64_t kIgnored = -100;

// Logits that an op keeps at most: for a filter, for a gradient, for the backward pass.
constexpr int64_t kKeptBytes = int64_t{80} << 20;

// Throws std::invalid_argument unless sizes, rows, targets and forbidden ids fit together.
void check_head_inputs(const HeadInputs& inputs, const char* op);

}  // namespace dlm_fast
