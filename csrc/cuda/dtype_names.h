// Element types in the names of entry points, and their sizes.
#pragma once

#include <stdexcept>
#include <string>

#include "dlm_fast/dtype.h"

namespace dlm_fast::cuda {

inline std::string suffix(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "_f32";
    case Dtype::kBFloat16:
      return "_bf16";
    case Dtype::kFloat16:
      return "_f16";
    case Dtype::kFloat64:
      return "_f64";
  }
  throw std::invalid_argument("no such dtype");
}

inline int element_bytes(Dtype dtype) {
  if (dtype == Dtype::kFloat64) return 8;
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace dlm_fast::cuda
