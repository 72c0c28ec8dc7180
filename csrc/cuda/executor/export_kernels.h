// Hands the entry points of a body file to nvcc's launcher; a launcher file is this and the body.
#pragma once

#include "cuda/nvcc_launch.h"

#define DLM_LIST_KERNEL(qualifier, name, Params, ...) \
  {#name, reinterpret_cast<const void*>(&name), sizeof(dlm_fast::cuda::Params)},

#define DLM_EXPORT_KERNELS(body)              \
  namespace dlm_fast::cuda {                  \
  std::vector<KernelEntry> body##_kernels() { \
    return {DLM_KERNELS(DLM_LIST_KERNEL)};    \
  }                                           \
  }
