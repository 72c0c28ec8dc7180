// One block of selected rows against the whole vocabulary: logits and their statistics.
//
// Traffic: the head is read once per group of 256 rows; logits stay in L2, but for blocks of the
// vocabulary that the caller keeps, for a gradient or a filter, in a workspace of bounded size.
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
  void add(const HeadInputs& in, int64_t i) {
    const int64_t wanted = in.targets ? in.targets[i] : kIgnored;
    output.push_back(i);
    hidden_row.push_back(in.rows ? in.rows[i] : i);
    target.push_back(wanted == kIgnored ? kNoTarget : wanted);
  }
};

// Outputs whose target is not ignored.
inline std::vector<int64_t> outputs_with_target(const HeadInputs& in) {
  std::vector<int64_t> outputs;
  for (int64_t i = 0; i < in.n; ++i)
    if (in.targets[i] != kIgnored) outputs.push_back(i);
  return outputs;
}

// The rows of a list's outputs from place `first` on, `count` of them where there are so many.
inline RowBlock rows_of(const HeadInputs& in, const std::vector<int64_t>& outputs, int64_t first,
                        int64_t count) {
  RowBlock rows;
  const int64_t end = std::min<int64_t>(first + count, static_cast<int64_t>(outputs.size()));
  for (int64_t place = first; place < end; ++place) rows.add(in, outputs[place]);
  return rows;
}

inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Part of a matrix that will be packed, fetched while a number of tiles are multiplied.
inline Ahead ahead_of(const Matrix& matrix, int64_t row, int64_t column, BlockSize size,
                      int64_t tiles) {
  const int64_t bytes = bytes_of(matrix.dtype);
  const auto* data = static_cast<const char*>(matrix.data);
  return {data + (row * matrix.stride + column) * bytes, matrix.stride * bytes, size.d * bytes,
          size.v, tiles};
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

  // Rows of one pass where no logits are kept.
  static constexpr int64_t kRowsWithoutLogits = 4 * kGroupRows;

  // Rows whose logits can all be kept.
  int64_t rows_with_logits() const {
    const int64_t per_panel = blocks_ * panel_size_ * static_cast<int64_t>(sizeof(Real));
    return k_.panel * std::clamp<int64_t>(kKeptBytes / per_panel, 1, kRowsWithoutLogits / k_.panel);
  }

  // Blocks of the vocabulary whose logits can be kept for some rows.
  int64_t blocks_to_keep(int64_t num_rows, int64_t bytes = kKeptBytes) const {
    const int64_t per_block =
        ceil_div(num_rows, k_.panel) * panel_size_ * static_cast<int64_t>(sizeof(Real));
    return std::min(blocks_, bytes / std::max<int64_t>(per_block, 1));
  }

  void load(const RowBlock& rows) {
    rows_ = &rows;
    panels_ = ceil_div(rows.size(), k_.panel);
    const int64_t depth = logit_hidden_.width;
    Real* packed = packed_.grow(panels_ * k_.panel * depth);
    parallel_for(panels_, in_.num_threads, [&](int64_t p) {
      k_.pack_rows(logit_hidden_, rows.hidden_row.data() + p * k_.panel, lanes_of(p),
                   packed + p * k_.panel * depth);
    });
    if (few()) copy_few_rows();
  }

  // Statistics of the rows; keeps the logits of the first `kept` blocks, at `place` if it is given.
  // `visit(block, panel, logits)` is called on every hot block.
  template <class Visit>
  void forward(bool with_top, int64_t kept, const Visit& visit, Real* place = nullptr) {
    use_kept(kept, place ? place : logits_.grow(kept * panels_ * panel_size_));
    const int64_t state_size = kStateArrays * k_.panel;
    Real* states = states_.grow(chunks_ * panels_ * state_size);
    target_logit.assign(static_cast<size_t>(rows_->size()), -infinity());
    for_each_block([&](int64_t block, int64_t p, Real* logits) {
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

  // Logits of the first `kept` blocks that a pass over the same rows has left at `place`.
  void use_kept(int64_t kept, Real* place) {
    kept_blocks_ = kept;
    kept_logits_ = place;
  }

  // The packed rows, which kept logits make superfluous.
  void drop_rows() {
    packed_ = Buffer<Real>();
  }

  // --- the same logits again, block by block, without statistics

  // Parts of a block of weights along the depth of the logits.
  int64_t parts() const {
    return ceil_div(logit_weight_.width, kBlockD);
  }
  void pack_part(int64_t block, int64_t part, Real* packed_weight) const {
    k_.pack_weight(logit_weight_, block * kBlockV, part * kBlockD, part_size(block, part),
                   packed_weight);
  }
  // Panels [first, last); their logits start at `logits`. With `pack` the part is packed first.
  // Meanwhile the weights of the next part and the rows of the next panel are on their way.
  void multiply_part(int64_t block, int64_t part, int64_t first, int64_t last, bool pack,
                     Real* packed_weight, Real* logits) const {
    const int64_t depth = logit_weight_.width, d = part * kBlockD;
    const BlockSize size = part_size(block, part);
    const int64_t tiles = ceil_div(size.v, k_.tile);
    const bool last_part = part + 1 == parts();
    const bool in_passing = pack && can_pack_in_passing(size, first);
    if (pack && !in_passing) pack_part(block, part, packed_weight);
    const auto slice = [&](int64_t p, int64_t from) {
      return packed_.data() + (p * depth + from) * k_.panel;
    };
    Ahead ahead[kAhead];
    ahead[1] =
        weight_ahead(block + (last_part ? 1 : 0), last_part ? 0 : part + 1, tiles * (last - first));
    for (int64_t p = first; p < last; ++p) {
      const Real* next = p + 1 < last ? slice(p + 1, d) : slice(first, last_part ? 0 : d + kBlockD);
      const int64_t bytes = size.d * k_.panel * static_cast<int64_t>(sizeof(Real));
      ahead[0] = Ahead(next, bytes, bytes, 1, tiles);
      Real* out = logits + (p - first) * panel_size_;
      if (in_passing && p == first)
        choose(&HeadKernels<Real>::logits_and_pack, &PairKernels::logits_and_pack)(
            slice(p, d), logit_weight_, block * kBlockV, d, size, d > 0, ahead, packed_weight, out);
      else
        choose(&HeadKernels<Real>::logits, &PairKernels::logits)(slice(p, d), packed_weight, size,
                                                                 d > 0, vectors_of(p), ahead, out);
    }
  }

  // Few enough rows to be multiplied without a copy of the weights.
  bool few() const {
    return rows_->size() <= std::min<int64_t>(kFewRows, k_.lanes);
  }
  void multiply_few(int64_t block, Real* logits) const {
    choose(&HeadKernels<Real>::few_logits, &PairKernels::few_logits)(
        logit_weight_, block * kBlockV, block_v(block), few_rows_.data(), rows_->size(), logits);
  }
  // From sums of products to logits.
  void finish_logits(int64_t block, int64_t p, Real* logits) const {
    forbid(block, logits);
    k_.scale(logits, block_v(block), bias_at(block), scale(), vectors_of(p));
  }

  const Real* kept_logits(int64_t block, int64_t panel) const {
    return kept_logits_ + (block * panels_ + panel) * panel_size_;
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
  int64_t blocks() const {
    return blocks_;
  }
  int64_t kept_blocks() const {
    return kept_blocks_;
  }
  int64_t panel_size() const {
    return panel_size_;
  }
  const RowBlock& rows() const {
    return *rows_;
  }
  const HeadKernels<Real>& kernels() const {
    return k_;
  }
  const PairKernels* pairs() const {
    return pairs_;
  }
  // The kernel in force: that of pairs where they can be used.
  template <class Single, class Pair>
  auto choose(Single single, Pair pair) const {
    if constexpr (sizeof(Real) == sizeof(float))
      return pairs_ ? pairs_->*pair : k_.*single;
    else
      return k_.*single;
  }

  std::vector<SoftmaxState> state;  // of each row, after forward
  std::vector<Real> target_logit;

 private:
  static Real infinity() {
    return std::numeric_limits<Real>::infinity();
  }
  double scale() const {
    return 1.0 / in_.temperature;
  }
  const Real* bias_at(int64_t block) const {
    return in_.bias ? static_cast<const Real*>(in_.bias) + block * kBlockV : nullptr;
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
  void for_each_block(const Use& use) {
    const int64_t group_panels = kGroupRows / k_.panel;
    const int64_t groups = ceil_div(panels_, group_panels);
    parallel_for(groups * chunks_, in_.num_threads, [&](int64_t item) {
      const int64_t first_panel = item / chunks_ * group_panels, chunk = item % chunks_;
      const int64_t last_panel = std::min(panels_, first_panel + group_panels);
      Real* scratch = thread_scratch<Real>(kPackedWeight + group_panels * panel_size_);
      const int64_t last_block = std::min(blocks_, (chunk + 1) * kChunkBlocks);
      for (int64_t block = chunk * kChunkBlocks; block < last_block; ++block) {
        Real* logits = block < kept_blocks_
                           ? kept_logits_ + (block * panels_ + first_panel) * panel_size_
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

  bool can_pack_in_passing(BlockSize size, int64_t first_panel) const {
    const Dtype real = sizeof(Real) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
    return logit_weight_.dtype == real && size.v % k_.tile == 0 && size.d % k_.lanes == 0 &&
           vectors_of(first_panel) == 2;
  }

  Ahead weight_ahead(int64_t block, int64_t part, int64_t tiles) const {
    if (block >= blocks_) return {};
    const BlockSize size = part_size(block, part);
    return ahead_of(logit_weight_, block * kBlockV, part * kBlockD, size, tiles);
  }

  BlockSize part_size(int64_t block, int64_t part) const {
    return {block_v(block), std::min(kBlockD, logit_weight_.width - part * kBlockD)};
  }

  // Rows in order, [kFewRows, D], zero past the last one.
  void copy_few_rows() {
    const int64_t depth = logit_hidden_.width;
    Real* rows = few_rows_.grow(kFewRows * depth);
    std::fill_n(rows, kFewRows * depth, Real(0));
    for (int64_t i = 0; i < rows_->size(); ++i)
      for (int64_t d = 0; d < depth; ++d) rows[i * depth + d] = packed_.data()[d * k_.panel + i];
  }

  void multiply_block(int64_t block, int64_t first_panel, int64_t last_panel, Real* packed_weight,
                      Real* logits) const {
    if (few()) return multiply_few(block, logits);
    if (last_panel - first_panel == 1)
      return multiply_panel(block, first_panel, packed_weight, logits);
    for (int64_t part = 0; part < parts(); ++part) {
      multiply_part(block, part, first_panel, last_panel, true, packed_weight, logits);
    }
  }

  // A block of weights serves many panels from L2. For one panel, a few rows are read through to
  // their end instead: that is how memory is fastest, and they stay in L1.
  void multiply_panel(int64_t block, int64_t p, Real* packed_weight, Real* logits) const {
    const int64_t depth = logit_weight_.width;
    Ahead nothing[kAhead];
    for (int64_t v = 0; v < block_v(block); v += k_.tile)
      for (int64_t d = 0; d < depth; d += kBlockD) {
        const BlockSize size{std::min<int64_t>(k_.tile, block_v(block) - v),
                             std::min(kBlockD, depth - d)};
        k_.pack_weight(logit_weight_, block * kBlockV + v, d, size, packed_weight);
        choose(&HeadKernels<Real>::logits, &PairKernels::logits)(
            packed_.data() + (p * depth + d) * k_.panel, packed_weight, size, d > 0, vectors_of(p),
            nothing, logits + v * k_.panel);
      }
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

  const HeadInputs& in_;
  const HeadKernels<Real>& k_;
  const PairKernels* pairs_;  // null: not in force, or not for these inputs
  Matrix hidden_, weight_;
  Matrix logit_hidden_, logit_weight_;  // as the logits' matrix product reads them
  int64_t panel_size_, blocks_, chunks_;
  const RowBlock* rows_ = nullptr;
  int64_t panels_ = 0;
  int64_t kept_blocks_ = 0;
  Real* kept_logits_ = nullptr;  // [kept blocks, panels, kBlockV, P]
  Buffer<Real> packed_;          // [panels, D, P]
  Buffer<Real> few_rows_;        // [kFewRows, D]
  Buffer<Real> logits_;          // kept ones, where the caller gives no place
  Buffer<Real> states_;          // [chunks, panels, kStateArrays, P]
};

}  // namespace dlm_fast::cpu
