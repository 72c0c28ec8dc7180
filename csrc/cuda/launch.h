// What it takes to start a kernel, whichever executor runs it: nvcc's launcher, the emulator, CuPy.
#pragma once

#include <string>

namespace dlm_fast::cuda {

// Plans fill it in; every kernel takes one struct of plain data by value.
struct Launch {
  std::string kernel;  // entry point
  unsigned grid_x = 0;
  unsigned grid_y = 1;
  unsigned threads = 0;       // per block, a multiple of 32
  unsigned cluster = 1;       // blocks per cluster, as the entry point was compiled for
  unsigned shared_bytes = 0;  // dynamic shared memory per block
  std::string params;         // the bytes of the parameter struct
};

template <typename Params>
std::string bytes_of(const Params& params) {
  return std::string(reinterpret_cast<const char*>(&params), sizeof(Params));
}

}  // namespace dlm_fast::cuda
