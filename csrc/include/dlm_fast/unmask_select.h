// Which masked positions a denoising step reveals.
#pragma once

#include <cstdint>

#include "common/unmask_rule.h"

namespace dlm_fast::cpu {

struct UnmaskShape {
  int64_t rows;
  int64_t length;
  UnmaskRule rule;
  uint32_t draw;
};

// Score is float or double. Pointers that the rule does not need may be null.
template <typename Score>
void unmask_select(const UnmaskShape& shape,
                   const Score* score,        // [R, L]
                   const bool* selectable,    // [R, L]
                   const int32_t* quota,      // [R]
                   const Score* bound,        // [R]
                   const Score* uncertainty,  // [R, L]
                   const int64_t* keys,       // [R]
                   const int32_t* position,   // [R], null: zeros
                   const int32_t* step,       // [R], null: zeros
                   bool* selected,            // [R, L]
                   int num_threads);

}  // namespace dlm_fast::cpu
