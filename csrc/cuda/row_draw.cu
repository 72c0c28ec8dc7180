// nvcc's launcher of the row kernels that choose tokens.
#include "cuda/row_draw.cuh"
#include "export_kernels.h"

DLM_EXPORT_KERNELS(row_draw)
