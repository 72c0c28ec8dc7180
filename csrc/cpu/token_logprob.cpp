// Log-probability, log-sum-exp and entropy of selected rows on the CPU, forward and backward.
//
// Forward 2NDV flop, backward 6NDV: the logits are computed again, block by block, instead of being
// kept.
#include "dlm_fast/token_logprob.h"

#include <algorithm>

#include "cpu/head_backward.h"

namespace dlm_fast::cpu {

namespace {

// Rows [first, first + count) of those that take part, listed by their position in the outputs.
RowBlock slice(const HeadInputs& in, const std::vector<int64_t>& kept, int64_t first,
               int64_t count) {
  RowBlock rows;
  const int64_t end = std::min<int64_t>(first + count, static_cast<int64_t>(kept.size()));
  for (int64_t i = first; i < end; ++i) {
    const int64_t output = kept[i];
    rows.output.push_back(output);
    rows.hidden_row.push_back(in.rows ? in.rows[output] : output);
    rows.target.push_back(in.targets[output]);
  }
  return rows;
}

template <typename Real>
void forward(const HeadInputs& in, const TokenLogprobOutputs& out) {
  Real* const outputs[5] = {static_cast<Real*>(out.logprob), static_cast<Real*>(out.lse),
                            static_cast<Real*>(out.entropy), static_cast<Real*>(out.row_max),
                            static_cast<Real*>(out.log_sum)};
  for (Real* output : outputs) std::fill_n(output, in.n, Real(0));
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < in.n; ++i)
    if (in.targets[i] != kIgnored) kept.push_back(i);

  HeadPass<Real> pass(in);
  const int64_t step = pass.kRowsWithoutLogits, total = static_cast<int64_t>(kept.size());
  for (int64_t first = 0; first < total; first += step) {
    const RowBlock rows = slice(in, kept, first, step);
    pass.load(rows);
    pass.forward(false, 0, [](int64_t, int64_t, const Real*) {});
    for (int64_t row = 0; row < rows.size(); ++row) {
      const SoftmaxSummary summary = summarise(pass.state[row]);
      const int64_t i = rows.output[row];
      const double shifted = pass.target_logit[row] - pass.state[row].max;
      const double values[5] = {shifted - summary.log_sum, summary.lse, summary.entropy,
                                pass.state[row].max, summary.log_sum};
      for (int j = 0; j < 5; ++j) outputs[j][i] = static_cast<Real>(values[j]);
    }
  }
}

// A cotangent that is not given is zero.
template <typename Real>
double at(const void* data, int64_t i) {
  return data ? static_cast<double>(static_cast<const Real*>(data)[i]) : 0.0;
}

template <typename Real>
std::vector<RowGradient<Real>> row_gradients(const RowBlock& rows, const TokenLogprobOutputs& fwd,
                                             const TokenLogprobCotangents& cotangents,
                                             double temperature) {
  std::vector<RowGradient<Real>> gradients;
  for (const int64_t i : rows.output) {
    const double a = at<Real>(cotangents.logprob, i), b = at<Real>(cotangents.lse, i);
    const double e = at<Real>(cotangents.entropy, i), entropy = at<Real>(fwd.entropy, i);
    gradients.push_back({at<Real>(fwd.row_max, i), at<Real>(fwd.log_sum, i),
                         (b - a - e * entropy) / temperature, -e / temperature, a / temperature,
                         true});
  }
  return gradients;
}

template <typename Real>
void backward(const HeadInputs& in, const TokenLogprobOutputs& fwd,
              const TokenLogprobCotangents& cotangents, const HeadGradients& out) {
  // A row without a cotangent is not read: zero times NaN would poison the head's gradient.
  std::vector<int64_t> kept;
  for (int64_t i = 0; i < in.n; ++i)
    if (in.targets[i] != kIgnored &&
        (at<Real>(cotangents.logprob, i) != 0 || at<Real>(cotangents.lse, i) != 0 ||
         at<Real>(cotangents.entropy, i) != 0))
      kept.push_back(i);
  if (kept.empty()) return clear_gradients(in, out);

  const int64_t total = static_cast<int64_t>(kept.size());
  with_rounded_weight(in, out, total <= kRowsWithGradient, [&](const HeadGradients& sums) {
    HeadPass<Real> pass(in);
    HeadBackward<Real> step(in, sums);
    for (int64_t first = 0; first < total; first += kRowsWithGradient) {
      const RowBlock rows = slice(in, kept, first, kRowsWithGradient);
      pass.load(rows);
      step.run(pass, row_gradients<Real>(rows, fwd, cotangents, in.temperature), first == 0);
    }
  });
}

}  // namespace

void token_logprob(const HeadInputs& inputs, const TokenLogprobOutputs& outputs) {
  check_head_inputs(inputs, "token_logprob");
  if (inputs.dtype == Dtype::kFloat64)
    forward<double>(inputs, outputs);
  else
    forward<float>(inputs, outputs);
}

void token_logprob_bwd(const HeadInputs& inputs, const TokenLogprobOutputs& forward,
                       const TokenLogprobCotangents& cotangents, const HeadGradients& gradients) {
  check_head_inputs(inputs, "token_logprob_bwd");
  if (inputs.dtype == Dtype::kFloat64)
    backward<double>(inputs, forward, cotangents, gradients);
  else
    backward<float>(inputs, forward, cotangents, gradients);
}

}  // namespace dlm_fast::cpu
