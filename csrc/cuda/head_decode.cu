// nvcc's launcher of the small-N head kernel.
#include "cuda/head_decode.cuh"
#include "export_kernels.h"

DLM_EXPORT_KERNELS(head_decode)
