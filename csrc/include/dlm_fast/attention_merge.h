// Merges attention over parts of the keys: states (output, log-sum-exp) become one.
#pragma once

#include <cstdint>

#include "dlm_fast/dtype.h"

namespace dlm_fast {

// Row r merges the states [indptr[r], indptr[r + 1]), in their order. A state of log-sum-exp minus
// infinity is empty, whatever its output holds. lse is float, double where states are kFloat64.
struct AttentionMergeInputs {
  int64_t num_rows;
  int64_t num_states;
  int64_t heads;
  int64_t width;          // d
  Dtype dtype;            // of states
  const void* states;     // [num_states, heads, d]
  const void* state_lse;  // [num_states, heads]
  const int32_t* indptr;  // [num_rows + 1]
  const int32_t* places;  // [num_rows] rows of the outputs; null: 0, 1, ...
  int num_threads;
};

namespace cpu {

// out [rows, heads, d] and lse [rows, heads], float or double; nothing merged: zeros and minus
// infinity.
void attention_merge(const AttentionMergeInputs& inputs, void* out, void* lse);

}  // namespace cpu
}  // namespace dlm_fast
