// nvcc's launcher of the kernels that gather and scatter rows.
#include "cuda/select_rows.cuh"
#include "export_kernels.h"

DLM_EXPORT_KERNELS(select_rows)
