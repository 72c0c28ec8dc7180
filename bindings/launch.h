// A launch plan as Python sees it: (kernel, (grid_x, grid_y), threads, cluster, shared_bytes,
// params).
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/launch.h"

namespace dlm_fast {

inline pybind11::tuple to_python(const cuda::Launch& launch) {
  return pybind11::make_tuple(launch.kernel, pybind11::make_tuple(launch.grid_x, launch.grid_y),
                              launch.threads, launch.cluster, launch.shared_bytes,
                              pybind11::bytes(launch.params));
}

inline cuda::Launch from_python(const pybind11::tuple& plan) {
  const auto grid = plan[1].cast<pybind11::tuple>();
  cuda::Launch launch;
  launch.kernel = plan[0].cast<std::string>();
  launch.grid_x = grid[0].cast<unsigned>();
  launch.grid_y = grid[1].cast<unsigned>();
  launch.threads = plan[2].cast<unsigned>();
  launch.cluster = plan[3].cast<unsigned>();
  launch.shared_bytes = plan[4].cast<unsigned>();
  launch.params = std::string(plan[5].cast<pybind11::bytes>());
  return launch;
}

}  // namespace dlm_fast
