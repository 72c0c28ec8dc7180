// What the row kernels that choose tokens read and write: one row of logits per block.
#pragma once

#include "cuda/token_rows_params.h"

namespace dlm_fast::cuda {

constexpr int kRowDrawThreads = 512;  // at most, per block

struct RowDrawParams {
  TokenRows rows;
  const float* logits;       // [N, V], aligned to 16 bytes
  device::Index row_stride;  // elements between rows, a multiple of 4
  int top_k;                 // columns that a draw may choose from, V: all
  double top_p;              // and their share of the mass, 1: all
};

}  // namespace dlm_fast::cuda
