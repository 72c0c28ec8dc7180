// nvcc's launcher of the Monte-Carlo masks.
#include "cuda/mask_tokens.cuh"
#include "export_kernels.h"

DLM_EXPORT_KERNELS(mask_tokens)
