// One work item of attention over a prefix tree: a chunk of keys for some rows, one key head.
//
// The rows' query heads that share the key head are its lines. Whole panels of lines go through
// register tiles with queries in the lanes; a rest of few lines goes row by row.
#pragma once

#include "cpu/attention_lines.h"
#include "cpu/attention_panels.h"
#include "cpu/tree_attention_kernels.h"

namespace dlm_fast::cpu {

template <class V, Dtype kType>
struct TreeItemWork {
  using Real = typename V::Real;
  using Panels = PanelSoftmax<V>;
  using Tiles = typename Panels::Tiles;
  using Lines = LineSoftmax<V, kType>;
  static constexpr int kPanel = Panels::kPanel;
  static constexpr int64_t kPanels = kBlockLines / kPanel;
  static constexpr int64_t kFewLines = V::kLanes / 2;  // more of them are cheaper as a panel
  static constexpr int64_t kMostKeys = std::max(kKeyTile, kRowTile);

  const TreeCall& call;
  const TreeAttentionInputs& in;
  const TreeItem& item;
  const int64_t head, group;
  int64_t offsets[kMostKeys];   // of the keys of a tile
  int64_t limits[kBlockLines];  // keys of this item that a line of the block sees
  Real* memory;
  Panels panels;
  Lines lines;

  TreeItemWork(const TreeCall& c, int64_t number, int64_t key_head)
      : call(c),
        in(c.inputs),
        item(c.plan.items[number]),
        head(key_head),
        group(in.query_heads / in.key_heads),
        memory(thread_scratch<Real>(memory_size(in.width))),
        panels(in.width, memory),
        lines(in.width, kFewLines, kMostKeys, memory + panels_size(in.width)) {}

  static int64_t panels_size(int64_t width) {
    return Panels::tile_size(width) + kPanels * Panels::panel_size(width);
  }
  // Behind the panels and the lines: finished rows of a panel, and their log-sum-exp.
  static int64_t memory_size(int64_t width) {
    return panels_size(width) + round_up(Lines::size(width, kFewLines, kMostKeys), 16) +
           kPanel * (width + 1);
  }

  void run() {
    const int64_t all = item.num_rows * group;
    for (int64_t first = 0; first < all; first += kBlockLines)
      run_block(first, std::min(kBlockLines, all - first));
  }

  void run_block(int64_t first, int64_t count) {
    const int64_t rest = count % kPanel;
    const int64_t by_row = rest <= kFewLines ? rest : 0, by_panel = count - by_row;
    for (int64_t i = 0; i < count; ++i) limits[i] = limit_of(first + i);
    for (int64_t p = 0; p * kPanel < by_panel; ++p) start_panel(first, p, by_panel);
    for (int64_t i = 0; i < by_row; ++i)
      lines.start(i, in.q.data, query_offset(first + by_panel + i), in.scale);
    const int64_t tile = by_panel ? kKeyTile : kRowTile;
    int64_t piece = item.first_piece, used = 0;  // keys of the piece that were taken
    for (int64_t key = 0; key < item.num_keys; key += tile) {
      const int64_t keys = std::min<int64_t>(tile, item.num_keys - key);
      find_keys(keys, piece, used);
      if (by_panel) meet_panels(key, keys, by_panel);
      if (by_row) meet_lines(key, keys, by_panel, by_row);
    }
    for (int64_t p = 0; p * kPanel < by_panel; ++p) finish_panel(first, p, by_panel);
    for (int64_t i = 0; i < by_row; ++i) finish_line(first + by_panel + i, i);
  }

  int64_t row_of(int64_t line) const {
    return item.first_row + line / group;
  }
  int64_t head_of(int64_t line) const {
    return head * group + line % group;
  }
  int64_t query_offset(int64_t line) const {
    return call.plan.rows[row_of(line)] * in.q.row_stride + head_of(line) * in.q.head_stride;
  }
  int64_t limit_of(int64_t line) const {
    const int64_t seen = int64_t{call.plan.limits[row_of(line)]} - item.position;
    return std::min<int64_t>(std::max<int64_t>(seen, 0), item.num_keys);
  }

