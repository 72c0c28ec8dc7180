// One block of selected rows against the whole vocabulary: logits, statistics, gradients.
//
// Traffic: the head is read once per group of 256 rows (once more for the gradient of the hidden
// states); logits stay in L2 unless a gradient needs them, then in one workspace of bounded size.
// Work is cut at fixed rows and columns, so no result depends on the number of threads, and the
// statistics of a row do not depend on the rows beside it.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "common/online_softmax.h"
#include "common/parallel_for.h"
#include "cpu/head_kernels.h"
#include "cpu/scratch.h"
#include "dlm_fast/head_inputs.h"
#include "dlm_fast/token_logprob.h"

namespace dlm_fast::cpu {

constexpr int64_t kNoTarget = -1;

// Rows that take part, in the order of the outputs.
struct RowBlock {
  std::vector<int64_t> hidden_row;
  std::vector<int64_t> target;  // kNoTarget: none
  std::vector<int64_t> output;  // position among the N outputs
  int64_t size() const {
    return static_cast<int64_t>(hidden_row.size());
  }
};

// The cotangents of a row's statistics, and what its logits are normalised by.
template <typename Real>
struct RowGradient {
  double max, log_sum;
  double linear, entropic, target;
  bool active;  // false: the row gets exactly zero and is not read
};

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

template <typename Real>
class HeadPass {
 public:
  explicit HeadPass(const HeadInputs& inputs)
      : in_(inputs),
        k_(head_kernels<Real>()),
        pairs_(usable_pairs(inputs)),
        hidden_{inputs.hidden, inputs.hidden_stride, inputs.d, inputs.dtype},
        weight_{inputs.weight, inputs.weight_stride, inputs.d, inputs.dtype},
        logit_hidden_(operand(hidden_)),
        logit_weight_(operand(weight_)),
        panel_size_(kBlockV * k_.panel),
        blocks_(ceil_div(inputs.v, kBlockV)),
        chunks_(ceil_div(blocks_, kChunkBlocks)) {}

  // Rows whose logits fit the workspace of 64 MiB, whole groups, at most four of them: more would
  // leave the caches without saving traffic.
  int64_t rows_with_logits() const {
    const int64_t per_row = blocks_ * kBlockV * static_cast<int64_t>(sizeof(Real));
    const int64_t groups = (int64_t{64} << 20) / (per_row * kGroupRows);
    return kGroupRows * std::clamp<int64_t>(groups, 1, 4);
  }
  static constexpr int64_t kRowsWithoutLogits = 4 * kGroupRows;

  void load(const RowBlock& rows) {
    rows_ = &rows;
    panels_ = ceil_div(rows.size(), k_.panel);
    const int64_t depth = logit_hidden_.width;
    Real* packed = packed_.grow(panels_ * k_.panel * depth);
    parallel_for(panels_, in_.num_threads, [&](int64_t p) {
      k_.pack_rows(logit_hidden_, rows.hidden_row.data() + p * k_.panel, lanes_of(p),
                   packed + p * k_.panel * depth);
    });
  }

  // Statistics of the rows; keeps the logits where `keep` is set. `visit(block, panel, logits)` is
  // called on every hot block.
  template <class Visit>
  void forward(bool with_top, bool keep, const Visit& visit) {
    begin_logits(keep);
    const int64_t state_size = kStateArrays * k_.panel;
    Real* states = states_.grow(chunks_ * panels_ * state_size);
    target_logit.assign(static_cast<size_t>(rows_->size()), -infinity());
    for_each_block(keep, [&](int64_t block, int64_t p, Real* logits) {
      Real* state = states + ((block / kChunkBlocks) * panels_ + p) * state_size;
      if (block % kChunkBlocks == 0) clear_state(state);
      const Real* bias = bias_at(block);
      if (with_top)
        k_.accumulate_top(logits, block_v(block), bias, scale(), vectors_of(p), block * kBlockV,
                          state);
      else
        k_.accumulate(logits, block_v(block), bias, scale(), vectors_of(p), state);
      pick_targets(block, p, logits);
      visit(block, p, logits);
    });
    merge_states(states, state_size);
  }

