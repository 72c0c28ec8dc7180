// nvcc's launcher of the row kernels.
#include "cuda/row_stats.cuh"
#include "export_kernels.h"

DLM_EXPORT_KERNELS(row_stats)
