// Adds the gradients of one sample to main gradients on the CPU: norm, clipping and sum.
#pragma once

#include <cstdint>

#include "dlm_fast/check.h"
#include "dlm_fast/dtype.h"

namespace dlm_fast {

// One parameter. Main and gradient are float64 together, or main is float32 or bfloat16 and the
// gradient float32, bfloat16 or float16.
struct AxpyTensor {
  void* main;        // [size]
  const void* grad;  // [size]
  int64_t size;
  Dtype main_dtype;
  Dtype grad_dtype;
  uint64_t key;  // of the random bits that round to bfloat16
};

inline void check_axpy(const AxpyTensor& tensor) {
  const bool main64 = tensor.main_dtype == Dtype::kFloat64;
  DLM_CHECK(main64 == (tensor.grad_dtype == Dtype::kFloat64),
            "axpy_multi: float64 gradients need float64 main gradients, and the other way round");
  DLM_CHECK(main64 || tensor.main_dtype == Dtype::kFloat32 || tensor.main_dtype == Dtype::kBFloat16,
            "axpy_multi: main gradients must be float64, float32 or bfloat16");
  DLM_CHECK(tensor.size >= 0, "axpy_multi: sizes must not be negative");
  DLM_CHECK(tensor.size == 0 || (tensor.main && tensor.grad), "axpy_multi: a tensor is missing");
}

struct AxpyScale {
  double scale;
  // The gradient is scaled down to this norm; infinite: never.
  double max_norm;
  // Squared norm of the part of the sample that is not among the tensors.
  double square_elsewhere;
  // Third counter of the random bits: which sample this is.
  uint32_t step;
};

struct AxpyResult {
  double square;  // ||grad||^2, over all tensors
  double inner;   // <grad, main before>
  double factor;  // of clipping, at most 1
};

namespace cpu {

// main += factor * scale * grad over all tensors. The same bits on any number of threads and any
// instruction set.
AxpyResult axpy_multi(const AxpyTensor* tensors,  // [count]
                      int64_t count, const AxpyScale& scale, int num_threads);

}  // namespace cpu
}  // namespace dlm_fast
