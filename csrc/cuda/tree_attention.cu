// nvcc's launcher of attention over prefix trees.
#include "cuda/tree_attention.cuh"
#include "export_kernels.h"

DLM_EXPORT_KERNELS(tree_attention)
