// Rows gathered into a contiguous block, and gradients of rows added back where they came from.
#pragma once

#include "cuda/device/plain_types.cuh"

namespace dlm_fast::cuda {

// Letters: N rows of the block (blocks of the launch), T rows of the source, D width.
struct GatherRowsParams {
  const void* source;  // [T, D], elements of element_bytes
  device::Index source_stride;
  const int* rows;               // [valid] numbers of source rows; null: first, first + 1, ...
  device::Index first;           // source row of the block's first row where rows is null
  const device::Index* targets;  // [valid] or null; -100 leaves a row out
  int valid;                     // rows that exist; the others are zeros
  int source_rows;               // T
  int width;                     // D
  void* out;                     // [N, D]
  int count;                     // N
};

// out[t] = sum of grad[order[k]] for k in [start[t], start[t + 1]), in that order.
struct ScatterRowsParams {
  const void* grad;            // Real [N, D]
  const device::Index* order;  // [N]
  const device::Index* start;  // [T + 1]
  int width;                   // D
  void* out;                   // [T, D], contiguous
  int out_rows;                // T
};

}  // namespace dlm_fast::cuda
