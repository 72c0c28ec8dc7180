// Attention where each key is seen by two half-open intervals of query rows, and its gradient.
#pragma once

#include <cstdint>

#include "dlm_fast/dtype.h"

namespace dlm_fast {

// [T, H, d]; a row of d numbers lies together, rows and heads at any distance (in elements).
struct AttentionRows {
  const void* data;
  int64_t row_stride;
  int64_t head_stride;
};

// Row i sees key j iff lo0 <= i < hi0 or lo1 <= i < hi1 of intervals[j] = (lo0, hi0, lo1, hi1).
struct IntervalAttentionInputs {
  int64_t num_queries;  // Tq
  int64_t num_keys;     // Tk
  int64_t query_heads;  // a multiple of key_heads: neighbouring query heads share a key head
  int64_t key_heads;
  int64_t width;  // d
  Dtype dtype;    // of q, k, v
  AttentionRows q, k, v;
  const int32_t* intervals;  // [Tk, 4], the two intervals of a key disjoint, empty where lo = hi
  double scale;
  int num_threads;
};

// What the backward pass gets from the forward pass and from above. Numbers that are not inputs are
// float, double where the inputs are kFloat64.
struct IntervalAttentionCotangents {
  AttentionRows out;       // in the type of the inputs
  AttentionRows grad_out;  // in the type of the inputs
  const void* lse;         // [Tq, Hq]
  const void* grad_lse;    // [Tq, Hq] or null: zero
};

struct IntervalAttentionGradients {
  void* q;  // [Tq, Hq, d]
  void* k;  // [Tk, Hkv, d]
  void* v;  // [Tk, Hkv, d]
};

namespace cpu {

// out [Tq, Hq, d] and lse [Tq, Hq] (natural logarithm), float or double. A row that sees no key:
// zeros and minus infinity.
void interval_attention(const IntervalAttentionInputs& inputs, void* out, void* lse);

void interval_attention_bwd(const IntervalAttentionInputs& inputs,
                            const IntervalAttentionCotangents& cotangents,
                            const IntervalAttentionGradients& gradients);

}  // namespace cpu
}  // namespace dlm_fast
