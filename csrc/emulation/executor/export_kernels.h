// Hands the entry points of a body file to the emulator.
#pragma once

#include <cstring>
#include <vector>

#include "emulation/emulator.h"

#define DLM_LIST_KERNEL(qualifier, name, Params, ...)                 \
  {#name,                                                             \
   [](const void* bytes) {                                            \
     dlm_fast::cuda::Params params;                                   \
     std::memcpy(&params, bytes, sizeof(params)); /* any alignment */ \
     name(params);                                                    \
   },                                                                 \
   sizeof(dlm_fast::cuda::Params)},

#define DLM_EXPORT_KERNELS(body)           \
  namespace dlm_fast::emulation {          \
  std::vector<Kernel> body##_kernels() {   \
    return {DLM_KERNELS(DLM_LIST_KERNEL)}; \
  }                                        \
  }
