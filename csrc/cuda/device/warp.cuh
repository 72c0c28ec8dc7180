// Counting votes of a warp and of a block without waiting more than needed.
#pragma once

#include "device_api.cuh"

namespace dlm_fast::device {

DLM_DEVICE unsigned lane_index() {
  return thread_index() % kWarp;
}

DLM_DEVICE unsigned votes_before(unsigned votes) {
  return count_bits(votes & ((1u << lane_index()) - 1));
}

// A place behind a shared counter for every thread that asks: one atomic per warp. All lanes must
// take part. Which thread gets which place depends on timing.
DLM_DEVICE unsigned take_place(unsigned* counter, bool asks) {
  const unsigned votes = ballot(asks);
  unsigned first = 0;
  if (lane_index() == 0 && votes) first = atomic_add(counter, count_bits(votes));
  return shuffle(first, 0) + votes_before(votes);
}

struct Votes {
  unsigned before;  // by threads of lower index
  unsigned total;   // in the block
};

// All threads must take part. `scratch` holds one number per warp; the next call must use another
// scratch, because slow threads may still read this one.
DLM_DEVICE Votes count_votes(bool vote, unsigned* scratch) {
  const unsigned votes = ballot(vote);
  const unsigned warp = thread_index() / kWarp;
  if (lane_index() == 0) scratch[warp] = count_bits(votes);
  sync_block();
  Votes counted = {votes_before(votes), 0};
  for (unsigned w = 0; w < thread_count() / kWarp; ++w) {
    if (w < warp) counted.before += scratch[w];
    counted.total += scratch[w];
  }
  return counted;
}

// Sum of the values of this lane and of those before it.
DLM_DEVICE unsigned sum_up_to_lane(unsigned value) {
  for (unsigned step = 1; step < kWarp; step *= 2) {
    const unsigned left = shuffle(value, lane_index() - step);
    if (lane_index() >= step) value += left;
  }
  return value;
}

}  // namespace dlm_fast::device
