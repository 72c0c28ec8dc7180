// Launch plans of gathering and scattering rows.
#include "cuda/select_rows_plan.h"

#include "cuda/dtype_names.h"
#include "dlm_fast/check.h"

namespace dlm_fast::cuda {
namespace {

Launch one_block_per_row(std::string kernel, int rows, std::string params) {
  DLM_CHECK(rows > 0, "row selection: no rows");
  Launch launch;
  launch.kernel = std::move(kernel);
  launch.grid_x = static_cast<unsigned>(rows);
  launch.threads = 256;
  launch.params = std::move(params);
  return launch;
}

}  // namespace

Launch plan_gather_rows(const GatherRowsParams& params, Dtype dtype) {
  return one_block_per_row("gather_rows_" + std::to_string(8 * element_bytes(dtype)), params.count,
                           bytes_of(params));
}

Launch plan_scatter_rows(const ScatterRowsParams& params, Dtype stored) {
  const Dtype sums = stored == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  return one_block_per_row("scatter_rows" + suffix(sums) + suffix(stored), params.out_rows,
                           bytes_of(params));
}

}  // namespace dlm_fast::cuda
