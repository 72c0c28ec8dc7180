// Token and statistics of selected rows on the CPU.
//
// 2NDV flop. Noise is drawn on the hot block of logits, so an exact draw costs no second sweep.
// Top-k and top-p need whole rows: then the logits of a block of rows are kept.
#include "dlm_fast/token_stats.h"

#include <algorithm>

#include "cpu/head_filter.h"
#include "cpu/head_pass.h"
#include "dlm_fast/check.h"

namespace dlm_fast::cpu {

namespace {

template <typename Real>
struct Choice {
  int64_t token;
  Real logit;
};

template <typename Real>
class StatsStep {
 public:
  StatsStep(const HeadInputs& inputs, const TokenDraw& draw, const TokenStatsOutputs& outputs)
      : in_(inputs), draw_(draw), out_(outputs), pass_(inputs) {
    while (lowest_allowed_ < in_.num_forbidden && in_.forbidden[lowest_allowed_] == lowest_allowed_)
      ++lowest_allowed_;
  }

  void run() {
    const bool filtered =
        draw_.temperature > 0 && ((draw_.top_k > 0 && draw_.top_k < in_.v) || draw_.top_p < 1);
    const int64_t step = filtered ? pass_.rows_with_logits() : pass_.kRowsWithoutLogits;
    for (int64_t first = 0; first < in_.n; first += step) {
      const RowBlock rows = take(first, std::min(in_.n, first + step));
      pass_.load(rows);
      if (draw_.temperature > 0 && !filtered) begin_sampling(rows);
      const bool sampling = draw_.temperature > 0 && !filtered;
      pass_.forward(true, filtered ? pass_.blocks() : 0,
                    [&](int64_t block, int64_t p, const Real* logits) {
                      if (sampling) sample(block, p, logits);
                    });
      std::vector<Choice<Real>> choices(static_cast<size_t>(rows.size()));
      parallel_for(rows.size(), in_.num_threads, [&](int64_t row) {
        choices[row] = filtered   ? filtered_choice(rows, row)
                       : sampling ? sampled_choice(row)
                                  : greedy_choice(row);
      });
      for (int64_t row = 0; row < rows.size(); ++row) write(rows, row, choices[row]);
    }
  }

 private:
  RowBlock take(int64_t first, int64_t end) const {
    RowBlock rows;
    for (int64_t i = first; i < end; ++i) rows.add(in_, i);
    return rows;
  }

  // A row of NaN has no largest logit; it still gets a token that exists.
  Choice<Real> greedy_choice(int64_t row) const {
    const SoftmaxState& state = pass_.state[row];
    if (state.index < 0) return {lowest_allowed_, static_cast<Real>(state.max)};
    return {state.index, static_cast<Real>(state.max)};
  }

  // --- noise

  void begin_sampling(const RowBlock& rows) {
    const int64_t lanes = pass_.panels() * pass_.panel();
    noise_.assign(static_cast<size_t>(4 * lanes), 0);
    for (int64_t row = 0; row < rows.size(); ++row) {
      const int64_t i = rows.output[row];
      const PhiloxKey key = philox_key(static_cast<PhiloxWide>(draw_.keys[i]));
      noise_[row] = key.low;
      noise_[lanes + row] = key.high;
      noise_[2 * lanes + row] = static_cast<uint32_t>(draw_.position ? draw_.position[i] : 0);
      noise_[3 * lanes + row] = static_cast<uint32_t>(draw_.step ? draw_.step[i] : 0);
    }
    best_.assign(static_cast<size_t>(3 * pass_.chunks() * lanes), Real(-1));
    for (int64_t chunk = 0; chunk < pass_.chunks(); ++chunk)
      std::fill_n(best_of(chunk, 0).score, lanes, -std::numeric_limits<Real>::infinity());
  }

  BestLanes<Real> best_of(int64_t chunk, int64_t p) {
    const int64_t lanes = pass_.panels() * pass_.panel();
    Real* base = best_.data() + 3 * chunk * lanes + p * pass_.panel();
    return {base, base + lanes, base + 2 * lanes};
  }

