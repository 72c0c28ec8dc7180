// Launch plans of the row kernels: entry point, grid, shared memory.
#include "cuda/row_stats_plan.h"

#include "cuda/dtype_names.h"
#include "cuda/row_cluster_shape.h"
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

Launch plan_rows(std::string kernel, int rows, int vocabulary, bool cluster, std::string params) {
  Launch launch;
  launch.kernel = std::move(kernel);
  launch.params = std::move(params);
  if (cluster) {
    launch.cluster = kClusterBlocks;
    launch.grid_x = static_cast<unsigned>(rows) * kClusterBlocks;
    launch.threads = kClusterThreads;
    launch.shared_bytes =
        kClusterFixedBytes + 4u * static_cast<unsigned>(cluster_slice(vocabulary));
  } else {
    launch.grid_x = static_cast<unsigned>(rows);
    launch.threads = kThreads;
    launch.shared_bytes = kScratchBytes;
  }
  return launch;
}

const char* cluster_suffix(bool cluster) {
  return cluster ? "_cluster" : "";
}

}  // namespace

bool cluster_fits(int vocabulary) {
  return kClusterFixedBytes + 4u * static_cast<unsigned>(cluster_slice(vocabulary)) <= 227u << 10;
}

Launch plan_row_stats(const RowStatsParams& params, Dtype real, bool top, bool cluster) {
  check(params);
  return plan_rows(
      std::string(top ? "row_stats_top" : "row_stats") + cluster_suffix(cluster) + suffix(real),
      params.rows, params.vocabulary, cluster, bytes_of(params));
}

Launch plan_row_grad(const RowGradParams& params, Dtype real, Dtype stored) {
  check(params.row);
  return plan_rows("row_grad" + suffix(real) + suffix(stored), params.row.rows,
                   params.row.vocabulary, false, bytes_of(params));
}

Launch plan_row_step(const RowGradParams& params, Dtype real, Dtype stored, bool cluster) {
  check(params.row);
  return plan_rows(
      std::string("row_step") + cluster_suffix(cluster) + suffix(real) + suffix(stored),
      params.row.rows, params.row.vocabulary, cluster, bytes_of(params));
}

}  // namespace dlm_fast::cuda
