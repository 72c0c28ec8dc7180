// The gradient of one block of selected rows: hidden states, head and bias, one sweep.
//
// Traffic: a block of 252 vocabulary rows is read once (twice by the dot product of pairs, which
// wants two layouts), its logits, kept or computed again, stay in L2 for both products, and its
// gradient is written once. Work is cut at fixed rows and columns and added up in order, so no
// result depends on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/head_pass.h"
#include "dlm_fast/token_logprob.h"

namespace dlm_fast::cpu {

// Rows of one pass: the gradient of the head is written, or read and written, once for all of them.
constexpr int64_t kRowsWithGradient = 2 * kGroupRows;

// The cotangents of a row's statistics, and what its logits are normalised by.
template <typename Real>
struct RowGradient {
  double max, log_sum;
  double linear, entropic, target;
  bool active;  // false: the row gets exactly zero and is not read
};

template <typename Real>
class HeadBackward {
 public:
  HeadBackward(const HeadInputs& inputs, const HeadGradients& out)
      : in_(inputs),
        out_(out),
        weight_{inputs.weight, inputs.weight_stride, inputs.d, inputs.dtype},
        hidden_{inputs.hidden, inputs.hidden_stride, inputs.d, inputs.dtype} {}

  // Gradients of the rows that the pass has loaded; `first` is false for later rows of a call.
  void run(const HeadPass<Real>& pass, const std::vector<RowGradient<Real>>& gradients,
           bool first) {
    begin(pass, gradients, first);
    const int64_t size = panels_ * panel_ * in_.d, chunks = pass.chunks();
    // Either threads take chunks of the vocabulary, or they share the work on every block.
    const int outer = chunks >= in_.num_threads ? in_.num_threads : 1;
    inner_ = outer > 1 ? 1 : in_.num_threads;
    Real* total = out_.hidden ? total_.grow(size) : nullptr;
    Real* parts = out_.hidden && chunks > 1 ? partial_.grow(outer * size) : total;
    ordered_for(
        chunks, outer,
        [&](int64_t chunk, int worker) {
          const int64_t begin = chunk * kChunkBlocks;
          const int64_t end = std::min(pass.blocks(), begin + kChunkBlocks);
          for (int64_t block = begin; block < end; ++block)
            take_block(block, block == begin, parts + worker * size);
        },
        [&](int64_t chunk, int worker) {
          if (!out_.hidden || chunks == 1) return;
          const Real* part = parts + worker * size;
          for (int64_t i = 0; i < size; ++i) total[i] = chunk == 0 ? part[i] : total[i] + part[i];
        });
    if (out_.hidden) add_to_hidden(total);
  }

 private:
  void begin(const HeadPass<Real>& pass, const std::vector<RowGradient<Real>>& gradients,
             bool first) {
    pass_ = &pass;
    k_ = &pass.kernels();
    pairs_ = pass.pairs();
    gradients_ = &gradients;
    add_ = out_.accumulate || !first;
    panels_ = pass.panels();
    panel_ = pass.panel();
    panel_size_ = pass.panel_size();
    set_lanes();
    rows_ = pass.rows().hidden_row;
    for (size_t i = 0; i < rows_.size(); ++i)
      if (!gradients[i].active) rows_[i] = -1;
    if (out_.weight) pack_columns();
  }

  // Six arrays [P] per panel: max, 1 / sum, log_sum, linear, entropic, active.
  void set_lanes() {
    lanes_.assign(static_cast<size_t>(panels_ * 6 * panel_), Real(0));
    with_entropy_.assign(static_cast<size_t>(panels_), 0);
    for (int64_t row = 0; row < pass_->rows().size(); ++row) {
      Real* lane = lanes_.data() + row / panel_ * 6 * panel_ + row % panel_;
      const RowGradient<Real>& g = (*gradients_)[row];
      const double values[6] = {g.max,    std::exp(-g.log_sum), g.log_sum,
                                g.linear, g.entropic,           g.active ? 1.0 : 0.0};
      for (int i = 0; i < 6; ++i) lane[i * panel_] = static_cast<Real>(values[i]);
      if (g.entropic != 0) with_entropy_[row / panel_] = 1;
    }
  }

  // Hidden states as the right side of the head's gradient: [D / P, rows or pairs of rows, P].
  void pack_columns() {
    const int64_t count = static_cast<int64_t>(rows_.size()), parts = ceil_div(in_.d, panel_);
    columns_size_ = ceil_div(count, depth_of_number()) * panel_;
    Real* columns = columns_.grow(parts * columns_size_);
    parallel_for(parts, in_.num_threads, [&](int64_t part) {
      pass_->choose(&HeadKernels<Real>::pack_columns, &PairKernels::pack_columns)(
          hidden_, rows_.data(), count, part * panel_, columns + part * columns_size_);
    });
  }

  // Numbers along the depth of a matrix product that one number of its operands holds.
  int64_t depth_of_number() const {
    return pairs_ ? 2 : 1;
  }

  // --- one block of the vocabulary

