// Masked copies of sequences, one block per copy: find the l-th smallest random key of the maskable
// tokens, then copy the sequence and hide the tokens up to it. Traffic: 10 bytes read and 8 written
// per token and copy, 12 more per masked one. Keys are computed again instead of stored: half a
// Philox block per maskable token and pass.
#pragma once

#include "common/mask_numbers.h"
#include "cuda/device/kernel_list.cuh"
#include "cuda/device/warp.cuh"
#include "cuda/mask_tokens_params.h"

namespace dlm_fast::device {

using cuda::kMaskBins;
using cuda::MaskFillParams;

constexpr unsigned kDigitBits = 8;
static_assert(1u << kDigitBits == kMaskBins, "one bin per digit");

struct MaskScratch {
  unsigned bins[kMaskBins];
  unsigned bin, before, inside;  // what find_key_bin found
  unsigned maskable;
  unsigned warp_maskable[cuda::kMaskThreads / kWarp];
  unsigned warp_hidden[cuda::kMaskThreads / kWarp];
};
static_assert(sizeof(MaskScratch) == cuda::kMaskScratchBytes, "the plan allocates the scratch");

struct TokenKeys {
  PhiloxKey key;
  PhiloxWord sample, draw;

  DLM_DEVICE PhiloxBlock pair(unsigned index) const {
    return token_key_block(index, sample, draw, key);
  }
  DLM_DEVICE Wide of_rank(unsigned rank) const {
    return wide_from_block(pair(rank / 2), rank % 2);
  }
};

// The chosen tokens: those with a smaller key, and of equal keys the lowest ranks.
struct SmallestKeys {
  Wide last_key;
  unsigned last_rank;

  DLM_DEVICE bool hold(Wide key, unsigned rank) const {
    return key < last_key || (key == last_key && rank <= last_rank);
  }
};

// The bin in which the `wanted`-th smallest number lies, by the first warp.
DLM_DEVICE void find_key_bin(MaskScratch* scratch, unsigned wanted) {
  constexpr unsigned kPerLane = kMaskBins / kWarp;
  const unsigned* mine = scratch->bins + lane_index() * kPerLane;
  unsigned count = 0;
  for (unsigned b = 0; b < kPerLane; ++b) count += mine[b];
  const unsigned end = sum_up_to_lane(count);
  unsigned before = end - count;
  if (wanted <= before || wanted > end) return;
  unsigned b = 0;
  while (before + mine[b] < wanted) before += mine[b++];
  scratch->bin = lane_index() * kPerLane + b;
  scratch->before = before;
  scratch->inside = mine[b];
}

// Digit by digit from the top: count the keys that agree so far by their next digit. Random keys
// are told apart after two or three digits.
DLM_DEVICE SmallestKeys smallest_keys(const TokenKeys& keys, unsigned tokens, unsigned wanted,
                                      MaskScratch* scratch) {
  Wide known = 0;  // digits of the last chosen key
  for (unsigned shift = 64 - kDigitBits;; shift -= kDigitBits) {
    for (unsigned b = thread_index(); b < kMaskBins; b += thread_count()) scratch->bins[b] = 0;
    sync_block();
    for (unsigned pair = thread_index(); 2 * pair < tokens; pair += thread_count()) {
      const PhiloxBlock block = keys.pair(pair);
      for (unsigned half = 0; half < 2 && 2 * pair + half < tokens; ++half) {
        const Wide key = wide_from_block(block, static_cast<int>(half));
        const Wide ahead = (key ^ known) >> shift;
        if (ahead < kMaskBins) atomic_add(&scratch->bins[(key >> shift) % kMaskBins], 1u);
      }
    }
    sync_block();
    if (thread_index() < kWarp) find_key_bin(scratch, wanted);
    sync_block();
    known |= Wide{scratch->bin} << shift;
    wanted -= scratch->before;
    if (wanted == scratch->inside) return {known | ((Wide{1} << shift) - 1), ~0u};
    if (shift == 0) break;
  }
  // More tokens than wanted have this very key, once in 2^64 pairs of tokens.
  unsigned rank = 0;
  while ((keys.of_rank(rank) == known ? --wanted : wanted) > 0) ++rank;
  return {known, rank};
}

DLM_DEVICE unsigned count_maskable(const bool* maskable, unsigned length, MaskScratch* scratch) {
  if (thread_index() == 0) scratch->maskable = 0;
  sync_block();
  unsigned mine = 0;
  for (unsigned i = thread_index(); i < length; i += thread_count()) mine += maskable[i] ? 1 : 0;
  atomic_add(&scratch->maskable, mine);
  sync_block();
  return scratch->maskable;
}

// Which ranks a copy hides.
struct HiddenRanks {
  TokenKeys keys;
  SmallestKeys smallest;
  bool none, all;   // of the smallest
  bool complement;  // the second side of a pair hides what the first leaves

