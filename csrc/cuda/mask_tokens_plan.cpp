// Launch plan of the Monte-Carlo masks: grid and shared memory.
#include "cuda/mask_tokens_plan.h"

#include "dlm_fast/check.h"

namespace dlm_fast::cuda {

Launch plan_mask_fill(const MaskFillParams& params, int64_t sequences) {
  DLM_CHECK(sequences > 0 && params.copies > 0, "mask_tokens: no copies");
  const int64_t blocks = sequences * params.copies;
  DLM_CHECK(blocks < int64_t{1} << 31, "mask_tokens: sequences times samples must stay below 2^31");
  Launch launch;
  launch.kernel = "mask_fill";
  launch.grid_x = static_cast<unsigned>(blocks);
  launch.threads = kMaskThreads;
  launch.shared_bytes = kMaskScratchBytes;
  launch.params = bytes_of(params);
  return launch;
}

}  // namespace dlm_fast::cuda