  void take_block(int64_t block, bool first, Real* hidden_sums) {
    const bool kept = block < pass_->kept_blocks();
    // Weights that were copied for the logits serve the gradient of hidden states too, if all parts
    // of a block are there and in the same layout.
    const bool reuse = !kept && !pairs_ && !pass_->few();
    const int64_t slots = reuse ? ceil_div(in_.d, kBlockD) : 1;
    Real* gradient = thread_scratch<Real>(panels_ * panel_size_ + slots * kPackedWeight);
    Real* packed = gradient + panels_ * panel_size_;
    if (!kept) compute_logits(block, reuse, packed, gradient);
    parallel_for(panels_, inner_, [&](int64_t p) {
      Real* own = gradient + p * panel_size_;
      if (!kept) pass_->finish_logits(block, p, own);
      logit_gradient(block, p, kept ? pass_->kept_logits(block, p) : own, own);
    });
    if (out_.bias) bias_gradient(block, gradient);
    if (pairs_) round_to_pairs(block, gradient);
    if (out_.weight) weight_gradient(block, gradient);
    if (out_.hidden) hidden_gradient(block, gradient, reuse, packed, first, hidden_sums);
  }

  // Calls use(first panel, last panel); threads that share a block take some of the panels each.
  template <class Use>
  void for_panels(const Use& use) const {
    const int64_t group = ceil_div(panels_, inner_);
    parallel_for(ceil_div(panels_, group), inner_,
                 [&](int64_t item) { use(item * group, std::min(panels_, (item + 1) * group)); });
  }

  void compute_logits(int64_t block, bool keep_packed, Real* packed, Real* logits) const {
    if (pass_->few()) return pass_->multiply_few(block, logits);
    for (int64_t part = 0; part < pass_->parts(); ++part) {
      Real* place = packed + (keep_packed ? part * kPackedWeight : 0);
      if (inner_ > 1) pass_->pack_part(block, part, place);
      for_panels([&](int64_t first, int64_t last) {
        pass_->multiply_part(block, part, first, last, inner_ == 1, place,
                             logits + first * panel_size_);
      });
    }
  }

  void logit_gradient(int64_t block, int64_t p, const Real* logits, Real* out) const {
    const Real* base = lanes_.data() + p * 6 * panel_;
    const GradientLanes<Real> coefficients{
        base,
        base + panel_,
        base + 2 * panel_,
        base + 3 * panel_,
        base + 4 * panel_,
        base + 5 * panel_,
        with_entropy_[p] != 0,
    };
    k_->gradient(logits, pass_->block_v(block), coefficients, pass_->vectors_of(p), out);
    for (int64_t lane = 0; lane < pass_->lanes_of(p); ++lane) {
      const int64_t row = p * panel_ + lane, v = pass_->rows().target[row] - block * kBlockV;
      if (v >= 0 && v < kBlockV && (*gradients_)[row].active)
        out[v * panel_ + lane] += static_cast<Real>((*gradients_)[row].target);
    }
  }

  void round_to_pairs(int64_t block, Real* gradient) const {
    if constexpr (sizeof(Real) == sizeof(float))
      parallel_for(panels_, inner_, [&](int64_t p) {
        pairs_->pack_gradient(gradient + p * panel_size_, pass_->block_v(block));
      });
  }

  void weight_gradient(int64_t block, const Real* gradient) const {
    const int64_t number = out_.round ? 2 : static_cast<int64_t>(sizeof(Real));
    const int64_t size_v = pass_->block_v(block), tiles = ceil_div(size_v, k_->tile);
    const int64_t bytes = columns_size_ * static_cast<int64_t>(sizeof(Real));
    parallel_for(ceil_div(in_.d, panel_), inner_, [&](int64_t part) {
      const int64_t width = std::min<int64_t>(panel_, in_.d - part * panel_);
      char* place =
          static_cast<char*>(out_.weight) + (block * kBlockV * in_.d + part * panel_) * number;
      const Real* columns = columns_.data() + part * columns_size_;
      Ahead ahead[kAhead];
      if (width == panel_) {
        ahead[0] = Ahead(columns + columns_size_, bytes, bytes, 1, tiles);
        ahead[1] = Ahead(place + width * number, in_.d * number, width * number, size_v, tiles);
      }
      pass_->choose(&HeadKernels<Real>::weight_gradient, &PairKernels::weight_gradient)(
          gradient, columns, pass_->rows().size(),
          {place, in_.d, size_v, width, static_cast<Real>(out_.alpha), add_, out_.round}, ahead);
    });
  }

  void bias_gradient(int64_t block, const Real* gradient) const {
    Real sums[kBlockV];
    k_->bias_gradient(gradient, pass_->block_v(block), pass_->rows().size(), sums);
    Real* place = static_cast<Real*>(out_.bias) + block * kBlockV;
    for (int64_t v = 0; v < pass_->block_v(block); ++v)
      place[v] = (add_ ? place[v] : Real(0)) + static_cast<Real>(out_.alpha) * sums[v];
  }

