// Launch plans that add one sample's gradients to main gradients.
#pragma once

#include <vector>

#include "cuda/launch.h"
#include "dlm_fast/grad_accumulator.h"

namespace dlm_fast::cuda {

// Chunks of all tensors: that many partial sums of each kind.
int64_t axpy_chunks(const std::vector<AxpyTensor>& tensors);

// In this order, on one stream. `partial` [2, chunks] and `result` (square, inner product, factor)
// lie on the device.
std::vector<Launch> plan_axpy(const std::vector<AxpyTensor>& tensors, const AxpyScale& scale,
                              double* partial, double* result);

}  // namespace dlm_fast::cuda
