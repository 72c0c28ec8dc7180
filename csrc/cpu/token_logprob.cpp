// Log-probability, log-sum-exp and entropy of selected rows on the CPU, forward and backward.
//
// Forward 2NDV flop, backward 4NDV with the logits that the forward pass has kept, and 2NDV more
// for those it had no room for, which are computed again, block by block.
#include "dlm_fast/token_logprob.h"

#include <algorithm>

#include "cpu/head_backward.h"

namespace dlm_fast::cpu {

namespace {

static_assert(kKeptColumns % kBlockV == 0 && kKeptRows % (2 * 16) == 0,
              "whole blocks of the vocabulary and panels of every instruction set");

// The room for logits, in equal parts for the blocks of rows that the backward pass takes.
template <typename Real>
class KeptParts {
 public:
  KeptParts(const KeptLogits& kept, int64_t num_rows)
      : data_(static_cast<char*>(kept.data)),
        bytes_(kept.bytes / std::max<int64_t>(ceil_div(num_rows, kRowsWithGradient), 1) /
               kAlignment * kAlignment) {}

  int64_t blocks(const HeadPass<Real>& pass, const RowBlock& rows) const {
    return pass.blocks_to_keep(rows.size(), bytes_);
  }
  Real* place(int64_t first_row) const {
    return reinterpret_cast<Real*>(data_ + first_row / kRowsWithGradient * bytes_);
  }
  bool any() const {
    return bytes_ > 0;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  char* data_;
  int64_t bytes_;  // of a part
};

template <typename Real>
void forward(const HeadInputs& in, const TokenLogprobOutputs& out, const KeptLogits& logits) {
  Real* const outputs[5] = {static_cast<Real*>(out.logprob), static_cast<Real*>(out.lse),
                            static_cast<Real*>(out.entropy), static_cast<Real*>(out.row_max),
                            static_cast<Real*>(out.log_sum)};
  for (Real* output : outputs) std::fill_n(output, in.n, Real(0));
  const std::vector<int64_t> kept = outputs_with_target(in);
  const int64_t total = static_cast<int64_t>(kept.size());
  const KeptParts<Real> parts(logits, total);

  HeadPass<Real> pass(in);
  const int64_t step = parts.any() ? kRowsWithGradient : pass.kRowsWithoutLogits;
  for (int64_t first = 0; first < total; first += step) {
    const RowBlock rows = rows_of(in, kept, first, step);
    pass.load(rows);
    const auto look = [](int64_t, int64_t, const Real*) {};
    if (parts.any())
      pass.forward(false, parts.blocks(pass, rows), look, parts.place(first));
    else
      pass.forward(false, 0, look);
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

// A row without a cotangent is not read: zero times NaN would poison the head's gradient.
template <typename Real>
bool has_cotangent(const TokenLogprobCotangents& cotangents, int64_t i) {
  return at<Real>(cotangents.logprob, i) != 0 || at<Real>(cotangents.lse, i) != 0 ||
         at<Real>(cotangents.entropy, i) != 0;
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
                         has_cotangent<Real>(cotangents, i)});
  }
  return gradients;
}

template <typename Real>
void backward(const HeadInputs& in, const TokenLogprobOutputs& fwd, const KeptLogits& logits,
              const TokenLogprobCotangents& cotangents, const HeadGradients& out) {
  const std::vector<int64_t> all = outputs_with_target(in);
  std::vector<int64_t> active;
  for (const int64_t i : all)
    if (has_cotangent<Real>(cotangents, i)) active.push_back(i);
  if (active.empty()) return clear_gradients(in, out);
  // Kept logits lie with those of all rows. To compute those of fewer rows again, a third more work
  // for each, pays only where many have no cotangent.
  const bool use_kept = logits.bytes > 0 && 4 * active.size() >= 3 * all.size();
  const std::vector<int64_t>& taken = use_kept ? all : active;

  const int64_t total = static_cast<int64_t>(taken.size());
  const KeptParts<Real> parts(use_kept ? logits : KeptLogits{}, total);
  with_rounded_weight(in, out, total <= kRowsWithGradient, [&](const HeadGradients& sums) {
    HeadPass<Real> pass(in);
    HeadBackward<Real> step(in, sums);
    for (int64_t first = 0; first < total; first += kRowsWithGradient) {
      const RowBlock rows = rows_of(in, taken, first, kRowsWithGradient);
      pass.load(rows);
      if (use_kept) pass.use_kept(parts.blocks(pass, rows), parts.place(first));
      if (pass.kept_blocks() == pass.blocks()) pass.drop_rows();
      step.run(pass, row_gradients<Real>(rows, fwd, cotangents, in.temperature), first == 0);
    }
  });
}

}  // namespace

void token_logprob(const HeadInputs& inputs, const TokenLogprobOutputs& outputs,
                   const KeptLogits& kept) {
  check_head_inputs(inputs, "token_logprob");
  if (inputs.dtype == Dtype::kFloat64)
    forward<double>(inputs, outputs, kept);
  else
    forward<float>(inputs, outputs, kept);
}

void token_logprob_bwd(const HeadInputs& inputs, const TokenLogprobOutputs& forward,
                       const KeptLogits& kept, const TokenLogprobCotangents& cotangents,
                       const HeadGradients& gradients) {
  check_head_inputs(inputs, "token_logprob_bwd");
  if (inputs.dtype == Dtype::kFloat64)
    backward<double>(inputs, forward, kept, cotangents, gradients);
  else
    backward<float>(inputs, forward, kept, cotangents, gradients);
}

}  // namespace dlm_fast::cpu