  void sample(int64_t block, int64_t p, const Real* logits) {
    const int64_t lanes = pass_.panels() * pass_.panel();
    const uint32_t* base = noise_.data() + p * pass_.panel();
    const NoiseLanes noise{base, base + lanes, base + 2 * lanes, base + 3 * lanes, draw_.draw};
    pass_.kernels().sample(logits, {pass_.block_v(block), block * kBlockV},
                           static_cast<Real>(1.0 / draw_.temperature), noise, pass_.vectors_of(p),
                           best_of(block / kChunkBlocks, p));
  }

  Choice<Real> sampled_choice(int64_t row) {
    const int64_t p = row / pass_.panel(), lane = row % pass_.panel();
    Real score = -std::numeric_limits<Real>::infinity();
    Choice<Real> choice = greedy_choice(row);
    for (int64_t chunk = 0; chunk < pass_.chunks(); ++chunk) {
      const BestLanes<Real> best = best_of(chunk, p);
      if (best.index[lane] < 0 || !(best.score[lane] > score)) continue;
      score = best.score[lane];
      choice = {static_cast<int64_t>(best.index[lane]), best.logit[lane]};
    }
    return choice;
  }

  Choice<Real> filtered_choice(const RowBlock& rows, int64_t row) {
    const int64_t p = row / pass_.panel(), lane = row % pass_.panel();
    std::vector<Candidate<Real>> list;
    for (int64_t v = 0; v < in_.v; ++v) {
      const Real z = pass_.kept_logits(v / kBlockV, p)[(v % kBlockV) * pass_.panel() + lane];
      if (z > -std::numeric_limits<Real>::infinity()) list.push_back({z, v});
    }
    keep_top_k(list, draw_.top_k);
    keep_top_p(list, draw_.top_p, draw_.temperature);
    const Candidate<Real>* best = draw_candidate(list, draw_, rows.output[row]);
    return best ? Choice<Real>{best->id, best->logit} : greedy_choice(row);
  }

  void write(const RowBlock& rows, int64_t row, const Choice<Real>& choice) const {
    const SoftmaxState& state = pass_.state[row];
    const SoftmaxSummary summary = summarise(state);
    const int64_t i = rows.output[row];
    const double logprob = (choice.logit - state.max) - summary.log_sum;
    double reported = logprob;
    if (in_.targets)
      reported = rows.target[row] == kNoTarget
                     ? 0.0
                     : (pass_.target_logit[row] - state.max) - summary.log_sum;
    out_.token[i] = choice.token;
    put(out_.confidence, i, choice.logit == state.max ? summary.confidence : std::exp(logprob));
    put(out_.lse, i, summary.lse);
    put(out_.entropy, i, summary.entropy);
    put(out_.margin, i, summary.margin);
    put(out_.logprob, i, reported);
  }

  static void put(void* array, int64_t i, double value) {
    static_cast<Real*>(array)[i] = static_cast<Real>(value);
  }

  const HeadInputs& in_;
  const TokenDraw& draw_;
  const TokenStatsOutputs& out_;
  HeadPass<Real> pass_;
  int64_t lowest_allowed_ = 0;
  std::vector<uint32_t> noise_;  // key low, key high, position, step of every row
  std::vector<Real> best_;       // [chunks][score, index, logit][rows]
};

}  // namespace

void token_stats(const HeadInputs& inputs, const TokenDraw& draw,
                 const TokenStatsOutputs& outputs) {
  check_head_inputs(inputs, "token_stats");
  DLM_CHECK(draw.temperature >= 0, "token_stats: temperature must not be negative");
  DLM_CHECK(draw.temperature == 0 || draw.keys || inputs.n == 0, "token_stats: a draw needs keys");
  DLM_CHECK(draw.top_k >= 0 && draw.top_p > 0, "token_stats: top_k >= 0 and top_p > 0");
  if (inputs.dtype == Dtype::kFloat64)
    StatsStep<double>(inputs, draw, outputs).run();
  else
    StatsStep<float>(inputs, draw, outputs).run();
}

}  // namespace dlm_fast::cpu
