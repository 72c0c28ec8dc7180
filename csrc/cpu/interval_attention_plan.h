// Which panels of query lines meet which tiles of keys: computed once per call, for all heads.
//
// The query heads that share a key head lie beside each other: line l of a key head is row
// l / group, query head l % group of its group. So grouped heads are one head with group times the
// rows, their key and value gradients add up by themselves, and intervals are multiplied by group.
#pragma once

#include <cstdint>
#include <vector>

namespace dlm_fast::cpu {

// Keys of a tile: whole strips of every register tile (4, 6, 14). Scores of a panel and the tile
// stay in L1.
constexpr int64_t kKeyTile = 84;

struct TileEntry {
  int32_t tile;
  int16_t first, last;  // keys [first, last) of the tile hold all that the panel sees
  bool full;            // every line of the panel sees every key of [first, last)
};

class IntervalAttentionPlan {
 public:
  IntervalAttentionPlan(const int32_t* intervals, int64_t num_keys, int64_t num_queries,
                        int64_t group, int64_t panel);

  int64_t lines() const {
    return lines_;
  }
  int64_t panels() const {
    return (lines_ + panel_ - 1) / panel_;
  }
  int64_t lines_of(int64_t panel) const {
    const int64_t left = lines_ - panel * panel_;
    return left < panel_ ? left : panel_;
  }

  struct Range {
    const TileEntry *first, *last;
    const TileEntry* begin() const {
      return first;
    }
    const TileEntry* end() const {
      return last;
    }
    bool empty() const {
      return first == last;
    }
  };
  // The tiles that a panel meets, in order; those of [tile, tile + count) alone.
  Range entries(int64_t panel) const {
    return {entries_.data() + begin_[panel], entries_.data() + begin_[panel + 1]};
  }
  Range entries(int64_t panel, int64_t tile, int64_t count) const;

  struct PanelRange {
    int64_t first, last;
  };
  // Panels [first, last) hold all that meet one of the tiles [tile, tile + count).
  PanelRange panels_of(int64_t tile, int64_t count) const;

  // Bit i of out[j]: line i of the panel sees key first + j of the tile; 0 past the last key.
  void visible(int64_t panel, const TileEntry& entry, uint32_t* out) const;

 private:
  struct TileBounds;
  struct Met;
  static TileBounds bounds_of(const int32_t* intervals, int64_t first, int64_t last, int64_t group);
  uint32_t bits(int64_t first_line, int64_t key) const;
  void meet(int64_t panel, int64_t tile, const TileBounds& bounds, std::vector<Met>& met) const;

  const int32_t* intervals_;
  int64_t num_keys_, group_, panel_, lines_;
  std::vector<int64_t> begin_;
  std::vector<TileEntry> entries_;
  std::vector<PanelRange> panels_of_tile_;
};

}  // namespace dlm_fast::cpu