  DLM_DEVICE bool operator()(unsigned rank) const {
    if (none || all) return all != complement;
    return smallest.hold(keys.of_rank(rank), rank) != complement;
  }
};

DLM_DEVICE HiddenRanks hidden_ranks(const MaskFillParams& params, unsigned copy, unsigned maskable,
                                    MaskScratch* scratch) {
  const auto copies = static_cast<unsigned>(params.copies);
  const unsigned sample = params.first + copy % copies;
  const auto key = static_cast<PhiloxWide>(params.keys[copy / copies]);
  const Index count = params.first_row[copy + 1] - params.first_row[copy];
  HiddenRanks hidden{};
  hidden.keys = {philox_key(key), params.paired ? sample / 2 : sample, params.draw};
  hidden.complement = params.paired && sample % 2 == 1;
  const Index wanted = hidden.complement ? maskable - count : count;
  hidden.none = wanted <= 0;
  hidden.all = wanted >= maskable;
  if (hidden.none || hidden.all) return hidden;
  hidden.smallest = smallest_keys(hidden.keys, maskable, static_cast<unsigned>(wanted), scratch);
  return hidden;
}

DLM_DEVICE void fill_copy(const MaskFillParams& params) {
  auto* scratch = reinterpret_cast<MaskScratch*>(shared_bytes());
  const unsigned copy = block_x(), copies = static_cast<unsigned>(params.copies);
  const Index start = params.start[copy / copies];
  const auto length = static_cast<unsigned>(params.start[copy / copies + 1] - start);
  const Index packed = start * params.copies + Index{copy % copies} * length;
  const bool* maskable = params.maskable + start;
  const HiddenRanks hidden =
      hidden_ranks(params, copy, count_maskable(maskable, length, scratch), scratch);
  unsigned rank = 0;  // of the first maskable token from here on
  Index row = params.first_row[copy];
  for (unsigned first = 0; first < length; first += thread_count()) {
    const unsigned i = first + thread_index();
    const bool inside = i < length;
    const bool open = inside && maskable[i];
    const Votes opened = count_votes(open, scratch->warp_maskable);
    const bool hide = open && hidden(rank + opened.before);
    const Votes hid = count_votes(hide, scratch->warp_hidden);
    if (inside) {
      const Index token = params.token_ids[start + i];
      params.noisy_ids[packed + i] = hide ? params.mask_id : token;
      if (hide) {
        params.rows[row + hid.before] = static_cast<int>(packed + i);
        params.targets[row + hid.before] = token;
      }
    }
    rank += opened.total;
    row += hid.total;
  }
}

}  // namespace dlm_fast::device

#define DLM_KERNELS(KERNEL) \
  KERNEL(DLM_KERNEL(dlm_fast::cuda::kMaskThreads), mask_fill, MaskFillParams, fill_copy)

DLM_KERNELS(DLM_DEFINE_KERNEL)
