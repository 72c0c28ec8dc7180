// Token and statistics of up to 64 rows from hidden states and head, without storing a logit.
//
// Traffic: the head is read once, D elements per vocabulary row; hidden rows come from L2 once per
// split; 32 bytes per row and split are written and read again. Mapping: vocabulary rows lie on the
// 16-row side of matrix instructions, tokens on the 8-column side; a block owns splits of 256
// vocabulary rows, a warp 32 of them. Numerics: products of the inputs' 16-bit numbers are summed
// in float in one order, whatever the number of rows; partial results are cut at fixed rows and
// merged in order, in double.
#pragma once

#include "cuda/device/kernel_list.cuh"
#include "cuda/device/token_choice.cuh"
// token_choice before the tiles, which ask it for the source of a row
#include "cuda/device/head_tiles.cuh"

namespace dlm_fast::device {

using cuda::DecodePartial;
using cuda::DecodeRow;

constexpr int kDecodeWarps = kDecodeThreads / static_cast<int>(kWarp);

DLM_DEVICE SoftmaxStateOf<float> state_of(const DecodePartial& partial) {
  return {partial.max, partial.sum, partial.weighted, partial.second, partial.index};
}
DLM_DEVICE Candidate candidate_of(const DecodePartial& partial) {
  return {partial.score, partial.drawn_logit, partial.drawn};
}
DLM_DEVICE DecodePartial partial_of(const SoftmaxStateOf<float>& state, const Candidate& best) {
  return {state.max, state.sum,  state.weighted, state.second, static_cast<int>(state.index),
          best.id,   best.score, best.logit};
}

// What the epilogue keeps in shared memory, in front of the stages.
template <int kTiles>
struct DecodeScratch {
  DecodeRow rows[kTiles * kTokens];
  DecodePartial partials[kTiles * kTokens][kDecodeWarps];
};

template <int kTiles>
DLM_DEVICE DecodeScratch<kTiles>& decode_scratch() {
  return *reinterpret_cast<DecodeScratch<kTiles>*>(shared_bytes());
}

// Seen by all after the next barrier.
template <int kTiles>
DLM_DEVICE void keep_rows(const TokenRows& rows) {
  const int token = static_cast<int>(thread_index());
  if (token >= kTiles * kTokens) return;
  DecodeRow row = {0, 0, 0, kIgnoredTarget};
  if (token < rows.count) {
    row.target = target_of(rows, token);
    if (rows.keys) row.key = rows.keys[token];
    if (rows.position) row.position = static_cast<unsigned>(rows.position[token]);
    if (rows.step) row.step = static_cast<unsigned>(rows.step[token]);
  }
  decode_scratch<kTiles>().rows[token] = row;
}

// Four neighbouring columns of the vocabulary, of all tokens of a thread.
struct FourColumns {
  int first;
  unsigned excluded;
  float bias[kNoiseColumns];
};

DLM_DEVICE FourColumns four_columns(const TokenRows& rows, int first) {
  FourColumns columns = {first, excluded_columns(rows, first), {}};
  for (int i = 0; i < kNoiseColumns; ++i)
    if (rows.bias && first + i < rows.vocabulary) columns.bias[i] = rows.bias[first + i];
  return columns;
}

// What four columns add to a token. Its target's logit goes out from the thread that has it.
DLM_DEVICE DecodePartial examine(const HeadDecodeParams& params, const DecodeRow& row, int token,
                                 const FourColumns& columns, const float (&logit)[kNoiseColumns]) {
  const TokenRows& rows = params.rows;
  float z[kNoiseColumns];
  SoftmaxStateOf<float> state;
  for (int i = 0; i < kNoiseColumns; ++i) {
    z[i] = columns.excluded >> i & 1
               ? -infinity_of<float>()
               : tempered(logit[i] + columns.bias[i], rows.inverse, rows.inverse_low);
    add_column<float, true>(state, z[i], columns.first + i);
    if (columns.first + i == row.target) params.target_logit[token] = z[i];
  }
  if (!rows.keys) return partial_of(state, no_candidate());
  const RowNoise noise = {philox_key(row.key), row.position, row.step, rows.draw};
  return partial_of(state, race(no_candidate(), noise, rows.draw_inverse, columns.first, z));
}

DLM_DEVICE DecodePartial merge(const DecodePartial& left, const DecodePartial& right) {
  return partial_of(merge(state_of(left), state_of(right)),
                    better_of(candidate_of(left), candidate_of(right)));
}

// Of this lane and the one whose number differs in the bit. Both get the same bits: a merge does
// not change when its sides change places.
DLM_DEVICE DecodePartial merge_across(const DecodePartial& mine, unsigned mask) {
  return merge(mine, shuffle_struct_xor(mine, mask));
}

// One split's sums become one partial result per token. A warp may lie behind the vocabulary.
template <int kTiles>
DLM_DEVICE void finish_split(const HeadDecodeParams& params, int split, bool has_columns,
                             float (&sums)[2][kTiles][4]) {
  DecodeScratch<kTiles>& scratch = decode_scratch<kTiles>();
  const int lane = static_cast<int>(thread_index() % kWarp);
  const int warp = static_cast<int>(thread_index() / kWarp);
  const FourColumns columns =
      four_columns(params.rows, split * kDecodeSplit + warp * kWarpRows + lane / 4 * 4);
  // One copy of a large body. It reads the first tile of sums; the others move up, because
  // registers have no index.
  DLM_ROLL
  for (int j = 0; j < kTiles && j * kTokens < params.rows.count; ++j) {
    DLM_ROLL
    for (int column = 0; column < 2; ++column) {
      const int token = j * kTokens + lane % 4 * 2 + column;
      float logit[kNoiseColumns];
      DLM_UNROLL
      for (int i = 0; i < kNoiseColumns; ++i)
        logit[i] = column ? sums[i / 2][0][i % 2 * 2 + 1] : sums[i / 2][0][i % 2 * 2];
      DecodePartial partial = partial_of({}, no_candidate());
      if (has_columns) {
        partial = examine(params, scratch.rows[token], token, columns, logit);
        for (unsigned mask = 4; mask < kWarp; mask *= 2) partial = merge_across(partial, mask);
      }
      if (lane < 4) scratch.partials[token][warp] = partial;
    }
    DLM_UNROLL
    for (int next = 1; next < kTiles; ++next) {
      DLM_UNROLL
      for (int i = 0; i < 8; ++i) sums[i / 4][next - 1][i % 4] = sums[i / 4][next][i % 4];
    }
  }
  sync_block();
  // Four threads per token; the next barrier of the main loop guards the scratch.
  const int token = static_cast<int>(thread_index()) / 4 % (kTiles * kTokens);
  const int pair = static_cast<int>(thread_index()) % 4 * 2;
  DecodePartial partial = merge(scratch.partials[token][pair], scratch.partials[token][pair + 1]);
  partial = merge_across(merge_across(partial, 1), 2);
  if (static_cast<int>(thread_index()) % 4 == 0 &&
      static_cast<int>(thread_index()) / 4 < params.rows.count)
    params.partials[Index{split} * params.rows.count + token] = partial;
}

template <typename Element, int kTiles>
DLM_DEVICE void head_decode(const HeadDecodeParams& params) {
  TileStream<Element, kTiles> stream(params, shared_bytes() + sizeof(DecodeScratch<kTiles>));
  keep_rows<kTiles>(params.rows);
  for (int stage = 1; stage < params.stages; ++stage) stream.copy_next();
  const int warp_row = static_cast<int>(thread_index() / kWarp) * kWarpRows;
  int slot = 0;
  for (int split = static_cast<int>(block_x()); split < stream.splits();
       split += static_cast<int>(grid_x())) {
    float sums[2][kTiles][4] = {};
    const bool has_columns = split * kDecodeSplit + warp_row < params.rows.vocabulary;
    for (int tile = 0; tile < stream.tiles(); ++tile) {
      wait_for_oldest(params.stages);
      // The oldest stage is there for all, and all are done with the one before it.
      sync_block();
      stream.copy_next();
      if (has_columns)
        add_products(stream.weight_tile(slot), stream.hidden_tile(slot), sums, Element{});
      slot = stream.slot_after(slot);
    }
    finish_split(params, split, has_columns, sums);
  }
}

// One block per row, after all splits.
DLM_DEVICE void merge_splits(const HeadDecodeParams& params) {
  const TokenRows& rows = params.rows;
  const int row = static_cast<int>(block_x());
  const int source = source_of(rows, row);
  if (source < 0 || source >= params.hidden_rows) {
    if (thread_index() == 0) write_no_row(rows, row, source < 0 ? 0.0f : nan_of<float>());
    return;
  }
  SoftmaxState state;
  Candidate best = no_candidate();
  const int splits = (rows.vocabulary + kDecodeSplit - 1) / kDecodeSplit;
  for (int split = static_cast<int>(thread_index()); split < splits;
       split += static_cast<int>(thread_count())) {
    const DecodePartial& partial = params.partials[Index{split} * rows.count + row];
    state = merge(state, widened(state_of(partial)));
    best = better_of(best, candidate_of(partial));
  }
  auto* states = reinterpret_cast<SoftmaxState*>(shared_bytes());
  state = merge_block(state, states);
  best = best_of_block(best, reinterpret_cast<Candidate*>(states + thread_count() / kWarp));
  if (thread_index() != 0) return;
  const Index target = target_of(rows, row);
  const bool inside = target >= 0 && target < rows.vocabulary;
  write_token(rows, row, state, best, inside ? params.target_logit[row] : 0.0f);
}

}  // namespace dlm_fast::device

