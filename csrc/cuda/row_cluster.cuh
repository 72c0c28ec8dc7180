// Statistics of rows of logits and their gradient, one cluster of blocks per row (sm_90): the row
// is read from memory once and kept in the shared memory of the cluster.
#pragma once

#include "cuda/device/kernel_list.cuh"
#include "cuda/device/row.cuh"
#include "cuda/row_cluster_shape.h"

namespace dlm_fast::device {

using cuda::kClusterBlocks;
using cuda::kClusterThreads;

// Shared memory of a block: states of its warps, its own state for the other blocks, theirs, then
// its slice of the row.
struct ClusterMemory {
  SoftmaxStateOf<float> warps[kClusterThreads / kWarp];
  SoftmaxStateOf<float> blocks[kClusterBlocks];
  float own[5];
  alignas(16) float logits[4];  // and more
};
static_assert(sizeof(ClusterMemory) <= cuda::kClusterFixedBytes, "the plan counts on these bytes");

DLM_DEVICE ClusterMemory& cluster_memory() {
  return *reinterpret_cast<ClusterMemory*>(shared_bytes());
}

// Every thread fetches the columns that it will read itself, so no barrier is needed.
DLM_DEVICE void fetch_slice(const RowSlice<float>& source, float* target) {
  const int step = static_cast<int>(kClusterThreads) * kLanes;
  for (int column = static_cast<int>(thread_index()) * kLanes; column < source.count;
       column += step) {
    if (column + kLanes <= source.count) {
      copy_async_16(target + column, source.raw + column);
    } else {
      for (int tail = column; tail < source.count; ++tail) target[tail] = source.raw[tail];
    }
  }
  copy_commit();
  copy_wait<0>();
}

DLM_DEVICE void publish(float* own, const SoftmaxStateOf<float>& state) {
  own[0] = state.max;
  own[1] = state.sum;
  own[2] = state.weighted;
  own[3] = state.second;
  own[4] = float_of_bits(static_cast<unsigned>(state.index));  // below 2^31, or -1
}

DLM_DEVICE SoftmaxStateOf<float> state_of_block(const float* own, unsigned rank) {
  SoftmaxStateOf<float> state;
  state.max = cluster_load(own, rank);
  state.sum = cluster_load(own + 1, rank);
  state.weighted = cluster_load(own + 2, rank);
  state.second = cluster_load(own + 3, rank);
  state.index = static_cast<int>(bits_of(cluster_load(own + 4, rank)));
  return state;
}

// The state of the whole row, in every thread of the cluster.
DLM_DEVICE SoftmaxStateOf<float> merge_cluster(const SoftmaxStateOf<float>& block_state) {
  ClusterMemory& memory = cluster_memory();
  if (thread_index() == 0) publish(memory.own, block_state);
  sync_cluster();
  if (thread_index() < kClusterBlocks)
    memory.blocks[thread_index()] = state_of_block(memory.own, thread_index());
  sync_cluster();  // nobody leaves while others read its memory; stands for sync_block too
  SoftmaxStateOf<float> state = memory.blocks[0];
  for (unsigned rank = 1; rank < kClusterBlocks; ++rank) state = merge(state, memory.blocks[rank]);
  return state;
}

DLM_DEVICE RowSlice<float> slice_of_rank(const RowStatsParams& params, int row) {
  const int each = cuda::cluster_slice(params.vocabulary);
  const int first = static_cast<int>(cluster_rank()) * each;
  const int left = params.vocabulary - first;
  return slice_of<float>(params, row, first, left < 0 ? 0 : smaller_of(left, each));
}

// Reads the row once; returns its slice in shared memory and the statistics of the whole row.
template <bool kTop>
DLM_DEVICE SoftmaxStateOf<float> read_row(const RowStatsParams& params, int row,
                                          RowSlice<float>& slice) {
  ClusterMemory& memory = cluster_memory();
  slice = slice_of_rank(params, row);
  fetch_slice(slice, memory.logits);
  slice.raw = memory.logits;
  return merge_cluster(merge_block(thread_state<float, kTop>(slice), memory.warps));
}

template <bool kTop>
DLM_DEVICE void row_stats_cluster(const RowStatsParams& params) {
  const int row = static_cast<int>(block_x() / kClusterBlocks);
  RowSlice<float> slice;
  const SoftmaxStateOf<float> state = read_row<kTop>(params, row, slice);
  const Index target = target_of(params, row);
  if (cluster_rank() == 0 && thread_index() == 0)
    write_stats(params, row, target, target_logit<float>(params, row, target), state);
}

template <typename Stored>
DLM_DEVICE void row_step_cluster(const RowGradParams& params) {
  const int row = static_cast<int>(block_x() / kClusterBlocks);
  const Index target = target_of(params.row, row);
  // In place, other blocks overwrite the logits as soon as the states are merged.
  const float target_z = target_logit<float>(params.row, row, target);
  RowSlice<float> slice;
  const SoftmaxStateOf<float> state = read_row<false>(params.row, row, slice);
  if (cluster_rank() == 0 && thread_index() == 0)
    write_stats(params.row, row, target, target_z, state);
  const SoftmaxSummaryOf<float> summary = summarise(state);
  write_grad<float, Stored>(params, slice, row, target, state.max, summary.log_sum,
                            summary.entropy);
  clear_hidden<float, Stored>(params, row, target, cluster_rank(), kClusterBlocks);
}

}  // namespace dlm_fast::device

#define DLM_ROW_CLUSTER_KERNEL \
  DLM_CLUSTER_KERNEL(dlm_fast::cuda::kClusterThreads, dlm_fast::cuda::kClusterBlocks)
#define DLM_KERNELS(KERNEL)                                                                        \
  KERNEL(DLM_ROW_CLUSTER_KERNEL, row_stats_cluster_f32, RowStatsParams, row_stats_cluster<false>)  \
  KERNEL(DLM_ROW_CLUSTER_KERNEL, row_stats_top_cluster_f32, RowStatsParams,                        \
         row_stats_cluster<true>)                                                                  \
  KERNEL(DLM_ROW_CLUSTER_KERNEL, row_step_cluster_f32_f32, RowGradParams, row_step_cluster<float>) \
  KERNEL(DLM_ROW_CLUSTER_KERNEL, row_step_cluster_f32_bf16, RowGradParams,                         \
         row_step_cluster<BFloat16>)                                                               \
  KERNEL(DLM_ROW_CLUSTER_KERNEL, row_step_cluster_f32_f16, RowGradParams, row_step_cluster<Float16>)

DLM_KERNELS(DLM_DEFINE_KERNEL)
