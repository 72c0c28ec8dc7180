// Launch plans of the row kernels: entry point, grid, shared memory.
#include "cuda/row_stats_plan.h"

#include "dlm_fast/check.h"

namespace dlm_fast::cuda {
namespace {

constexpr unsigned kThreads = 256;
// One state of five eight-byte numbers per warp is the most that a merge needs.
constexpr unsigned kScratchBytes = kThreads / 32 * 40;

void check(const RowStatsParams& params) {
  DLM_CHECK(params.rows > 0, "row kernels: no rows");
  DLM_CHECK(params.vocabulary > 0, "row kernels: no vocabulary");
  DLM_CHECK(params.row_stride >= params.vocabulary && params.row_stride % 4 == 0,
            "row kernels: row_stride must be a multiple of 4, at least the vocabulary");
}

std::string suffix(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "_f32";
    case Dtype::kBFloat16:
      return "_bf16";
    case Dtype::kFloat16:
      return "_f16";
    case Dtype::kFloat64:
      return "_f64";
  }
  throw std::invalid_argument("row kernels: no such dtype");
}

Launch one_block_per_row(std::string kernel, int rows, std::string params) {
  Launch launch;
  launch.kernel = std::move(kernel);
  launch.grid_x = static_cast<unsigned>(rows);
  launch.threads = kThreads;
  launch.shared_bytes = kScratchBytes;
  launch.params = std::move(params);
  return launch;
}

}  // namespace

Launch plan_row_stats(const RowStatsParams& params, Dtype real, bool top) {
  check(params);
  return one_block_per_row((top ? "row_stats_top" : "row_stats") + suffix(real), params.rows,
                           bytes_of(params));
}

Launch plan_row_grad(const RowGradParams& params, Dtype real, Dtype stored, bool known) {
  check(params.row);
  return one_block_per_row((known ? "row_grad" : "row_step") + suffix(real) + suffix(stored),
                           params.row.rows, bytes_of(params));
}

}  // namespace dlm_fast::cuda
