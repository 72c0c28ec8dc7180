// Classifies pairs of query panel and key tile: unseen, seen by all, in between.
#include "cpu/interval_attention_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace dlm_fast::cpu {

namespace {

uint32_t interval_bits(int64_t lo, int64_t hi, int64_t panel) {
  const auto below = [panel](int64_t end) {
    const int64_t bits = std::min(std::max<int64_t>(end, 0), panel);
    return (uint64_t{1} << bits) - 1;
  };
  return static_cast<uint32_t>(below(hi) & ~below(lo));
}

}  // namespace

// Bounds of the intervals of a tile's keys, one for each of the two intervals; in lines.
struct IntervalAttentionPlan::TileBounds {
  int64_t lowest_lo[2], highest_hi[2];  // of the intervals that are not empty
  int64_t highest_lo[2], lowest_hi[2];  // of all
};

struct IntervalAttentionPlan::Met {
  int64_t panel;
  TileEntry entry;
};

IntervalAttentionPlan::TileBounds IntervalAttentionPlan::bounds_of(const int32_t* intervals,
                                                                   int64_t first, int64_t last,
                                                                   int64_t group) {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  TileBounds bounds{{kMost, kMost}, {0, 0}, {0, 0}, {kMost, kMost}};
  for (int64_t key = first; key < last; ++key)
    for (int which = 0; which < 2; ++which) {
      const int64_t lo = intervals[4 * key + 2 * which] * group;
      const int64_t hi = intervals[4 * key + 2 * which + 1] * group;
      if (lo < hi) {
        bounds.lowest_lo[which] = std::min(bounds.lowest_lo[which], lo);
        bounds.highest_hi[which] = std::max(bounds.highest_hi[which], hi);
      }
      bounds.highest_lo[which] = std::max(bounds.highest_lo[which], lo);
      bounds.lowest_hi[which] = std::min(bounds.lowest_hi[which], hi);
    }
  return bounds;
}

IntervalAttentionPlan::IntervalAttentionPlan(const int32_t* intervals, int64_t num_keys,
                                             int64_t num_queries, int64_t group, int64_t panel)
    : intervals_(intervals),
      num_keys_(num_keys),
      group_(group),
      panel_(panel),
      lines_(num_queries * group) {
  // Tile by tile, past the panels between its first and last line alone; then sorted by panel.
  std::vector<Met> met;
  const int64_t all_panels = (lines_ + panel - 1) / panel;
  for (int64_t tile = 0; tile * kKeyTile < num_keys; ++tile) {
    const TileBounds bounds =
        bounds_of(intervals, tile * kKeyTile, std::min((tile + 1) * kKeyTile, num_keys), group);
    const int64_t lo = std::min(bounds.lowest_lo[0], bounds.lowest_lo[1]);
    const int64_t hi = std::max(bounds.highest_hi[0], bounds.highest_hi[1]);
    const PanelRange range{std::min(lo / panel, all_panels), (hi + panel - 1) / panel};
    panels_of_tile_.push_back(range);
    for (int64_t p = range.first; p < range.last; ++p) meet(p, tile, bounds, met);
  }
  begin_.assign(all_panels + 1, 0);
  for (const Met& m : met) ++begin_[m.panel + 1];
  std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
  entries_.resize(met.size());
  std::vector<int64_t> next(begin_.begin(), begin_.end() - 1);
  for (const Met& m : met) entries_[next[m.panel]++] = m.entry;
}

void IntervalAttentionPlan::meet(int64_t panel, int64_t tile, const TileBounds& bounds,
                                 std::vector<Met>& met) const {
  const int64_t line = panel * panel_, end = line + lines_of(panel);
  bool seen = false, full = false;
  for (int which = 0; which < 2; ++which) {
    seen = seen || (bounds.lowest_lo[which] < end && bounds.highest_hi[which] > line);
    full = full || (bounds.highest_lo[which] <= line && bounds.lowest_hi[which] >= end);
  }
  if (!seen) return;
  const int64_t keys = std::min(kKeyTile, num_keys_ - tile * kKeyTile);
  const uint32_t all = interval_bits(0, lines_of(panel), panel_);
  int64_t first = full ? 0 : keys, last = full ? keys : 0, complete = last;
  for (int64_t j = 0; j < keys && !full; ++j) {
    const uint32_t seen_by = bits(line, tile * kKeyTile + j) & all;
    if (!seen_by) continue;
    first = std::min(first, j);
    last = j + 1;
    complete += seen_by == all;
  }
  if (first < last)
    met.push_back({panel,
                   {static_cast<int32_t>(tile), static_cast<int16_t>(first),
                    static_cast<int16_t>(last), complete == last - first}});
}

uint32_t IntervalAttentionPlan::bits(int64_t first_line, int64_t key) const {
  const int32_t* lo_hi = intervals_ + 4 * key;
  return interval_bits(lo_hi[0] * group_ - first_line, lo_hi[1] * group_ - first_line, panel_) |
         interval_bits(lo_hi[2] * group_ - first_line, lo_hi[3] * group_ - first_line, panel_);
}

IntervalAttentionPlan::PanelRange IntervalAttentionPlan::panels_of(int64_t tile,
                                                                   int64_t count) const {
  PanelRange range{panels(), 0};
  const int64_t end = std::min(tile + count, static_cast<int64_t>(panels_of_tile_.size()));
  for (int64_t t = tile; t < end; ++t) {
    range.first = std::min(range.first, panels_of_tile_[t].first);
    range.last = std::max(range.last, panels_of_tile_[t].last);
  }
  return range;
}

IntervalAttentionPlan::Range IntervalAttentionPlan::entries(int64_t panel, int64_t tile,
                                                            int64_t count) const {
  const Range all = entries(panel);
  const auto before = [](const TileEntry& entry, int64_t t) { return entry.tile < t; };
  return {std::lower_bound(all.first, all.last, tile, before),
          std::lower_bound(all.first, all.last, tile + count, before)};
}

void IntervalAttentionPlan::visible(int64_t panel, const TileEntry& entry, uint32_t* out) const {
  const int64_t key = entry.tile * kKeyTile;
  for (int64_t j = entry.first; j < entry.last; ++j)
    out[j - entry.first] = bits(panel * panel_, key + j);
}

}  // namespace dlm_fast::cpu
