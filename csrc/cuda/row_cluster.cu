// nvcc's launcher of the row kernels for clusters.
#include "cuda/row_cluster.cuh"
#include "export_kernels.h"

DLM_EXPORT_KERNELS(row_cluster)
