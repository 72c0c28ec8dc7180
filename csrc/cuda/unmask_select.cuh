// Unmasking rules, one block per row: gather the candidates, order them where the rule needs it,
// reveal the first ones. Traffic: per position 1 byte read and 1 written, per candidate 4 to 8
// bytes more (twice for `dynamic` and `threshold`, out of cache). Keys lie in shared memory.
#pragma once

#include "common/philox.h"
#include "common/real_math.h"
#include "cuda/device/entry.cuh"
#include "cuda/device/kernel_list.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/unmask_select_params.h"

namespace dlm_fast::device {

using cuda::UnmaskSelectParams;

template <typename Score>
struct UnmaskRow {
  const Score* score;        // [L]
  const bool* open;          // [L]
  const Score* uncertainty;  // [L], null where the rule does not read it
  unsigned length;           // L
  UnmaskRule rule;
  bool nan_counts;  // candidates without a number take part
  unsigned quota;
  Score bound;
  PhiloxKey key;
  PhiloxWord position, step, draw;

  DLM_DEVICE bool uses_sums() const {
    return rule == UnmaskRule::kEntropySum || rule == UnmaskRule::kEb;
  }
  DLM_DEVICE bool is_candidate(unsigned i) const {
    if (!open[i]) return false;
    return nan_counts ||
           (score[i] == score[i] && (!uncertainty || uncertainty[i] == uncertainty[i]));
  }
  // The bound alone lets a candidate through.
  DLM_DEVICE bool passes(unsigned i) const {
    if (rule == UnmaskRule::kDynamic) return score[i] > bound;
    return rule == UnmaskRule::kThreshold && score[i] >= bound;
  }
  DLM_DEVICE Entry<Score> entry(unsigned i) const {
    if (rule == UnmaskRule::kSequential) return Entry<Score>::of(0, i);
    if (rule == UnmaskRule::kRandom) {
      const PhiloxBlock block = philox4x32(i >> 2, position, step, draw, key);
      return Entry<Score>::of_word(block.word[i & 3], i);
    }
    return Entry<Score>::of(uses_sums() ? uncertainty[i] : -score[i], i);
  }
};

// A value out of range cannot be reported without a wait: a quota below 1 is read as 1.
template <typename Score>
DLM_DEVICE UnmaskRow<Score> unmask_row(const UnmaskSelectParams& params, unsigned r) {
  const Index first = static_cast<Index>(r) * params.length;
  UnmaskRow<Score> row{};
  row.score = static_cast<const Score*>(params.score) + first;
  row.open = params.selectable + first;
  row.length = static_cast<unsigned>(params.length);
  row.rule = params.rule;
  if (row.uses_sums()) row.uncertainty = static_cast<const Score*>(params.uncertainty) + first;
  const int quota = params.quota ? params.quota[r] : 1;
  row.quota = quota < 1 ? 1u : static_cast<unsigned>(quota);
  row.bound = params.bound ? static_cast<const Score*>(params.bound)[r] : Score{0};
  row.key = philox_key(static_cast<PhiloxWide>(params.keys ? params.keys[r] : 0));
  row.position = static_cast<PhiloxWord>(params.position ? params.position[r] : 0);
  row.step = static_cast<PhiloxWord>(params.step ? params.step[r] : 0);
  row.draw = params.draw;
  return row;
}

struct UnmaskCounters {
  unsigned candidates;
  unsigned passing;  // candidates that the bound lets through
  unsigned prefix;   // of the ordered candidates, those that the rule takes
};
static_assert(sizeof(UnmaskCounters) <= cuda::kUnmaskCounterBytes, "counters must fit");

template <typename Score>
struct UnmaskScratch {
  Entry<Score>* entries;  // [capacity] in shared memory
  unsigned capacity;
  UnmaskCounters* counters;  // in shared memory
  unsigned* order;           // [L] in global memory, or null
};

template <typename Score>
DLM_DEVICE UnmaskScratch<Score> unmask_scratch(const UnmaskSelectParams& params, unsigned r) {
  auto* entries = reinterpret_cast<Entry<Score>*>(shared_bytes());
  unsigned* order = params.order ? params.order + static_cast<Index>(r) * params.length : nullptr;
  return {entries, params.capacity, reinterpret_cast<UnmaskCounters*>(entries + params.capacity),
          order};
}

// Clears the row's output, counts candidates and keeps the entries of those that fit, in any order.
// The counters are zero before.
template <typename Score>
DLM_DEVICE UnmaskCounters gather_candidates(const UnmaskRow<Score>& row,
                                            const UnmaskScratch<Score>& scratch, bool* selected) {
  sync_block();  // the counters are cleared, and all have read what the last call left
  unsigned passing = 0;
  for (unsigned first = 0; first < row.length; first += thread_count()) {
    const unsigned i = first + thread_index();
    const bool inside = i < row.length;
    const bool candidate = inside && row.is_candidate(i);
    if (inside) selected[i] = false;
    const unsigned place = take_place(&scratch.counters->candidates, candidate);
    if (candidate && place < scratch.capacity) scratch.entries[place] = row.entry(i);
    if (candidate && row.passes(i)) ++passing;
  }
  if (passing) atomic_add(&scratch.counters->passing, passing);
  sync_block();
  return *scratch.counters;
}

// Positions of the candidates, best first, for rows with more of them than fit shared memory:
// every candidate counts those before it, a tile of entries at a time. L^2 comparisons.
template <typename Score>
DLM_DEVICE void order_by_counting(const UnmaskRow<Score>& row,
                                  const UnmaskScratch<Score>& scratch) {
  constexpr unsigned kOwned = 4;  // candidates of a thread for which one read of the tile serves
  const auto entry_at = [&](unsigned i) {
    return i < row.length && row.is_candidate(i) ? row.entry(i) : Entry<Score>::last();
  };
  for (unsigned first = thread_index(); first - thread_index() < row.length;
       first += kOwned * thread_count()) {
    Entry<Score> mine[kOwned];
    unsigned rank[kOwned] = {};
    for (unsigned k = 0; k < kOwned; ++k) mine[k] = entry_at(first + k * thread_count());
    for (unsigned start = 0; start < row.length; start += scratch.capacity) {
      sync_block();
      for (unsigned i = thread_index(); i < scratch.capacity; i += thread_count())
        scratch.entries[i] = entry_at(start + i);
      sync_block();
      for (unsigned i = 0; i < scratch.capacity; ++i) {
        const Entry<Score> other = scratch.entries[i];
        for (unsigned k = 0; k < kOwned; ++k) rank[k] += other.before(mine[k]) ? 1 : 0;
      }
    }
    for (unsigned k = 0; k < kOwned; ++k) {
      const unsigned i = first + k * thread_count();
      if (i < row.length && row.is_candidate(i)) scratch.order[rank[k]] = i;
    }
  }
  sync_block();
}

// The candidates, best first.
template <typename Score>
struct UnmaskOrder {
  const Entry<Score>* entries;  // null: they did not fit
  const unsigned* positions;

