// Attention kernels in plain C++: other processors, and float64 everywhere.
#include "cpu/interval_attention_table.h"
#include "cpu/vec_portable.h"

namespace dlm_fast::cpu::portable {

const AttentionKernels<float>& float_attention() {
  static const AttentionKernels<float> kernels = make_attention_kernels<Vec<float, 4>>();
  return kernels;
}

const AttentionKernels<double>& double_attention() {
  static const AttentionKernels<double> kernels = make_attention_kernels<Vec<double, 4>>();
  return kernels;
}

}  // namespace dlm_fast::cpu::portable
