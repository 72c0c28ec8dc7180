// Loops over items on a given number of threads; serial where OpenMP is not built in.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cstdint>

namespace dlm_fast::cpu {

// Calls body(item) for item in [0, count). Items are handed out dynamically, so that ragged work
// balances; the body must not throw and its result must not depend on the thread that runs it.
template <typename Body>
void parallel_for(int64_t count, int num_threads, const Body& body) {
#ifdef _OPENMP
  if (num_threads > 1 && count > 1) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic)
    for (int64_t item = 0; item < count; ++item) body(item);
    return;
  }
#endif
  (void)num_threads;
  for (int64_t item = 0; item < count; ++item) body(item);
}

// Calls body(item, worker), as parallel_for, and after it finish(item, worker) for one item at a
// time, in the order of the items. worker < num_threads names the thread, for memory of its own.
template <typename Body, typename Finish>
void ordered_for(int64_t count, int num_threads, const Body& body, const Finish& finish) {
#ifdef _OPENMP
  if (num_threads > 1 && count > 1) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) ordered
    for (int64_t item = 0; item < count; ++item) {
      const int worker = omp_get_thread_num();
      body(item, worker);
#pragma omp ordered
      finish(item, worker);
    }
    return;
  }
#endif
  (void)num_threads;
  for (int64_t item = 0; item < count; ++item) {
    body(item, 0);
    finish(item, 0);
  }
}

}  // namespace dlm_fast::cpu