  // The same logits again, without statistics.
  void recompute() {
    begin_logits(true);
    for_each_block(true, [&](int64_t block, int64_t p, Real* logits) {
      k_.scale(logits, block_v(block), bias_at(block), scale(), vectors_of(p));
    });
  }

  // Turns the kept logits into gradients; `first` is false for later blocks of the same call.
  void backward(const std::vector<RowGradient<Real>>& gradients, const HeadGradients& out,
                bool first) {
    const std::vector<Real> lanes = lane_coefficients(gradients);
    std::vector<int64_t> active_rows(rows_->hidden_row);
    for (size_t i = 0; i < active_rows.size(); ++i)
      if (!gradients[i].active) active_rows[i] = -1;
    const bool add = out.accumulate || !first;
    if (out.weight) pack_columns(active_rows);
    parallel_for(blocks_, in_.num_threads, [&](int64_t block) {
      for (int64_t p = 0; p < panels_; ++p) logit_gradient(block, p, lanes, gradients);
      if (out.bias) bias_gradient(block, out, add);
      if (pairs_) round_to_pairs(block);
      if (out.weight) weight_gradient(block, out, add);
    });
    if (out.hidden) hidden_gradient(active_rows, static_cast<Real*>(out.hidden));
  }

  // What backward leaves behind when no row takes part.
  static void clear(const HeadInputs& in, const HeadGradients& out) {
    if (out.accumulate) return;
    if (out.weight) std::fill_n(static_cast<Real*>(out.weight), in.v * in.d, Real(0));
    if (out.bias) std::fill_n(static_cast<Real*>(out.bias), in.v, Real(0));
  }

  const Real* kept_logits(int64_t block, int64_t panel) const {
    return logits_.data() + (block * panels_ + panel) * panel_size_;
  }
  int panel() const {
    return k_.panel;
  }
  int64_t panels() const {
    return panels_;
  }
  int64_t chunks() const {
    return chunks_;
  }
  int64_t block_v(int64_t block) const {
    return std::min(kBlockV, in_.v - block * kBlockV);
  }
  int vectors_of(int64_t p) const {
    return lanes_of(p) > k_.lanes ? 2 : 1;
  }
  int64_t lanes_of(int64_t p) const {
    return std::min<int64_t>(k_.panel, rows_->size() - p * k_.panel);
  }
  const HeadKernels<Real>& kernels() const {
    return k_;
  }

  std::vector<SoftmaxState> state;  // of each row, after forward
  std::vector<Real> target_logit;

 private:
  static constexpr bool kFloat = sizeof(Real) == sizeof(float);
  static Real infinity() {
    return std::numeric_limits<Real>::infinity();
  }
  double scale() const {
    return 1.0 / in_.temperature;
  }
  const Real* bias_at(int64_t block) const {
    return in_.bias ? static_cast<const Real*>(in_.bias) + block * kBlockV : nullptr;
  }

  void begin_logits(bool keep) {
    if (keep) logits_.grow(blocks_ * panels_ * panel_size_);
  }

  void clear_state(Real* base) const {
    PanelState<Real> state(base, k_.panel);
    std::fill_n(state.max, k_.panel, -infinity());
    std::fill_n(state.sum, k_.panel, Real(0));
    std::fill_n(state.weighted, k_.panel, Real(0));
    std::fill_n(state.second, k_.panel, -infinity());
    std::fill_n(state.index, k_.panel, Real(-1));
  }

