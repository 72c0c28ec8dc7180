// What the kernels that add one sample's gradients read and write: one chunk of a tensor per block.
#pragma once

#include "cuda/device/plain_types.cuh"

namespace dlm_fast::cuda {

constexpr unsigned kAxpyThreads = 256;
constexpr int kAxpyNumbers = 16384;  // of a chunk
// Tensors of one launch: the struct is passed by value and must stay below 4 KB.
constexpr int kAxpyTensors = 64;
constexpr unsigned kAxpyScratchBytes = 2 * 8 * kAxpyThreads / 32;  // two sums per warp

struct AxpyEntry {
  void* main;  // null where only the squares are wanted
  const void* grad;
  device::Index size;
  device::Wide key;  // of the random bits
  int first_chunk;   // among the blocks of this launch
  short main_dtype;  // as dlm_fast::Dtype counts
  short grad_dtype;
};

struct AxpyParams {
  AxpyEntry entries[kAxpyTensors];
  int count;  // of entries
  unsigned step;
  double scale;
  const double* factor;  // of clipping; null: 1
  double* square;        // [blocks], sums of this launch's chunks
  double* inner;         // [blocks]
};
static_assert(sizeof(AxpyParams) <= 4000, "kernel parameters");

// Adds up the chunks' sums: block 0 the squares, block 1 the inner products.
struct AxpyTotalParams {
  const double* partial;  // [2, chunks]
  device::Index chunks;
  double max_norm, square_elsewhere;
  bool find_factor;
  double* result;  // square, inner product, clip factor
};

}  // namespace dlm_fast::cuda
