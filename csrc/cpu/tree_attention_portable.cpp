// Attention over prefix trees in plain C++: other processors, and float64 everywhere.
#include "cpu/tree_attention_item.h"
#include "cpu/vec_portable.h"

namespace dlm_fast::cpu::portable {

TreeItemKernel float_tree_item() {
  return run_tree_item<Vec<float, 4>>;
}
TreeItemKernel double_tree_item() {
  return run_tree_item<Vec<double, 4>>;
}

}  // namespace dlm_fast::cpu::portable
