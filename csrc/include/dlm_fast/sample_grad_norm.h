// Squared norm of each sample's weight gradient of a linear layer, without the gradient.
#pragma once

#include <cstdint>

#include "dlm_fast/dtype.h"

namespace dlm_fast {

// gram: sum over pairs of rows of (dy_i . dy_j)(x_i . x_j), rows^2 * (d_in + d_out) flop.
// direct: blocks of the gradient itself, squared and forgotten, 2 * rows * d_in * d_out flop.
enum class SampleGradMethod : int { kAuto = 0, kGram = 1, kDirect = 2 };

struct SampleGradShape {
  int64_t samples;
  int64_t d_out, d_in;
  int64_t grad_stride, input_stride;
  Dtype grad_dtype, input_dtype;
  SampleGradMethod method;
};

namespace cpu {

// square[k] = || sum over rows i of sample k of grad_output[i]^T input[i] ||^2. The same bits on
// any number of threads.
void sample_grad_norm(const SampleGradShape& shape,
                      const void* grad_output,  // [N, d_out]
                      const void* input,        // [N, d_in]
                      const int64_t* starts,    // [samples + 1], rows of sample k: starts[k]..
                      double* square,           // [samples]
                      int num_threads);

}  // namespace cpu
}  // namespace dlm_fast
