// All kernel bodies, compiled for the emulator.
#pragma once

#include <vector>

#include "emulation/emulator.h"

namespace dlm_fast::emulation {

// Of every body, with the name of its file.
struct Body {
  const char* name;
  std::vector<Kernel> kernels;
};

const std::vector<Body>& bodies();

// Of the bodies and of the emulator's own tests. Throws std::invalid_argument for an unknown name.
const Kernel& kernel_named(const std::string& name);

}  // namespace dlm_fast::emulation