  // Calls use(block, panel, logits) for every block; the blocks of a chunk come in order.
  template <class Use>
  void for_each_block(bool keep, const Use& use) {
    const int64_t group_panels = kGroupRows / k_.panel;
    const int64_t groups = ceil_div(panels_, group_panels);
    parallel_for(groups * chunks_, in_.num_threads, [&](int64_t item) {
      const int64_t first_panel = item / chunks_ * group_panels, chunk = item % chunks_;
      const int64_t last_panel = std::min(panels_, first_panel + group_panels);
      Real* scratch = thread_scratch<Real>(kPackedWeight + group_panels * panel_size_);
      const int64_t last_block = std::min(blocks_, (chunk + 1) * kChunkBlocks);
      for (int64_t block = chunk * kChunkBlocks; block < last_block; ++block) {
        Real* logits = keep ? logits_.data() + (block * panels_ + first_panel) * panel_size_
                            : scratch + kPackedWeight;
        multiply_block(block, first_panel, last_panel, scratch, logits);
        for (int64_t p = first_panel; p < last_panel; ++p) {
          Real* own = logits + (p - first_panel) * panel_size_;
          forbid(block, own);
          use(block, p, own);
        }
      }
    });
  }

  // Rows must be whole pairs.
  static const PairKernels* usable_pairs(const HeadInputs& in) {
    const bool even = in.d % 2 == 0 && in.hidden_stride % 2 == 0 && in.weight_stride % 2 == 0;
    return in.dtype == Dtype::kBFloat16 && even ? pair_kernels() : nullptr;
  }

  // An operand of the logits: for the dot product of pairs, two bfloat16 numbers are one float.
  Matrix operand(const Matrix& matrix) const {
    if (!pairs_) return matrix;
    return {matrix.data, matrix.stride / 2, matrix.width / 2, Dtype::kFloat32};
  }

  void multiply_block(int64_t block, int64_t first_panel, int64_t last_panel, Real* packed_weight,
                      Real* logits) {
    const int64_t depth = logit_weight_.width;
    const auto multiply = choose(&HeadKernels<Real>::logits, &PairKernels::logits);
    // A block of weights serves many panels from L2. For one panel, a few rows are read through to
    // their end instead: that is how memory is fastest, and they stay in L1.
    const int64_t step = last_panel - first_panel > 1 ? kBlockV : k_.tile;
    for (int64_t v = 0; v < block_v(block); v += step)
      for (int64_t d = 0; d < depth; d += kBlockD) {
        const BlockSize size{std::min(step, block_v(block) - v), std::min(kBlockD, depth - d)};
        k_.pack_weight(logit_weight_, block * kBlockV + v, d, size, packed_weight);
        for (int64_t p = first_panel; p < last_panel; ++p)
          multiply(packed_.data() + (p * depth + d) * k_.panel, packed_weight, size, d > 0,
                   vectors_of(p), logits + (p - first_panel) * panel_size_ + v * k_.panel);
      }
  }

  // The kernel in force: that of pairs where they can be used.
  template <class Single, class Pair>
  auto choose(Single single, Pair pair) const {
    if constexpr (kFloat)
      return pairs_ ? pairs_->*pair : k_.*single;
    else
      return k_.*single;
  }

  void forbid(int64_t block, Real* logits) const {
    const int64_t* end = in_.forbidden + in_.num_forbidden;
    const int64_t first = block * kBlockV;
    for (const int64_t* id = std::lower_bound(in_.forbidden, end, first);
         id < end && *id < first + kBlockV; ++id)
      std::fill_n(logits + (*id - first) * k_.panel, k_.panel, -infinity());
  }

  void pick_targets(int64_t block, int64_t p, const Real* logits) {
    for (int64_t lane = 0; lane < lanes_of(p); ++lane) {
      const int64_t row = p * k_.panel + lane, v = rows_->target[row] - block * kBlockV;
      if (v >= 0 && v < kBlockV) target_logit[row] = logits[v * k_.panel + lane];
    }
  }

  void merge_states(const Real* states, int64_t state_size) {
    state.assign(static_cast<size_t>(rows_->size()), SoftmaxState{});
    parallel_for(panels_, in_.num_threads, [&](int64_t p) {
      for (int64_t lane = 0; lane < lanes_of(p); ++lane)
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          const Real* base = states + (chunk * panels_ + p) * state_size + lane;
          SoftmaxState part;
          part.max = base[0];
          part.sum = base[k_.panel];
          part.weighted = base[2 * k_.panel];
          part.second = base[3 * k_.panel];
          part.index = static_cast<int64_t>(base[4 * k_.panel]);
          SoftmaxState& whole = state[p * k_.panel + lane];
          whole = chunk == 0 ? part : merge(whole, part);
        }
    });
  }

