// Launch plan of the unmasking rules: entry point, grid, shared memory.
#include "cuda/unmask_select_plan.h"

#include <algorithm>

#include "dlm_fast/check.h"

namespace dlm_fast::cuda {
namespace {

// Well below the 48 KiB that every kernel may use, so that several rows share a multiprocessor.
constexpr unsigned kEntriesBytes = 32u << 10;

unsigned entry_bytes(bool wide) {
  return wide ? 16 : 8;
}

unsigned power_of_two_from(unsigned length, unsigned first, unsigned most) {
  unsigned power = first;
  while (power < length && power < most) power *= 2;
  return power;
}

}  // namespace

unsigned unmask_select_capacity(int length, bool wide) {
  return power_of_two_from(static_cast<unsigned>(std::max(length, 0)), 1,
                           kEntriesBytes / entry_bytes(wide));
}

Launch plan_unmask_select(UnmaskSelectParams params, int rows, bool wide) {
  DLM_CHECK(rows > 0 && params.length > 0, "unmask_select: no positions");
  params.capacity = unmask_select_capacity(params.length, wide);
  DLM_CHECK(params.order || static_cast<unsigned>(params.length) <= params.capacity,
            "unmask_select: rows this long need order");
  Launch launch;
  launch.kernel = wide ? "unmask_select_f64" : "unmask_select_f32";
  launch.grid_x = static_cast<unsigned>(rows);
  launch.threads = power_of_two_from(static_cast<unsigned>(params.length), 32, kUnmaskMaxThreads);
  launch.shared_bytes = params.capacity * entry_bytes(wide) + kUnmaskCounterBytes;
  launch.params = bytes_of(params);
  return launch;
}

}  // namespace dlm_fast::cuda
