// Forward pass of attention under intervals: a block of query lines past the key tiles it sees.
#pragma once

#include <cmath>
#include <limits>

#include "cpu/interval_attention_tiles.h"

namespace dlm_fast::cpu {

template <class V>
struct AttentionForwardBlock {
  using Tiles = AttentionTiles<V>;
  using Gemm = typename Tiles::Gemm;
  using Real = typename V::Real;
  using Part = typename Tiles::Part;
  static constexpr int kLanes = Tiles::kLanes;
  static constexpr int kPanel = Tiles::kPanel;
  static constexpr int kTile = Tiles::kTile;
  static constexpr int64_t kPanels = kBlockLines / kPanel;

  // A panel of the block: its queries, running maximum and sum, sum of weighted values.
  struct Panel {
    Real *query, *max, *sum, *out;
    int64_t index;
    IntervalAttentionPlan::Range left;  // tiles it has not met yet
  };

  const AttentionForward& call;
  const IntervalAttentionInputs& in;
  const int64_t head, width;
  Real *strips, *values, *scores;
  Panel panels[kPanels];
  int64_t num_panels;
  OddRows<Real> odd;

  AttentionForwardBlock(const AttentionForward& c, int64_t key_head, int64_t block)
      : call(c), in(c.inputs), head(key_head), width(in.width) {
    const int64_t first = block * kPanels;
    num_panels = std::min(kPanels, call.plan.panels() - first);
    const int64_t panel_size = 2 * (width + 1) * kPanel;
    const int64_t strips_size = round_up(Tiles::strips_size(width), 16);
    const int64_t values_size = round_up(Tiles::rows_size(width), 16);
    Real* memory =
        thread_scratch<Real>(strips_size + values_size + kKeyTile * kPanel + kPanels * panel_size);
    strips = memory;
    values = strips + strips_size;
    scores = values + values_size;
    for (int64_t p = 0; p < num_panels; ++p) {
      Real* place = scores + kKeyTile * kPanel + p * panel_size;
      panels[p] = {place,
                   place + width * kPanel,
                   place + (width + 1) * kPanel,
                   place + (width + 2) * kPanel,
                   first + p,
                   call.plan.entries(first + p)};
    }
  }

  void run() {
    for (int64_t p = 0; p < num_panels; ++p) start(panels[p]);
    while (true) {
      int64_t tile = std::numeric_limits<int64_t>::max();
      for (int64_t p = 0; p < num_panels; ++p)
        if (!panels[p].left.empty()) tile = std::min<int64_t>(tile, panels[p].left.first->tile);
      if (tile == std::numeric_limits<int64_t>::max()) break;
      pack(tile);
      for (int64_t p = 0; p < num_panels; ++p) {
        Panel& panel = panels[p];
        if (panel.left.empty() || panel.left.first->tile != tile) continue;
        const Part part(call.plan, panel.index, *panel.left.first++);
        if (call.plan.lines_of(panel.index) <= kLanes)
          meet<1>(panel, part);
        else
          meet<2>(panel, part);
      }
    }
    for (int64_t p = 0; p < num_panels; ++p) finish(panels[p]);
  }

  void start(Panel& panel) {
    int64_t offsets[kPanel];
    Tiles::line_offsets(in, call.plan, head, panel.index, in.q.row_stride, in.q.head_stride,
                        offsets);
    Gemm::pack_rows(Tiles::matrix_of(in.q, width, in.dtype), offsets, kPanel, panel.query);
    const V scale = V::set(static_cast<Real>(in.scale));
    for (int64_t i = 0; i < width * kPanel; i += kLanes)
      (scale * V::load(panel.query + i)).store(panel.query + i);
    std::fill_n(panel.max, kPanel, -std::numeric_limits<Real>::infinity());
    std::fill_n(panel.sum, kPanel, Real(0));
    std::fill_n(panel.out, width * kPanel, Real(0));
  }

