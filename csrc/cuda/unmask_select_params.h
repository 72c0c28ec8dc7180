// What the kernel of the unmasking rules reads and writes: one row of positions per block.
#pragma once

#include "common/unmask_rule.h"
#include "cuda/device/plain_types.cuh"

namespace dlm_fast::cuda {

constexpr unsigned kUnmaskMaxThreads = 256;
constexpr unsigned kUnmaskCounterBytes = 16;  // behind the entries

// Letters: R rows, L positions. "Score" is float or double. Pointers that the rule does not need
// may be null.
struct UnmaskSelectParams {
  int length;  // L
  UnmaskRule rule;
  unsigned draw;
  unsigned capacity;  // candidates that fit shared memory, a power of two
  const void* score;  // Score [R, L]
  const bool* selectable;
  const int* quota;           // [R]
  const void* bound;          // Score [R]
  const void* uncertainty;    // Score [R, L]
  const device::Index* keys;  // [R]
  const int* position;        // [R], null: zeros
  const int* step;            // [R], null: zeros
  unsigned* order;            // [R, L], for rows with more candidates than fit; else null
  bool* selected;             // [R, L]
};

}  // namespace dlm_fast::cuda
