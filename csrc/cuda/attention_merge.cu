// nvcc's launcher of the merge of attention states.
#include "cuda/attention_merge.cuh"
#include "export_kernels.h"

DLM_EXPORT_KERNELS(attention_merge)
