// The token of a row: finished logits, keyed noise, the better of two candidates, the outputs.
#pragma once

#include "common/philox.h"
#include "cuda/device/row.cuh"
#include "cuda/token_rows_params.h"

namespace dlm_fast::device {

using cuda::TokenRows;

constexpr int kNoiseColumns = 4;  // columns that share a block of random words

// Which of the four columns from `first` on take no part, as bits: they are forbidden or lie behind
// the end of the vocabulary.
DLM_DEVICE unsigned excluded_columns(const TokenRows& rows, int first) {
  unsigned excluded = 0;
  for (int i = 0; i < kNoiseColumns; ++i)
    if (first + i >= rows.vocabulary) excluded |= 1u << i;
  int low = 0, high = rows.num_forbidden;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (rows.forbidden[middle] < first)
      low = middle + 1;
    else
      high = middle;
  }
  for (; low < rows.num_forbidden && rows.forbidden[low] < first + kNoiseColumns; ++low)
    excluded |= 1u << (rows.forbidden[low] - first);
  return excluded;
}

DLM_DEVICE Index lowest_allowed(const TokenRows& rows) {
  int id = 0;
  while (id < rows.num_forbidden && rows.forbidden[id] == id) ++id;
  return id;
}

DLM_DEVICE Index target_of(const TokenRows& rows, int row) {
  return rows.targets ? rows.targets[row] : kIgnoredTarget;
}

constexpr int kOutside = 0x7FFFFFFF;  // behind every row

// Row of hidden states; -1: none. A negative number is a mistake, as one behind the last row is.
DLM_DEVICE int source_of(const TokenRows& rows, int row) {
  if (rows.skip_ignored && rows.targets && rows.targets[row] == kIgnoredTarget) return -1;
  if (!rows.rows) return row;
  return rows.rows[row] < 0 ? kOutside : rows.rows[row];
}

// A column in the race for the best score.
struct Candidate {
  float score;
  float logit;
  int id;  // -1: none
};

DLM_DEVICE Candidate no_candidate() {
  return {-infinity_of<float>(), 0.0f, -1};
}

// The lower id on equal scores. Every column's score is above that of none.
DLM_DEVICE Candidate better_of(const Candidate& a, const Candidate& b) {
  const bool second = b.score > a.score || (b.score == a.score && b.id < a.id);
  return second ? b : a;
}

// The noise of a row.
struct RowNoise {
  PhiloxKey key;
  PhiloxWord position, step, draw;
};

DLM_DEVICE RowNoise noise_of(const TokenRows& rows, int row) {
  return {philox_key(rows.keys[row]),
          static_cast<PhiloxWord>(rows.position ? rows.position[row] : 0),
          static_cast<PhiloxWord>(rows.step ? rows.step[row] : 0), rows.draw};
}

// The best of `best` and of four columns from `first`, a multiple of 4, on. NaN and minus infinity
// never win.
DLM_DEVICE Candidate race(Candidate best, const RowNoise& noise, float draw_inverse, int first,
                          const float (&z)[kNoiseColumns]) {
  const PhiloxBlock block = philox4x32(static_cast<PhiloxWord>(first) >> 2, noise.position,
                                       noise.step, noise.draw, noise.key);
  for (int i = 0; i < kNoiseColumns; ++i) {
    const float gumbel = -log_of(-log_of(uniform_from_word(block.word[i])));
    const float score = multiply_add(z[i], draw_inverse, gumbel);
    if (score > best.score) best = {score, z[i], first + i};
  }
  return best;
}

DLM_DEVICE void put_token_number(float* outputs, int row, double value) {
  if (outputs) outputs[row] = static_cast<float>(value);
}

// By one thread: the same number everywhere, for rows that do not exist.
DLM_DEVICE void write_no_row(const TokenRows& rows, int row, float value) {
  if (rows.token) rows.token[row] = 0;
  float* const outputs[] = {rows.confidence, rows.lse,     rows.entropy, rows.margin,
                            rows.logprob,    rows.row_max, rows.log_sum};
  for (float* output : outputs) put_token_number(output, row, value);
}

// By one thread. Without a candidate the token is the argmax; a row without any number still gets a
// token that exists. A target outside the vocabulary cannot be reported without a wait: its
// log-probability is NaN.
DLM_DEVICE void write_token(const TokenRows& rows, int row, const SoftmaxState& state,
                            const Candidate& drawn, float target_logit) {
  const SoftmaxSummary summary = summarise(state);
  const double logit = drawn.id >= 0 ? static_cast<double>(drawn.logit) : state.max;
  const double token_logprob = (logit - state.max) - summary.log_sum;
  double logprob = token_logprob;
  if (rows.targets) {
    const Index target = rows.targets[row];
    const bool inside = target >= 0 && target < rows.vocabulary;
    logprob = (static_cast<double>(target_logit) - state.max) - summary.log_sum;
    if (!inside) logprob = target == kIgnoredTarget ? 0.0 : nan_of<double>();
  }
  if (rows.token)
    rows.token[row] = drawn.id >= 0      ? Index{drawn.id}
                      : state.index >= 0 ? Index{state.index}
                                         : lowest_allowed(rows);
  put_token_number(rows.confidence, row,
                   logit == state.max ? summary.confidence : exp_of(token_logprob));
  put_token_number(rows.lse, row, summary.lse);
  put_token_number(rows.entropy, row, summary.entropy);
  put_token_number(rows.margin, row, summary.margin);
  put_token_number(rows.logprob, row, logprob);
  put_token_number(rows.row_max, row, state.max);
  put_token_number(rows.log_sum, row, summary.log_sum);
}

// Partial results of floats are merged in double.
DLM_DEVICE SoftmaxState widened(const SoftmaxStateOf<float>& state) {
  return {state.max, state.sum, state.weighted, state.second, state.index};
}

// The best of the block's candidates, in thread 0. `scratch` holds one per warp.
DLM_DEVICE Candidate best_of_block(Candidate best, Candidate* scratch) {
  for (unsigned mask = 1; mask < kWarp; mask *= 2)
    best = better_of(best, shuffle_struct_xor(best, mask));
  if (thread_index() % kWarp == 0) scratch[thread_index() / kWarp] = best;
  sync_block();
  best = scratch[0];
  for (unsigned warp = 1; warp < thread_count() / kWarp; ++warp)
    best = better_of(best, scratch[warp]);
  return best;
}

}  // namespace dlm_fast::device
