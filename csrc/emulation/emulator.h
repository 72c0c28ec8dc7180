// Runs a kernel body on the CPU: blocks one after the other, their threads as fibers.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace dlm_fast::emulation {

struct Kernel {
  const char* name;
  void (*run)(const void* params);
  std::size_t params_bytes;
};

// In which order fibers and blocks get their turns. A missing barrier goes unseen in forward order
// and shows in reverse, where the last warp also runs ahead of the others.
enum class Order : int { kForward = 0, kReverse = 1, kRandom = 2 };

// Throws std::runtime_error where threads wait for one another for ever, where some leave before a
// barrier that others wait at, or where copies are left unawaited.
void run(const Kernel& kernel, const cuda::Launch& launch, Order order, uint64_t seed);

}  // namespace dlm_fast::emulation
