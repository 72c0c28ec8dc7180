// Launch plan of attention over prefix trees: entry point, grid, threads, shared memory.
#include "cuda/tree_attention_plan.h"

#include <algorithm>

#include "cuda/dtype_names.h"
#include "dlm_fast/check.h"

namespace dlm_fast::cuda {
namespace {

// TreeShared, which the host cannot name.
unsigned shared_bytes(int width, int element) {
  const int rows = 2 * kTreeKeys * (width * element + 16);
  const int lines = kTreeLines * (width + kTreeKeys) * 4;
  return static_cast<unsigned>(rows + lines + kTreeKeys * 8);
}

bool is_aligned(const TreeAttentionParams& params, int element) {
  const auto whole = [element](device::Index stride) { return stride * element % 16 == 0; };
  return reinterpret_cast<uintptr_t>(params.keys) % 16 == 0 && whole(params.page_stride) &&
         whole(params.value_stride) && whole(params.token_stride) && whole(params.head_stride);
}

}  // namespace

Launch plan_tree_attention(TreeAttentionParams params, Dtype dtype, int64_t items,
                           int64_t most_rows) {
  DLM_CHECK(items > 0 && items < int64_t{1} << 31 && most_rows > 0,
            "tree_attention: no items, or too many");
  DLM_CHECK(params.key_heads > 0 && params.key_heads < 1 << 16 &&
                params.query_heads % params.key_heads == 0,
            "tree_attention: query heads must be a multiple of key heads");
  DLM_CHECK(dtype != Dtype::kFloat64, "tree_attention: float64 is left to the CPU");
  DLM_CHECK(params.width > 0 && params.width <= kTreeWidest,
            "tree_attention: heads of width " + std::to_string(params.width) +
                " have no CUDA kernel, the widest is 256; move the tensors to the CPU");
  const int width = params.width <= 64 ? 64 : params.width <= 128 ? 128 : 256;
  const int element = element_bytes(dtype);
  params.is_aligned = is_aligned(params, element);
  const int64_t lines = most_rows * (params.query_heads / params.key_heads);
  Launch launch;
  launch.kernel = "tree_attention" + suffix(dtype) + "_" + std::to_string(width);
  launch.grid_x = static_cast<unsigned>(items);
  launch.grid_y = static_cast<unsigned>(params.key_heads);
  // Warps without a line help to load.
  launch.threads = lines <= kTreeLines / 2 ? kTreeThreads / 2 : kTreeThreads;
  launch.shared_bytes = shared_bytes(width, element);
  launch.params = bytes_of(params);
  return launch;
}

}  // namespace dlm_fast::cuda
