// Launch plans of the small-N head kernel.
#pragma once

#include <array>
#include <cstdint>

#include "cuda/head_decode_params.h"
#include "cuda/launch.h"
#include "dlm_fast/dtype.h"

namespace dlm_fast::cuda {

// What a device offers; results do not depend on it.
struct DecodeDevice {
  int multiprocessors;
  int64_t shared_bytes;  // most that a block can ask for
};

// Bytes that `HeadDecodeParams::partials` needs.
int64_t head_decode_workspace_bytes(int rows, int vocabulary);

// The pass over the head and the merge of its splits, to be launched in this order. Fills in the
// fields that follow from others: alignment and the depth of the pipeline.
std::array<Launch, 2> plan_head_decode(HeadDecodeParams params, Dtype dtype, DecodeDevice device);

}  // namespace dlm_fast::cuda