  // A piece lies in one page.
  void find_keys(int64_t count, int64_t& piece, int64_t& used) {
    const PagedKeys& keys = in.keys;
    for (int64_t i = 0; i < count;) {
      int64_t left = call.plan.piece_starts[piece + 1] - call.plan.piece_starts[piece] - used;
      if (left == 0) {
        ++piece;
        used = 0;
        continue;
      }
      const int64_t slot = call.plan.piece_slots[piece] + used;
      int64_t offset = slot / keys.page * keys.page_stride + slot % keys.page * keys.token_stride +
                       head * keys.head_stride;
      left = std::min(left, count - i);
      used += left;
      for (; left > 0; --left, offset += keys.token_stride) offsets[i++] = offset;
    }
  }

  // --- lines as lanes

  typename Panels::Panel panel_at(int64_t panel) const {
    return Panels::panel_at(
        memory + Panels::tile_size(in.width) + panel * Panels::panel_size(in.width), in.width);
  }

  void start_panel(int64_t first, int64_t panel, int64_t count) const {
    int64_t place[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t line = panel * kPanel + i;
      place[i] = line < count ? query_offset(first + line) : -1;
    }
    panels.start(panel_at(panel), {in.q.data, 1, in.width, in.dtype}, place, in.scale);
  }

  void meet_panels(int64_t key, int64_t keys, int64_t count) {
    const Matrix rows{in.keys.data, 0, in.width, in.dtype};
    Tiles::pack_strips(rows, [&](int64_t i) { return offsets[i]; }, keys, panels.strips);
    Tiles::copy_rows(
        rows, [&](int64_t i) { return offsets[i] + in.keys.value_stride; }, keys, panels.values,
        panels.odd);
    for (int64_t p = 0; p * kPanel < count; ++p) {
      typename Panels::Part part(keys);
      if (item.is_masked)
        mask(part, key, keys, p * kPanel, std::min<int64_t>(kPanel, count - p * kPanel));
      panels.meet(panel_at(p), count - p * kPanel, part);
    }
  }

  void mask(typename Panels::Part& part, int64_t key, int64_t keys, int64_t first,
            int64_t count) const {
    for (int64_t j = 0; j < keys; ++j)
      for (int64_t i = 0; i < count; ++i)
        if (key + j >= limits[first + i]) {
          part.bits[j] &= ~(1u << i);
          part.masked = true;
        }
  }

  void finish_panel(int64_t first, int64_t panel, int64_t count) const {
    Real* out = memory + memory_size(in.width) - kPanel * (in.width + 1);
    Real* lse = out + kPanel * in.width;
    int64_t place[kPanel], number[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) {
      place[i] = i * in.width;
      number[i] = i;
    }
    const int64_t left = std::min<int64_t>(kPanel, count - panel * kPanel);
    panels.finish(panel_at(panel), left, place, number, out, lse);
    for (int64_t i = 0; i < left; ++i) {
      const Result result = result_of(first + panel * kPanel + i);
      std::copy_n(out + i * in.width, in.width, result.out);
      *result.lse = lse[i];
    }
  }

  // --- lines one by one

  void meet_lines(int64_t key, int64_t keys, int64_t first, int64_t count) {
    int64_t seen[kFewLines];
    for (int64_t i = 0; i < count; ++i)
      seen[i] = std::min(std::max<int64_t>(limits[first + i] - key, 0), keys);
    lines.meet(0, count, {in.keys.data, offsets, in.keys.value_stride, keys}, seen);
  }

  void finish_line(int64_t line, int64_t place) const {
    const Result result = result_of(line);
    *result.lse = lines.finish(place, result.out);
  }

  // --- results

  struct Result {
    Real *out, *lse;
  };

  Result result_of(int64_t line) const {
    const int64_t to = call.plan.destinations[item.destination + line / group];
    const bool direct = to < 0;
    const int64_t at = (direct ? ~to : to) * in.query_heads + head_of(line);
    return {static_cast<Real*>(direct ? call.out : call.part_states) + at * in.width,
            static_cast<Real*>(direct ? call.lse : call.part_lse) + at};
  }
};

// For the table of a vector type.
template <class V>
void run_tree_item(const TreeCall& call, int64_t item, int64_t head) {
  switch (call.inputs.dtype) {
    case Dtype::kBFloat16:
      return TreeItemWork<V, Dtype::kBFloat16>(call, item, head).run();
    case Dtype::kFloat16:
      return TreeItemWork<V, Dtype::kFloat16>(call, item, head).run();
    default:
      return TreeItemWork<V, sizeof(typename V::Real) == 8 ? Dtype::kFloat64 : Dtype::kFloat32>(
                 call, item, head)
          .run();
  }
}

}  // namespace dlm_fast::cpu
