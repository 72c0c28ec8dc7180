// The numbers of the unmasking rules. Compiles under NVRTC.
#pragma once

namespace dlm_fast {

// They are those of RULES in dlm_fast/ops/unmask_select.py.
enum class UnmaskRule : int {
  kTopK = 0,
  kDynamic = 1,
  kThreshold = 2,
  kFactor = 3,
  kEntropySum = 4,
  kEb = 5,
  kRandom = 6,
  kSequential = 7
};

}  // namespace dlm_fast
