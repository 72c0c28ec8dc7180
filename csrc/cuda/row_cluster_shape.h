// How a row is divided over the blocks of a cluster; shared by the body and its plan.
#pragma once

#include "common/host_device.h"

namespace dlm_fast::cuda {

constexpr unsigned kClusterBlocks = 8;  // the largest size that every sm_90 device starts
constexpr unsigned kClusterThreads = 256;
constexpr unsigned kClusterFixedBytes = 1024;  // shared memory besides the slice of the row

// Columns of a block: a multiple of 4, so that slices begin at 16-byte boundaries.
DLM_HOST_DEVICE constexpr int cluster_slice(int vocabulary) {
  const int quads = (vocabulary + 3) / 4;
  return (quads + static_cast<int>(kClusterBlocks) - 1) / static_cast<int>(kClusterBlocks) * 4;
}

}  // namespace dlm_fast::cuda
