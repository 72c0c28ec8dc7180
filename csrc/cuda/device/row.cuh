// One row of logits: its statistics and its gradient, by all threads of a block.
#pragma once

#include "cuda/device/numbers.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/row_stats_params.h"

namespace dlm_fast::device {

using cuda::RowGradParams;
using cuda::RowStatsParams;

constexpr Index kIgnoredTarget = -100;
constexpr int kLanes = 4;  // columns that a thread reads at once

template <typename Real>
struct alignas(4 * sizeof(Real) > 16 ? 16 : 4 * sizeof(Real)) Quad {
  Real value[kLanes];
};

// logit / temperature, by the reciprocal in two parts.
template <typename Real>
DLM_DEVICE Real tempered(Real logit, Real inverse, Real inverse_low) {
  // the second part would turn infinity into NaN: infinity * 0
  if (logit - logit != 0) return logit * inverse;
  return multiply_add(logit, inverse, logit * inverse_low);
}

// Columns [first, first + count) of a row, wherever they lie; first is a multiple of 4.
template <typename Real>
struct RowSlice {
  const Real* raw;   // of column `first`
  const Real* bias;  // of column 0, or null
  int first, count;
  Real inverse, inverse_low;

  DLM_DEVICE Real finish(Real logit, int column) const {
    if (bias) logit += bias[first + column];
    return tempered(logit, inverse, inverse_low);
  }
  // z of four columns; minus infinity behind the end.
  DLM_DEVICE Quad<Real> read(int column) const {
    Quad<Real> quad;
    if (column + kLanes <= count) {
      quad = *reinterpret_cast<const Quad<Real>*>(raw + column);
      for (int lane = 0; lane < kLanes; ++lane)
        quad.value[lane] = finish(quad.value[lane], column + lane);
      return quad;
    }
    for (int lane = 0; lane < kLanes; ++lane)
      quad.value[lane] =
          column + lane < count ? finish(raw[column + lane], column + lane) : -infinity_of<Real>();
    return quad;
  }
};

template <typename Real>
DLM_DEVICE RowSlice<Real> slice_of(const RowStatsParams& params, int row, int first, int count) {
  const Real* logits = static_cast<const Real*>(params.logits) + row * params.row_stride + first;
  const auto inverse = static_cast<Real>(params.inverse);
  const auto inverse_low = static_cast<Real>(params.inverse_low);
  return {logits, static_cast<const Real*>(params.bias), first, count, inverse, inverse_low};
}

DLM_DEVICE Index target_of(const RowStatsParams& params, int row) {
  return params.targets ? params.targets[row] : Index{-1};
}

// z of the target, 0 where there is none. `logits` are the row's in global memory.
template <typename Real>
DLM_DEVICE Real target_logit(const RowStatsParams& params, int row, Index target) {
  if (target < 0 || target >= params.vocabulary) return 0;
  const RowSlice<Real> whole = slice_of<Real>(params, row, 0, params.vocabulary);
  const int column = static_cast<int>(target);
  return whole.finish(whole.raw[column], column);
}

template <typename Real, bool kTop>
DLM_DEVICE void add_column(SoftmaxStateOf<Real>& state, Real z, Index column) {
  if (z == -infinity_of<Real>()) return;
  if (z > state.max) {
    if (kTop) state.second = state.max;
    if (kTop) state.index = column;
    rescale(state, z);
    state.max = z;
  } else if (kTop && z > state.second) {
    state.second = z;
  }
  const Real shift = z - state.max;
  const Real term = exp_of(shift);
  state.sum += term;
  state.weighted = multiply_add(term, shift, state.weighted);
}

// What this thread's columns of the slice hold.
template <typename Real, bool kTop>
DLM_DEVICE SoftmaxStateOf<Real> thread_state(const RowSlice<Real>& slice) {
  SoftmaxStateOf<Real> state;
  const int step = static_cast<int>(thread_count()) * kLanes;
  for (int column = static_cast<int>(thread_index()) * kLanes; column < slice.count;
       column += step) {
    const Quad<Real> quad = slice.read(column);
    for (int lane = 0; lane < kLanes; ++lane)
      add_column<Real, kTop>(state, quad.value[lane], Index{slice.first} + column + lane);
  }
  return state;
}

template <typename Real>
DLM_DEVICE void put(void* outputs, int row, Real value) {
  if (outputs) static_cast<Real*>(outputs)[row] = value;
}

// By one thread. A row without a target has logprob 0; an ignored row has zeros everywhere. A
// target outside the vocabulary cannot be reported without a wait: its log-probability is NaN.
template <typename Real>
DLM_DEVICE void write_stats(const RowStatsParams& params, int row, Index target, Real target_z,
                            const SoftmaxStateOf<Real>& state) {
  const bool ignored = target == kIgnoredTarget;
  const SoftmaxSummaryOf<Real> summary = summarise(state);
  const Real zero = 0;
  const bool inside = target >= 0 && target < params.vocabulary;
  const Real logprob = inside ? (target_z - state.max) - summary.log_sum : nan_of<Real>();
  put(params.logprob, row, ignored || !params.targets ? zero : logprob);
  put(params.lse, row, ignored ? zero : summary.lse);
  put(params.entropy, row, ignored ? zero : summary.entropy);
  put(params.row_max, row, ignored ? zero : state.max);
  put(params.log_sum, row, ignored ? zero : summary.log_sum);
  put(params.confidence, row, summary.confidence);
  put(params.margin, row, summary.margin);
  if (params.argmax) params.argmax[row] = state.index;
}

template <typename Real>
struct Cotangents {
  Real logprob, lse, entropy;
  DLM_DEVICE bool none() const {
    return logprob == 0 && lse == 0 && entropy == 0;
  }
};

template <typename Real>
DLM_DEVICE Real cotangent(const void* values, int row) {
  return values ? static_cast<const Real*>(values)[row] : Real{0};
}

// Zeros for an ignored row. A target outside the vocabulary cannot be reported without a wait; NaN
// tells of it.
template <typename Real>
DLM_DEVICE Cotangents<Real> cotangents_of(const RowGradParams& params, int row, Index target) {
  if (target == kIgnoredTarget) return {0, 0, 0};
  if (target < 0 || target >= params.row.vocabulary) return {nan_of<Real>(), 0, 0};
  return {cotangent<Real>(params.logprob_grad, row), cotangent<Real>(params.lse_grad, row),
          cotangent<Real>(params.entropy_grad, row)};
}

// d z_v = (a (1[v = y] - p) + b p - e p (ln p + entropy)) / temperature, rounded once when stored.
template <typename Real, typename Stored>
DLM_DEVICE void write_grad(const RowGradParams& params, const RowSlice<Real>& slice, int row,
                           Index target, Real max, Real log_sum, Real entropy) {
  const Cotangents<Real> grad = cotangents_of<Real>(params, row, target);
  Stored* out = static_cast<Stored*>(params.logits_grad) + row * params.grad_stride + slice.first;
  const int step = static_cast<int>(thread_count()) * kLanes;
  for (int column = static_cast<int>(thread_index()) * kLanes; column < slice.count;
       column += step) {
    const Quad<Real> quad = slice.read(column);
    for (int lane = 0; lane < kLanes && column + lane < slice.count; ++lane) {
      const Real log_p = (quad.value[lane] - max) - log_sum;
      const Real p = exp_of(log_p);
      Real dz = (grad.lse - grad.logprob) * p;
      if (p > 0) dz -= grad.entropy * p * (log_p + entropy);
      if (slice.first + column + lane == target) dz += grad.logprob;
      dz = multiply_add(dz, slice.inverse, dz * slice.inverse_low);
      store_number(out + column + lane, grad.none() ? Real{0} : dz);
    }
  }
}

// Clears the hidden row of a row that takes no part; `part` of `parts` blocks share the work.
template <typename Real, typename Stored>
DLM_DEVICE void clear_hidden(const RowGradParams& params, int row, Index target, unsigned part,
                             unsigned parts) {
  if (!params.hidden || !cotangents_of<Real>(params, row, target).none()) return;
  Stored* hidden = static_cast<Stored*>(params.hidden) + static_cast<Index>(row) * params.width;
  const int step = static_cast<int>(thread_count() * parts);
  for (int column = static_cast<int>(part * thread_count() + thread_index()); column < params.width;
       column += step)
    store_number(hidden + column, Real{0});
}

}  // namespace dlm_fast::device
