// Attention over prefix trees for AVX2 with FMA.
#include "cpu/tree_attention_item.h"
#include "cpu/vec_avx2.h"

namespace dlm_fast::cpu::avx2 {

TreeItemKernel float_tree_item() {
  return run_tree_item<Vec>;
}

}  // namespace dlm_fast::cpu::avx2
