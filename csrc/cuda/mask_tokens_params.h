// What the kernel of the Monte-Carlo masks reads and writes: one masked copy per block.
#pragma once

#include "cuda/device/plain_types.cuh"

namespace dlm_fast::cuda {

constexpr unsigned kMaskThreads = 256;
constexpr unsigned kMaskBins = 256;
constexpr unsigned kMaskScratchBytes = 4 * (kMaskBins + 4 + 2 * kMaskThreads / 32);

// Letters: R sequences, T tokens, N masked tokens; copy c is sample first + c % copies of sequence
// c / copies.
struct MaskFillParams {
  int copies;  // of a sequence
  unsigned first;
  unsigned draw;
  bool paired;  // samples 2p and 2p + 1 are complements
  device::Index mask_id;
  const device::Index* keys;       // [R]
  const device::Index* start;      // [R + 1], first token of each sequence
  const device::Index* first_row;  // [R * copies + 1], first of the copy's entries in rows, targets
  const device::Index* token_ids;  // [T]
  const bool* maskable;            // [T]
  device::Index* noisy_ids;        // [copies * T]
  int* rows;                       // [N]
  device::Index* targets;          // [N]
};

}  // namespace dlm_fast::cuda
