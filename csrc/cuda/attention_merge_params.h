// What the kernel that merges attention states reads and writes.
#pragma once

#include "cuda/device/plain_types.cuh"

namespace dlm_fast::cuda {

constexpr unsigned kMergeThreads = 128;  // a warp for each head of a row

// Letters: M rows, S states, H heads, d width.
struct AttentionMergeParams {
  int heads, width;
  const float* states;     // [S, H, d]
  const float* state_lse;  // [S, H]
  const int* indptr;       // [M + 1]
  const int* places;       // [M] rows of the outputs, null: 0, 1, ...
  void* out;               // [rows, H, d]
  float* lse;              // [rows, H]
};

}  // namespace dlm_fast::cuda
