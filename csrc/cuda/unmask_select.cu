// nvcc's launcher of the unmasking rules.
#include "cuda/unmask_select.cuh"
#include "export_kernels.h"

DLM_EXPORT_KERNELS(unmask_select)
