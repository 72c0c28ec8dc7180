// All kernel bodies, compiled for the emulator.
#include "emulation/registry.h"

#include <stdexcept>

namespace dlm_fast::emulation {

#define DLM_BODY(body) std::vector<Kernel> body##_kernels();
#include "kernel_bodies.inc"
#undef DLM_BODY
std::vector<Kernel> selftest_kernels();

const std::vector<Body>& bodies() {
  static const std::vector<Body> all = {
#define DLM_BODY(body) {#body, body##_kernels()},
#include "kernel_bodies.inc"
#undef DLM_BODY
  };
  return all;
}

const Kernel& kernel_named(const std::string& name) {
  for (const Body& body : bodies())
    for (const Kernel& kernel : body.kernels)
      if (name == kernel.name) return kernel;
  static const std::vector<Kernel> selftest = selftest_kernels();
  for (const Kernel& kernel : selftest)
    if (name == kernel.name) return kernel;
  throw std::invalid_argument("no kernel is named " + name);
}

}  // namespace dlm_fast::emulation
