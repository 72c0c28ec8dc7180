// Launch plan of the merge of attention states: entry point, grid.
#include "cuda/attention_merge_plan.h"

#include "cuda/dtype_names.h"
#include "dlm_fast/check.h"

namespace dlm_fast::cuda {

Launch plan_attention_merge(const AttentionMergeParams& params, int64_t rows, Dtype out) {
  DLM_CHECK(rows > 0 && rows < int64_t{1} << 31 && params.heads > 0 && params.width > 0,
            "attention_merge: nothing to merge, or too many rows");
  DLM_CHECK(out != Dtype::kFloat64, "attention_merge: float64 is left to the CPU");
  constexpr unsigned kHeads = kMergeThreads / 32;
  Launch launch;
  launch.kernel = "attention_merge" + suffix(out);
  launch.grid_x = static_cast<unsigned>(rows);
  launch.grid_y = (static_cast<unsigned>(params.heads) + kHeads - 1) / kHeads;
  launch.threads = kMergeThreads;
  launch.params = bytes_of(params);
  return launch;
}

}  // namespace dlm_fast::cuda