  // Six arrays [P] per panel: max, 1 / sum, log_sum, linear, entropic, active.
  std::vector<Real> lane_coefficients(const std::vector<RowGradient<Real>>& gradients) const {
    std::vector<Real> lanes(static_cast<size_t>(panels_ * 6 * k_.panel), Real(0));
    for (int64_t row = 0; row < rows_->size(); ++row) {
      Real* lane = lanes.data() + row / k_.panel * 6 * k_.panel + row % k_.panel;
      const RowGradient<Real>& g = gradients[row];
      const double values[6] = {g.max,    std::exp(-g.log_sum), g.log_sum,
                                g.linear, g.entropic,           g.active ? 1.0 : 0.0};
      for (int i = 0; i < 6; ++i) lane[i * k_.panel] = static_cast<Real>(values[i]);
    }
    return lanes;
  }

  void logit_gradient(int64_t block, int64_t p, const std::vector<Real>& lanes,
                      const std::vector<RowGradient<Real>>& gradients) {
    const Real* base = lanes.data() + p * 6 * k_.panel;
    const int64_t step = k_.panel;
    GradientLanes<Real> coefficients{
        base, base + step, base + 2 * step, base + 3 * step, base + 4 * step, base + 5 * step,
        false};
    for (int64_t lane = 0; lane < step; ++lane)
      coefficients.with_entropy |= coefficients.entropic[lane] != Real(0);
    Real* logits = logits_.data() + (block * panels_ + p) * panel_size_;
    k_.gradient(logits, block_v(block), coefficients, vectors_of(p));
    for (int64_t lane = 0; lane < lanes_of(p); ++lane) {
      const int64_t row = p * k_.panel + lane, v = rows_->target[row] - block * kBlockV;
      if (v >= 0 && v < kBlockV && gradients[row].active)
        logits[v * k_.panel + lane] += static_cast<Real>(gradients[row].target);
    }
  }

  // Numbers along the depth of a matrix product that one number of its operands holds.
  int64_t depth_of_number() const {
    return pairs_ ? 2 : 1;
  }

  void round_to_pairs(int64_t block) {
    if constexpr (kFloat)
      for (int64_t p = 0; p < panels_; ++p)
        pairs_->pack_gradient(logits_.data() + (block * panels_ + p) * panel_size_, block_v(block));
  }

  void pack_columns(const std::vector<int64_t>& rows) {
    const int64_t count = rows_->size(), parts = ceil_div(in_.d, k_.panel);
    columns_size_ = ceil_div(count, depth_of_number()) * k_.panel;
    Real* columns = columns_.grow(parts * columns_size_);
    parallel_for(parts, in_.num_threads, [&](int64_t part) {
      choose(&HeadKernels<Real>::pack_columns, &PairKernels::pack_columns)(
          hidden_, rows.data(), count, part * k_.panel, columns + part * columns_size_);
    });
  }

  void weight_gradient(int64_t block, const HeadGradients& out, bool add) {
    for (int64_t part = 0; part * k_.panel < in_.d; ++part) {
      const int64_t d = part * k_.panel;
      Real* place = static_cast<Real*>(out.weight) + block * kBlockV * in_.d + d;
      choose(&HeadKernels<Real>::weight_gradient, &PairKernels::weight_gradient)(
          kept_logits(block, 0), columns_.data() + part * columns_size_, rows_->size(),
          {place, in_.d, block_v(block), std::min<int64_t>(k_.panel, in_.d - d),
           static_cast<Real>(out.alpha), add});
    }
  }

  void bias_gradient(int64_t block, const HeadGradients& out, bool add) {
    Real sums[kBlockV];
    k_.bias_gradient(kept_logits(block, 0), block_v(block), rows_->size(), sums);
    Real* place = static_cast<Real*>(out.bias) + block * kBlockV;
    for (int64_t v = 0; v < block_v(block); ++v)
      place[v] = (add ? place[v] : Real(0)) + static_cast<Real>(out.alpha) * sums[v];
  }

