// Merges attention states by log-sum-exp on the CPU.
//
// Traffic: every state is read once, every output written once. Sums are taken in the order of the
// states, in float (double for float64).
#include "dlm_fast/attention_merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/parallel_for.h"
#include "cpu/vec_portable.h"
#include "dlm_fast/check.h"

namespace dlm_fast::cpu {

namespace {

template <typename Real>
Real read(const void* data, Dtype dtype, int64_t i) {
  if (dtype == Dtype::kBFloat16)
    return static_cast<Real>(portable::float_from_bfloat16(static_cast<const uint16_t*>(data)[i]));
  if (dtype == Dtype::kFloat16)
    return static_cast<Real>(portable::float_from_half(static_cast<const uint16_t*>(data)[i]));
  return static_cast<const Real*>(data)[i];
}

template <typename Real>
void add_state(const AttentionMergeInputs& in, int64_t state_head, Real weight, Real* sum) {
  const int64_t first = state_head * in.width;
  if (in.dtype == Dtype::kFloat32 || in.dtype == Dtype::kFloat64) {
    const Real* numbers = static_cast<const Real*>(in.states) + first;
    for (int64_t d = 0; d < in.width; ++d) sum[d] += weight * numbers[d];
    return;
  }
  for (int64_t d = 0; d < in.width; ++d)
    sum[d] += weight * read<Real>(in.states, in.dtype, first + d);
}

template <typename Real>
void merge_head(const AttentionMergeInputs& in, int64_t row, int64_t head, Real* sum, Real* lse) {
  constexpr Real kNothing = -std::numeric_limits<Real>::infinity();
  const Real* state_lse = static_cast<const Real*>(in.state_lse);
  const int64_t begin = in.indptr[row], end = in.indptr[row + 1];
  Real max = kNothing;
  for (int64_t s = begin; s < end; ++s) {
    const Real one = state_lse[s * in.heads + head];
    // NaN stays: an empty row must not hide it.
    if (one > max || one != one) max = one;
  }
  std::fill_n(sum, in.width, Real(0));
  *lse = max;
  if (max == kNothing) return;
  Real total = 0;
  for (int64_t s = begin; s < end; ++s) {
    const Real one = state_lse[s * in.heads + head];
    if (one == kNothing) continue;
    const Real weight = std::exp(one - max);
    total += weight;
    add_state(in, s * in.heads + head, weight, sum);
  }
  *lse = max + std::log(total);
  for (int64_t d = 0; d < in.width; ++d) sum[d] /= total;
}

template <typename Real>
void merge(const AttentionMergeInputs& in, void* out, void* lse) {
  parallel_for(in.num_rows, in.num_threads, [&](int64_t row) {
    const int64_t place = in.places ? in.places[row] : row;
    for (int64_t head = 0; head < in.heads; ++head) {
      const int64_t at = place * in.heads + head;
      merge_head(in, row, head, static_cast<Real*>(out) + at * in.width,
                 static_cast<Real*>(lse) + at);
    }
  });
}

}  // namespace

void attention_merge(const AttentionMergeInputs& in, void* out, void* lse) {
  DLM_CHECK(in.num_rows >= 0 && in.num_states >= 0 && in.heads > 0 && in.width > 0,
            "merge_attention_states: sizes must not be negative, heads and width not zero");
  DLM_CHECK(in.dtype >= Dtype::kFloat32 && in.dtype <= Dtype::kFloat64 && in.num_threads > 0,
            "merge_attention_states: unknown element type, or no threads");
  for (int64_t row = 0; row < in.num_rows; ++row)
    DLM_CHECK(in.indptr[row] >= 0 && in.indptr[row] <= in.indptr[row + 1] &&
                  in.indptr[row + 1] <= in.num_states,
              "merge_attention_states: indptr must ascend from 0 or more to at most the number of "
              "states");
  if (in.dtype == Dtype::kFloat64)
    merge<double>(in, out, lse);
  else
    merge<float>(in, out, lse);
}

}  // namespace dlm_fast::cpu
