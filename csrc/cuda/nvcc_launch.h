// Starts kernels that nvcc compiled into this module.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "cuda/launch.h"

namespace dlm_fast::cuda {

struct KernelEntry {
  const char* name;
  const void* function;
  std::size_t params_bytes;
};

// Names of all kernels.
std::vector<std::string> kernel_names();

// On the given stream of the current device; does not wait.
void launch(const Launch& launch, void* stream);

}  // namespace dlm_fast::cuda
