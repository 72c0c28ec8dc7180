// nvcc's launcher of the kernels that add one sample's gradients.
#include "cuda/grad_accumulator.cuh"
#include "export_kernels.h"

DLM_EXPORT_KERNELS(grad_accumulator)