  // sums [panels, D, P] (+)= the block's weights times its logit gradients
  void hidden_gradient(int64_t block, const Real* gradient, bool packed_before, Real* packed,
                       bool first_block, Real* sums) const {
    const auto pack = pass_->choose(&HeadKernels<Real>::pack_weight, &PairKernels::pack_weight);
    const int64_t parts = ceil_div(in_.d, kBlockD), size_v = pass_->block_v(block);
    for (int64_t part = 0; part < parts; ++part) {
      Real* place = packed + (packed_before ? part * kPackedWeight : 0);
      const BlockSize size{size_v, std::min(kBlockD, in_.d - part * kBlockD)};
      if (!packed_before) pack(weight_, block * kBlockV, part * kBlockD, size, place);
      for_panels([&](int64_t first, int64_t last) {
        multiply_hidden(block, part, size, first, last, gradient, place, packed_before, first_block,
                        sums);
      });
    }
  }

  void multiply_hidden(int64_t block, int64_t part, BlockSize size, int64_t first, int64_t last,
                       const Real* gradient, const Real* packed, bool packed_before,
                       bool first_block, Real* sums) const {
    // Rounded gradients lie twice in their place, pairs of vocabulary rows in the second half.
    const int64_t half = pairs_ ? panel_size_ / 2 : 0;
    const int64_t tiles = ceil_div(size.d, k_->tile), d = part * kBlockD;
    const int64_t number = static_cast<int64_t>(sizeof(Real)), bytes = size.d * panel_ * number;
    Ahead ahead[kAhead];
    if (d + kBlockD < in_.d)
      ahead[1] = packed_before ? Ahead(packed + kPackedWeight, kWeightStride * number,
                                       size.d * number, size.v, tiles * (last - first))
                               : ahead_of(weight_, block * kBlockV, d + kBlockD, size,
                                          tiles * (last - first));
    for (int64_t p = first; p < last; ++p) {
      Real* place = sums + (p * in_.d + d) * panel_;
      ahead[0] = p + 1 < last ? Ahead(place + in_.d * panel_, bytes, bytes, 1, tiles) : Ahead();
      pass_->choose(&HeadKernels<Real>::hidden_gradient, &PairKernels::hidden_gradient)(
          gradient + p * panel_size_ + half, packed, {ceil_div(size.v, depth_of_number()), size.d},
          !first_block, pass_->vectors_of(p), ahead, place);
    }
  }

  // Rows may repeat: their gradients add up in the order of the selection.
  void add_to_hidden(const Real* sums) const {
    auto* hidden = static_cast<Real*>(out_.hidden);
    parallel_for(ceil_div(in_.d, kBlockD), in_.num_threads, [&](int64_t part) {
      const int64_t d = part * kBlockD;
      for (int64_t p = 0; p < panels_; ++p)
        k_->add_rows(sums + (p * in_.d + d) * panel_, std::min(kBlockD, in_.d - d),
                     rows_.data() + p * panel_, pass_->lanes_of(p), in_.d, hidden + d);
    });
  }

  const HeadInputs& in_;
  const HeadGradients& out_;
  Matrix weight_, hidden_;
  // Of the pass at hand.
  const HeadPass<Real>* pass_ = nullptr;
  const HeadKernels<Real>* k_ = nullptr;
  const PairKernels* pairs_ = nullptr;
  const std::vector<RowGradient<Real>>* gradients_ = nullptr;
  bool add_ = false;
  int64_t panels_ = 0, panel_ = 0, panel_size_ = 0;
  int inner_ = 1;                   // threads that share a block
  std::vector<int64_t> rows_;       // of hidden, -1 where a row is not active
  std::vector<Real> lanes_;         // coefficients of logit_gradient
  std::vector<char> with_entropy_;  // [panels]
  int64_t columns_size_ = 0;
  Buffer<Real> columns_;
  Buffer<Real> total_, partial_;  // [panels, D, P], gradient of hidden: all, and of each thread
};

// What is left behind when no row takes part.
inline void clear_gradients(const HeadInputs& in, const HeadGradients& out) {
  if (out.accumulate) return;
  const size_t number = in.dtype == Dtype::kFloat64 ? 8 : 4;
  const auto v = static_cast<size_t>(in.v), d = static_cast<size_t>(in.d);
  if (out.weight) std::memset(out.weight, 0, v * d * (out.round ? 2 : number));
  if (out.bias) std::memset(out.bias, 0, v * number);
}

// Rows that share a sweep over the head. A rounded gradient of the head must not be written twice,
// so there all rows go together while they are not too many.
template <typename Real>
int64_t rows_of_sweep(const HeadPass<Real>& pass, const HeadGradients& out, int64_t num_rows) {
  const bool all_kept = pass.blocks_to_keep(kRowsWithGradient) == pass.blocks();
  const bool together = out.round && num_rows <= kRowsWithGradient;
  return all_kept || together ? kRowsWithGradient : kGroupRows;
}

// Calls run(gradients). Where a rounded gradient of the head takes several sweeps, they add up in
// float32 and are rounded at the end.
template <class Run>
void with_rounded_weight(const HeadInputs& in, const HeadGradients& out, bool one_sweep,
                         const Run& run) {
  if (!out.round || !out.weight || one_sweep) return run(out);
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
