// Attention of queries over the paths of a prefix tree whose keys lie in pages.
#pragma once

#include <cstdint>

#include "dlm_fast/dtype.h"
#include "dlm_fast/interval_attention.h"
#include "dlm_fast/tree_plan.h"

namespace dlm_fast {

// Keys and values of a layer, [pages, 2, page, key heads, d]; a row of d numbers lies together, all
// else at any distance (in elements).
struct PagedKeys {
  const void* data;
  int64_t page;  // tokens of a page
  int64_t page_stride, value_stride, token_stride, head_stride;
};

struct TreeAttentionInputs {
  int64_t num_rows;     // T
  int64_t query_heads;  // a multiple of key_heads: neighbouring query heads share a key head
  int64_t key_heads;
  int64_t width;  // d
  Dtype dtype;    // of q and the keys
  AttentionRows q;
  PagedKeys keys;
  const int32_t* plan;  // packed
  TreePlanSizes sizes;
  double scale;
  int num_threads;
};

namespace cpu {

// out [T, Hq, d] and lse [T, Hq] (natural logarithm), float or double. A row that sees no key:
// zeros and minus infinity.
void tree_attention(const TreeAttentionInputs& inputs, void* out, void* lse);

}  // namespace cpu
}  // namespace dlm_fast
