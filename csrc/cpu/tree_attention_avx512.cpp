// Attention over prefix trees for AVX-512.
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics start from undefined registers and trip this warning when inlined.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "cpu/tree_attention_item.h"
#include "cpu/vec_avx512.h"

namespace dlm_fast::cpu::avx512 {

TreeItemKernel float_tree_item() {
  return run_tree_item<Vec>;
}

}  // namespace dlm_fast::cpu::avx512