  void hidden_gradient(const std::vector<int64_t>& rows, Real* hidden) {
    Real* gradient = hidden_gradient_.grow(panels_ * k_.panel * in_.d);
    const int64_t parts = ceil_div(in_.d, kBlockD);
    // How panels are grouped decides only how often the head is packed, not what is summed.
    const int64_t wanted = ceil_div(panels_ * parts, in_.num_threads);
    const int64_t group = std::clamp<int64_t>(wanted, 1, panels_);
    const int64_t groups = ceil_div(panels_, group);
    parallel_for(groups * parts, in_.num_threads, [&](int64_t item) {
      const int64_t d = item % parts * kBlockD, first = item / parts * group;
      const int64_t last = std::min(panels_, first + group);
      Real* packed_weight = thread_scratch<Real>(kPackedWeight);
      for (int64_t block = 0; block < blocks_; ++block) {
        const BlockSize size{block_v(block), std::min(kBlockD, in_.d - d)};
        choose(&HeadKernels<Real>::pack_weight, &PairKernels::pack_weight)(weight_, block * kBlockV,
                                                                           d, size, packed_weight);
        const BlockSize depths{ceil_div(size.v, depth_of_number()), size.d};
        // Rounded gradients lie twice in their place, pairs of vocabulary rows in the second half.
        const int64_t half = pairs_ ? panel_size_ / 2 : 0;
        for (int64_t p = first; p < last; ++p)
          choose(&HeadKernels<Real>::hidden_gradient, &PairKernels::hidden_gradient)(
              kept_logits(block, p) + half, packed_weight, depths, block > 0, vectors_of(p),
              gradient + (p * in_.d + d) * k_.panel);
      }
    });
    // Rows may repeat: their gradients add up in the order of the selection.
    parallel_for(parts, in_.num_threads, [&](int64_t part) {
      const int64_t d = part * kBlockD;
      for (int64_t p = 0; p < panels_; ++p)
        k_.add_rows(gradient + (p * in_.d + d) * k_.panel, std::min(kBlockD, in_.d - d),
                    rows.data() + p * k_.panel, lanes_of(p), in_.d, hidden + d);
    });
  }

  const HeadInputs& in_;
  const HeadKernels<Real>& k_;
  const PairKernels* pairs_;  // null: not in force, or not for these inputs
  Matrix hidden_, weight_;
  Matrix logit_hidden_, logit_weight_;  // as the logits' matrix product reads them
  int64_t panel_size_, blocks_, chunks_;
  const RowBlock* rows_ = nullptr;
  int64_t panels_ = 0;
  Buffer<Real> packed_;   // [panels, D, P]
  Buffer<Real> logits_;   // [blocks, panels, kBlockV, P], then their gradients
  Buffer<Real> states_;   // [chunks, panels, kStateArrays, P]
  Buffer<Real> columns_;  // [D / P, rows (or pairs of rows), P]
  int64_t columns_size_ = 0;
  Buffer<Real> hidden_gradient_;  // [panels, D, P]
};

// Where the caller wants a rounded gradient of the head: sums it in float32, then rounds it.
template <class Run>
void with_rounded_weight(const HeadInputs& in, const HeadGradients& out, const Run& run) {
  if (!out.round || !out.weight) return run(out);
  Buffer<float> sums(in.v * in.d);
  HeadGradients wide = out;
  wide.weight = sums.data();
  wide.round = false;
  run(wide);
  const HeadKernels<float>& kernels = head_kernels<float>();
  parallel_for(ceil_div(in.v, kBlockV), in.num_threads, [&](int64_t block) {
    const int64_t first = block * kBlockV * in.d;
    const int64_t count = std::min(kBlockV * in.d, in.v * in.d - first);
    kernels.round(sums.data() + first, count, static_cast<uint16_t*>(out.weight) + first);
  });
}

}  // namespace dlm_fast::cpu
