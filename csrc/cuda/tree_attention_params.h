// What the kernel of attention over prefix trees reads and writes.
#pragma once

#include "common/tree_item.h"
#include "cuda/device/plain_types.cuh"

namespace dlm_fast::cuda {

constexpr int kTreeKeys = 32;                                   // keys of a tile: one a lane
constexpr int kTreeWarpLines = 4;                               // query lines of a warp
constexpr unsigned kTreeThreads = 256;                          // most of a block
constexpr int kTreeLines = kTreeThreads / 32 * kTreeWarpLines;  // most lines of a block at once

// Letters: T rows, H query heads, G key heads, d width. "Element" is float or a 16-bit type.
struct TreeAttentionParams {
  int query_heads, key_heads, width;
  int page;        // tokens of a page
  int is_aligned;  // every key and value row starts at a multiple of 16 bytes
  float scale;
  const void* q;  // Element [T, H, d]
  device::Index q_row_stride, q_head_stride;
  const void* keys;  // Element [pages, 2, page, G, d]
  device::Index page_stride, value_stride, token_stride, head_stride;
  // the plan, see dlm_fast/tree_plan.h
  const TreeItem* items;
  const int* piece_slots;
  const int* piece_starts;
  const int* rows;
  const int* limits;
  const int* destinations;
  void* out;           // Element [T, H, d]
  float* lse;          // [T, H]
  float* part_states;  // [slots, H, d]
  float* part_lse;     // [slots, H]
};

}  // namespace dlm_fast::cuda
