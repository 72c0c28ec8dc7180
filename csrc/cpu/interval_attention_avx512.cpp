// Attention kernels for AVX-512.
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from undefined registers and trip this warning when inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "cpu/interval_attention_table.h"
#include "cpu/vec_avx512.h"

namespace dlm_fast::cpu::avx512 {

const AttentionKernels<float>& float_attention() {
  static const AttentionKernels<float> kernels = make_attention_kernels<Vec>();
  return kernels;
}

}  // namespace dlm_fast::cpu::avx512
