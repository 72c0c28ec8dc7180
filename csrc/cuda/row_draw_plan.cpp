// Launch plan of the row kernels that choose tokens: entry point, threads, shared memory.
#include "cuda/row_draw_plan.h"

#include "cuda/token_rows_check.h"

namespace dlm_fast::cuda {
namespace {

// One state of five eight-byte numbers and one candidate of three words per warp of the largest
// block; the filters' histograms behind them.
constexpr unsigned kScratchBytes = kRowDrawThreads / 32 * (40 + 12);
constexpr unsigned kSelectBytes = 256 * 8 * 8 + 32;

}  // namespace

Launch plan_row_draw(RowDrawParams params) {
  const TokenRows& rows = params.rows;
  check_token_rows(rows, "row_draw");
  DLM_CHECK(rows.vocabulary <= 1 << 24, "row_draw: the vocabulary must not exceed 2^24");
  DLM_CHECK(params.logits && reinterpret_cast<uintptr_t>(params.logits) % 16 == 0,
            "row_draw: logits must lie at a multiple of 16 bytes");
  DLM_CHECK(params.row_stride >= rows.vocabulary && params.row_stride % 4 == 0,
            "row_draw: row_stride must be a multiple of 4, at least the vocabulary");
  DLM_CHECK(params.top_k >= 0, "row_draw: top_k must not be negative");
  DLM_CHECK(params.top_p > 0 && params.top_p <= 1, "row_draw: top_p must lie in (0, 1]");
  if (params.top_k == 0 || params.top_k > rows.vocabulary) params.top_k = rows.vocabulary;
  const bool filtered = rows.keys && (params.top_k < rows.vocabulary || params.top_p < 1);
  Launch launch;
  launch.kernel = filtered ? "row_draw_filtered" : "row_draw_all";
  launch.grid_x = static_cast<unsigned>(rows.count);
  // Of the vocabulary alone: the order of sums is part of the result.
  launch.threads = rows.vocabulary <= 4096 ? 128 : kRowDrawThreads;
  launch.shared_bytes = kScratchBytes + (filtered ? kSelectBytes : 0);
  launch.params = bytes_of(params);
  return launch;
}

}  // namespace dlm_fast::cuda