  DLM_DEVICE unsigned operator[](unsigned k) const {
    return entries ? entries[k].position() : positions[k];
  }
};

template <typename Score>
DLM_DEVICE UnmaskOrder<Score> order_candidates(const UnmaskRow<Score>& row,
                                               const UnmaskScratch<Score>& scratch,
                                               unsigned candidates) {
  if (candidates > scratch.capacity) {
    order_by_counting(row, scratch);
    return {nullptr, scratch.order};
  }
  unsigned count = 1;
  while (count < candidates) count *= 2;
  for (unsigned k = candidates + thread_index(); k < count; k += thread_count())
    scratch.entries[k] = Entry<Score>::last();
  sort_entries(scratch.entries, count);
  return {scratch.entries, nullptr};
}

// How many of the descending scores the factor rule takes. (k + 2)(1 - c_k) never falls along the
// order, rounded or not, so those that pass are a prefix and may be counted in any order.
template <typename Score>
DLM_DEVICE void count_factor(const UnmaskRow<Score>& row, const UnmaskOrder<Score>& order,
                             unsigned candidates, UnmaskCounters* counters) {
  unsigned passing = 0;
  for (unsigned k = thread_index(); k < candidates; k += thread_count()) {
    const double c = smaller_of(larger_of(static_cast<double>(row.score[order[k]]), 0.0), 1.0);
    if (static_cast<double>(k + 2) * (1.0 - c) <= static_cast<double>(row.bound)) ++passing;
  }
  atomic_add(&counters->prefix, passing);
}

// How many of the ascending uncertainties the sum rules take. A sum depends on the order of adding:
// one warp reads 32 of them at once, and all its lanes add them one by one.
template <typename Score>
DLM_DEVICE void count_sum(const UnmaskRow<Score>& row, const UnmaskOrder<Score>& order,
                          unsigned candidates, UnmaskCounters* counters) {
  if (thread_index() >= kWarp) return;
  const auto bound = static_cast<double>(row.bound);
  double sum = 0;
  unsigned taken = 0;
  bool more = true;
  for (unsigned first = 0; first < candidates && more; first += kWarp) {
    const unsigned k = first + lane_index();
    const double mine =
        k < candidates ? larger_of(static_cast<double>(row.uncertainty[order[k]]), 0.0) : 0.0;
    for (unsigned lane = 0; lane < kWarp && first + lane < candidates && more; ++lane) {
      const double before = sum;
      sum += shuffle(mine, lane);
      // the EB-sampler leaves the largest one, here the last, out of the sum
      more = row.rule == UnmaskRule::kEb ? before <= bound : sum < bound;
      if (more) ++taken;
    }
  }
  if (thread_index() == 0) counters->prefix = taken;
}

template <typename Score>
DLM_DEVICE void unmask_select(const UnmaskSelectParams& params) {
  UnmaskRow<Score> row = unmask_row<Score>(params, block_x());
  const UnmaskScratch<Score> scratch = unmask_scratch<Score>(params, block_x());
  bool* selected = params.selected + static_cast<Index>(block_x()) * row.length;
  if (thread_index() == 0) *scratch.counters = {0, 0, 0};
  UnmaskCounters found = gather_candidates(row, scratch, selected);
  if (found.candidates == 0) {
    // Nothing, or nothing but NaN: then the leftmost position, or the loop would never end.
    row.rule = UnmaskRule::kSequential;
    row.nan_counts = true;
    row.quota = 1;
    found = gather_candidates(row, scratch, selected);
  }
  const unsigned wanted = smaller_of(row.quota, found.candidates);
  unsigned cut = larger_of(wanted, found.passing);
  const bool by_prefix = row.rule == UnmaskRule::kFactor || row.uses_sums();
  if (!by_prefix && (cut == found.passing || cut == found.candidates)) {
    // No order is needed. Every thread writes where it has cleared before.
    for (unsigned i = thread_index(); i < row.length; i += thread_count())
      if (row.is_candidate(i) && (cut == found.candidates || row.passes(i))) selected[i] = true;
    return;
  }
  const UnmaskOrder<Score> order = order_candidates(row, scratch, found.candidates);
  if (by_prefix) {
    if (row.uses_sums())
      count_sum(row, order, found.candidates, scratch.counters);
    else
      count_factor(row, order, found.candidates, scratch.counters);
    sync_block();
    cut = larger_of(1u, scratch.counters->prefix);
  }
  for (unsigned k = thread_index(); k < cut; k += thread_count()) selected[order[k]] = true;
}

}  // namespace dlm_fast::device

#define DLM_UNMASK_KERNEL DLM_KERNEL(dlm_fast::cuda::kUnmaskMaxThreads)
#define DLM_KERNELS(KERNEL)                                                              \
  KERNEL(DLM_UNMASK_KERNEL, unmask_select_f32, UnmaskSelectParams, unmask_select<float>) \
  KERNEL(DLM_UNMASK_KERNEL, unmask_select_f64, UnmaskSelectParams, unmask_select<double>)

DLM_KERNELS(DLM_DEFINE_KERNEL)