#define DLM_DECODE_KERNEL DLM_LARGE_KERNEL(dlm_fast::device::kDecodeThreads)
#define DLM_KERNELS(KERNEL)                                                                    \
  KERNEL(DLM_DECODE_KERNEL, head_decode_bf16_8, HeadDecodeParams, head_decode<BFloat16, 1>)    \
  KERNEL(DLM_DECODE_KERNEL, head_decode_bf16_32, HeadDecodeParams, head_decode<BFloat16, 4>)   \
  KERNEL(DLM_DECODE_KERNEL, head_decode_bf16_64, HeadDecodeParams, head_decode<BFloat16, 8>)   \
  KERNEL(DLM_DECODE_KERNEL, head_decode_f16_8, HeadDecodeParams, head_decode<Float16, 1>)      \
  KERNEL(DLM_DECODE_KERNEL, head_decode_f16_32, HeadDecodeParams, head_decode<Float16, 4>)     \
  KERNEL(DLM_DECODE_KERNEL, head_decode_f16_64, HeadDecodeParams, head_decode<Float16, 8>)     \
  KERNEL(DLM_DECODE_KERNEL, head_decode_f32_8, HeadDecodeParams, head_decode<float, 1>)        \
  KERNEL(DLM_DECODE_KERNEL, head_decode_f32_32, HeadDecodeParams, head_decode<float, 4>)       \
  KERNEL(DLM_DECODE_KERNEL, head_decode_f32_64, HeadDecodeParams, head_decode<float, 8>)       \
  KERNEL(DLM_KERNEL(dlm_fast::cuda::kDecodeMergeThreads), head_decode_merge, HeadDecodeParams, \
         merge_splits)

DLM_KERNELS(DLM_DEFINE_KERNEL)
