// Weighted sum of target log-probabilities with its gradients on the CPU.
//
// 6NDV flop: the logits of a block of rows are kept until their sums are known, so that they are
// computed once; where they do not fit, those of the last part of the vocabulary are computed
// again. The gradient of the head is read and written once per block of rows.
#include "dlm_fast/weighted_logprob.h"

#include <algorithm>

#include "cpu/head_backward.h"

namespace dlm_fast::cpu {

namespace {

template <typename Real>
class WeightedStep {
 public:
  WeightedStep(const HeadInputs& inputs, const void* row_weight, void* logprob)
      : in_(inputs),
        row_weight_(static_cast<const Real*>(row_weight)),
        logprob_(static_cast<Real*>(logprob)),
        pass_(inputs),
        outputs_(outputs_with_target(inputs)) {
    std::fill_n(logprob_, in_.n, Real(0));
  }

  double run(const HeadGradients& out) {
    const int64_t total = static_cast<int64_t>(outputs_.size());
    if (total == 0) clear_gradients(in_, out);
    double objective = 0;
    if (!out.hidden && !out.weight && !out.bias) {
      for (int64_t first = 0; first < total; first += pass_.kRowsWithoutLogits)
        objective += forward(rows_of(in_, outputs_, first, pass_.kRowsWithoutLogits), 0);
      return objective;
    }
    const int64_t step = rows_of_sweep(pass_, out, total);
    with_rounded_weight(in_, out, total <= step, [&](const HeadGradients& sums) {
      HeadBackward<Real> backward(in_, sums);
      for (int64_t first = 0; first < total; first += step) {
        const RowBlock rows = rows_of(in_, outputs_, first, step);
        objective += forward(rows, pass_.blocks_to_keep(rows.size()));
        if (pass_.kept_blocks() == pass_.blocks()) pass_.drop_rows();
        backward.run(pass_, gradients_, first == 0);
      }
    });
    return objective;
  }

 private:
  // Log-probabilities, their part of the objective, and what the gradient needs.
  double forward(const RowBlock& rows, int64_t kept_blocks) {
    pass_.load(rows);
    pass_.forward(false, kept_blocks, [](int64_t, int64_t, const Real*) {});
    double objective = 0;
    gradients_.clear();
    for (int64_t row = 0; row < rows.size(); ++row) {
      const SoftmaxState& state = pass_.state[row];
      const double log_sum = std::log(state.sum);
      const double logprob = (pass_.target_logit[row] - state.max) - log_sum;
      const double weight = row_weight_[rows.output[row]];
      logprob_[rows.output[row]] = static_cast<Real>(logprob);
      if (weight != 0) objective += weight * logprob;
      const double cotangent = weight / in_.temperature;
      // Rounded as where it is stored between two passes: both ways give the same bits.
      gradients_.push_back(
          {state.max, static_cast<Real>(log_sum), -cotangent, 0.0, cotangent, weight != 0});
    }
    return objective;
  }

  const HeadInputs& in_;
  const Real* row_weight_;
  Real* logprob_;
  HeadPass<Real> pass_;
  std::vector<int64_t> outputs_;  // those whose target is not ignored
  std::vector<RowGradient<Real>> gradients_;
};

template <typename Real>
void run(const HeadInputs& inputs, const void* row_weight, void* objective, void* logprob,
         const HeadGradients& gradients) {
  WeightedStep<Real> step(inputs, row_weight, logprob);
  *static_cast<Real*>(objective) = static_cast<Real>(step.run(gradients));
}

}  // namespace

void weighted_logprob(const HeadInputs& inputs, const void* row_weight, void* objective,
                      void* logprob, const HeadGradients& gradients) {
  check_head_inputs(inputs, "weighted_logprob");
  if (inputs.dtype == Dtype::kFloat64)
    run<double>(inputs, row_weight, objective, logprob, gradients);
  else
    run<float>(inputs, row_weight, objective, logprob, gradients);
}

}  // namespace dlm_fast::cpu
