// Launch plan of the Monte-Carlo masks: grid and shared memory.
#pragma once

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/mask_tokens_params.h"

namespace dlm_fast::cuda {

Launch plan_mask_fill(const MaskFillParams& params, int64_t sequences);

}  // namespace dlm_fast::cuda
