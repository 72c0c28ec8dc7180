// Attention kernels for AVX2 with FMA.
#include "cpu/interval_attention_table.h"
#include "cpu/vec_avx2.h"

namespace dlm_fast::cpu::avx2 {

const AttentionKernels<float>& float_attention() {
  static const AttentionKernels<float> kernels = make_attention_kernels<Vec>();
  return kernels;
}

}  // namespace dlm_fast::cpu::avx2
