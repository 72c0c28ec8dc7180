// What the small-N head kernel reads and writes.
#pragma once

#include "cuda/token_rows_params.h"

namespace dlm_fast::cuda {

constexpr int kDecodeRows = 64;      // most rows of a call
constexpr int kDecodeThreads = 256;  // per block
constexpr int kDecodeMergeThreads = 128;
// Vocabulary rows per partial result. Fixed, whatever the call and the device: so the bits of a row
// depend on nothing but the row.
constexpr int kDecodeSplit = 256;
constexpr int kDecodeTileBytes = 128;  // of every row per stage of the pipeline: one line of L2

// Of one row over one split.
struct DecodePartial {
  float max, sum, weighted, second;  // SoftmaxState
  int index;
  int drawn;  // id with the best score, -1: none
  float score, drawn_logit;
};

// Of one row, as the epilogue needs it.
struct DecodeRow {
  device::Wide key;
  unsigned position, step;
  device::Index target;
};

struct HeadDecodeParams {
  TokenRows rows;
  const void* hidden;           // [T, D]
  device::Index hidden_stride;  // elements between rows
  int hidden_rows;              // T
  const void* weight;           // [V, D]
  device::Index weight_stride;
  int width;                           // D
  int hidden_aligned, weight_aligned;  // every row starts at a multiple of 16 bytes
  int stages;                          // of the pipeline, 2 to 6
  DecodePartial* partials;             // [splits, N], workspace
  float* target_logit;                 // [N], workspace
};

}  // namespace dlm_fast::cuda
