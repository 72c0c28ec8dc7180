// Forward pass of attention under intervals: a block of query lines past the key tiles it sees.
#pragma once

#include "cpu/attention_panels.h"

namespace dlm_fast::cpu {

template <class V>
struct AttentionForwardBlock {
  using Softmax = PanelSoftmax<V>;
  using Tiles = typename Softmax::Tiles;
  using Real = typename V::Real;
  using Part = typename Tiles::Part;
  static constexpr int kPanel = Tiles::kPanel;
  static constexpr int64_t kPanels = kBlockLines / kPanel;

  struct Panel {
    typename Softmax::Panel state;
    int64_t index;
    IntervalAttentionPlan::Range left;  // tiles it has not met yet
  };

  const AttentionForward& call;
  const IntervalAttentionInputs& in;
  const int64_t head, num_panels;
  Softmax softmax;
  Panel panels[kPanels];

  AttentionForwardBlock(const AttentionForward& c, int64_t key_head, int64_t block)
      : call(c),
        in(c.inputs),
        head(key_head),
        num_panels(std::min(kPanels, c.plan.panels() - block * kPanels)),
        softmax(in.width, thread_scratch<Real>(Softmax::tile_size(in.width) +
                                               kPanels * Softmax::panel_size(in.width))) {
    Real* memory = softmax.strips + Softmax::tile_size(in.width);
    for (int64_t p = 0; p < num_panels; ++p)
      panels[p] = {Softmax::panel_at(memory + p * Softmax::panel_size(in.width), in.width),
                   block * kPanels + p, call.plan.entries(block * kPanels + p)};
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
        softmax.meet(panel.state, call.plan.lines_of(panel.index), part);
      }
    }
    for (int64_t p = 0; p < num_panels; ++p) finish(panels[p]);
  }

  void start(const Panel& panel) {
    int64_t offsets[kPanel];
    Tiles::line_offsets(in, call.plan, head, panel.index, in.q.row_stride, in.q.head_stride,
                        offsets);
    softmax.start(panel.state, Tiles::matrix_of(in.q, in.width, in.dtype), offsets, in.scale);
  }

  void pack(int64_t tile) {
    const int64_t first = tile * kKeyTile;
    const int64_t count = std::min(kKeyTile, in.num_keys - first);
    Tiles::pack_strips(Tiles::tile_rows(in, in.k, head, first), count, softmax.strips);
    Tiles::copy_rows(Tiles::tile_rows(in, in.v, head, first), count, softmax.values, softmax.odd);
  }

  void finish(const Panel& panel) {
    int64_t offsets[kPanel], rows[kPanel];
    const int64_t heads = in.query_heads;
    Tiles::line_offsets(in, call.plan, head, panel.index, heads * in.width, in.width, offsets);
    Tiles::line_offsets(in, call.plan, head, panel.index, heads, 1, rows);
    softmax.finish(panel.state, call.plan.lines_of(panel.index), offsets, rows,
                   static_cast<Real*>(call.out), static_cast<Real*>(call.lse));
  }
};

}  // namespace dlm_fast::cpu
