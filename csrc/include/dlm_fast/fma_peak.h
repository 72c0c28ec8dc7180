// What a core can multiply and add: its ceiling, and the rate of our register tile.
#pragma once

namespace dlm_fast::cpu {

// Two numbers a benchmark divides by and shows, in GFLOP/s over all threads together, in the
// instruction set in force. `pairs`: products of bfloat16 pairs; 0 where there are none.
struct FmaRate {
  // independent multiply-adds that never leave the registers
  double peak;
  // the logit tile of the head ops on one packed block that lies in L2
  double tile;
};

// Takes about `seconds` of time; the best of many short intervals, each thread by its own clock.
FmaRate fma_peak(bool pairs, double seconds, int num_threads);

}  // namespace dlm_fast::cpu
