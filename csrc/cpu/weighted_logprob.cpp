// Weighted sum of target log-probabilities with its gradients on the CPU.
//
// 6NDV flop: the logits of a block of rows are kept until their sum is known, so that they are
// computed once. The gradient of the head is read and written once per block of rows.
#include "dlm_fast/weighted_logprob.h"

#include <algorithm>

#include "cpu/head_pass.h"

namespace dlm_fast::cpu {

namespace {

template <typename Real>
class WeightedStep {
 public:
  WeightedStep(const HeadInputs& inputs, const void* row_weight, void* logprob,
               const HeadGradients& gradients)
      : in_(inputs),
        row_weight_(static_cast<const Real*>(row_weight)),
        logprob_(static_cast<Real*>(logprob)),
        out_(gradients),
        pass_(inputs) {}

  double run() {
    std::fill_n(logprob_, in_.n, Real(0));
    const bool with_gradient = out_.hidden || out_.weight || out_.bias;
    const int64_t step = with_gradient ? pass_.rows_with_logits() : pass_.kRowsWithoutLogits;
    int64_t next = 0;
    bool first = true;
    double objective = 0;
    while (next < in_.n) {
      const RowBlock rows = take(next, step);
      if (rows.size() == 0) break;
      pass_.load(rows);
      pass_.forward(false, with_gradient, [](int64_t, int64_t, const Real*) {});
      objective += finish(rows, with_gradient, first);
      first = false;
    }
    if (first) HeadPass<Real>::clear(in_, out_);
    return objective;
  }

 private:
  // The next rows whose target is not ignored.
  RowBlock take(int64_t& next, int64_t count) const {
    RowBlock rows;
    for (; next < in_.n && rows.size() < count; ++next) {
      if (in_.targets[next] == kIgnored) continue;
      rows.output.push_back(next);
      rows.hidden_row.push_back(in_.rows ? in_.rows[next] : next);
      rows.target.push_back(in_.targets[next]);
    }
    return rows;
  }

  double finish(const RowBlock& rows, bool with_gradient, bool first) {
    double objective = 0;
    std::vector<RowGradient<Real>> gradients;
    for (int64_t row = 0; row < rows.size(); ++row) {
      const SoftmaxState& state = pass_.state[row];
      const double log_sum = std::log(state.sum);
      const double logprob = (pass_.target_logit[row] - state.max) - log_sum;
      const double weight = row_weight_[rows.output[row]];
      logprob_[rows.output[row]] = static_cast<Real>(logprob);
      if (weight != 0) objective += weight * logprob;
      const double cotangent = weight / in_.temperature;
      // Rounded as where it is stored between two passes: both ways give the same bits.
      gradients.push_back(
          {state.max, static_cast<Real>(log_sum), -cotangent, 0.0, cotangent, weight != 0});
    }
    if (with_gradient) pass_.backward(gradients, out_, first);
    return objective;
  }

  const HeadInputs& in_;
  const Real* row_weight_;
  Real* logprob_;
  const HeadGradients& out_;
  HeadPass<Real> pass_;
};

template <typename Real>
void run(const HeadInputs& inputs, const void* row_weight, void* objective, void* logprob,
         const HeadGradients& gradients) {
  WeightedStep<Real> step(inputs, row_weight, logprob, gradients);
  *static_cast<Real*>(objective) = static_cast<Real>(step.run());
}

}  // namespace

void weighted_logprob(const HeadInputs& inputs, const void* row_weight, void* objective,
                      void* logprob, const HeadGradients& gradients) {
  check_head_inputs(inputs, "weighted_logprob");
  if (inputs.dtype == Dtype::kFloat64)
    run<double>(inputs, row_weight, objective, logprob, gradients);
  else
    with_rounded_weight(inputs, gradients, [&](const HeadGradients& wide) {
      run<float>(inputs, row_weight, objective, logprob, wide);
    });
}

}  // namespace dlm_fast::cpu