  void pack(int64_t tile) {
    const int64_t first = tile * kKeyTile;
    const int64_t count = std::min(kKeyTile, in.num_keys - first);
    Tiles::pack_strips(Tiles::tile_rows(in, in.k, head, first), count, strips);
    Tiles::copy_rows(Tiles::tile_rows(in, in.v, head, first), count, values, odd);
  }

  template <int kVectors>
  void meet(Panel& panel, const Part& part) {
    V highest[kVectors], scale[kVectors];
    if (part.masked)
      score<kVectors, true>(panel, part, highest);
    else
      score<kVectors, false>(panel, part, highest);
    exponentials(panel, part, highest, scale);
    Tiles::over_keys(values, width, scores, part, scale, panel.out);
    if (!odd.index.empty()) Tiles::add_odd_keys(odd, width, scores, part, panel.out);
  }

  // Scores of the part, minus infinity where a line does not see the key, and their maximum.
  template <int kVectors, bool kMasked>
  void score(const Panel& panel, const Part& part, V (&highest)[kVectors]) {
    const V nothing = V::set(-std::numeric_limits<Real>::infinity());
    for (V& h : highest) h = nothing;
    for (int64_t key = part.first; key < part.last; key += kTile) {
      V tile[kTile][kVectors];
      Tiles::strip_product(strips + key * width, panel.query, width, tile);
      DLM_UNROLL
      for (int i = 0; i < kTile; ++i)
        for (int j = 0; j < kVectors; ++j) {
          V value = tile[i][j];
          if (kMasked)
            value = V::select(V::lanes(part.bits[key + i] >> (j * kLanes)), value, nothing);
          highest[j] = V::larger(value, highest[j]);
          value.store(scores + (key + i) * kPanel + j * kLanes);
        }
    }
  }

  // Scores become weights under the new maximum; `scale` takes what was summed before to it.
  template <int kVectors>
  void exponentials(Panel& panel, const Part& part, const V (&highest)[kVectors],
                    V (&scale)[kVectors]) {
    const V nothing = V::set(-std::numeric_limits<Real>::infinity());
    for (int j = 0; j < kVectors; ++j) {
      const V before = V::load(panel.max + j * kLanes);
      const V max = V::larger(highest[j], before);
      // A line that has seen nothing yet: minus infinity less itself would be NaN.
      const V base = V::select(V::equal(max, nothing), V::set(0), max);
      scale[j] = V::exp(before - base);
      V sum = V::set(0);
      for (int64_t key = part.first; key < part.last; ++key) {
        Real* place = scores + key * kPanel + j * kLanes;
        const V weight = V::exp(V::load(place) - base);
        weight.store(place);
        sum = sum + weight;
      }
      V::fma(V::load(panel.sum + j * kLanes), scale[j], sum).store(panel.sum + j * kLanes);
      max.store(panel.max + j * kLanes);
    }
  }

  void finish(Panel& panel) {
    int64_t offsets[kPanel], rows[kPanel];
    const int64_t heads = in.query_heads;
    Tiles::line_offsets(in, call.plan, head, panel.index, heads * width, width, offsets);
    Tiles::line_offsets(in, call.plan, head, panel.index, heads, 1, rows);
    const int64_t lines = call.plan.lines_of(panel.index);
    Real* out = static_cast<Real*>(call.out);
    Real* lse = static_cast<Real*>(call.lse);
    Real inverse[kPanel] = {};
    for (int64_t i = 0; i < lines; ++i) {
      const double sum = panel.sum[i];
      inverse[i] = sum == 0 ? Real(0) : static_cast<Real>(1 / sum);
      lse[rows[i]] = static_cast<Real>(panel.max[i] + std::log(sum));
      std::fill_n(out + offsets[i], width, Real(0));
    }
    for (int64_t d = 0; d < width; ++d)
      for (int j = 0; j < kPanel; j += kLanes)
        (V::load(inverse + j) * V::load(panel.out + d * kPanel + j))
            .store(panel.out + d * kPanel + j);
    Gemm::add_rows(panel.out, width, offsets, lines, 1, out);
  }
};

}  // namespace dlm_fast::cpu
