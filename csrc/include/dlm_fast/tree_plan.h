// Which queries meet which stretches of a prefix tree's keys, and how the parts come together.
//
// Made on the host once for all layers of a forward. Query rows are put in depth-first order of
// their nodes, so that the rows below a node are one range. A run is a chain of nodes with one
// range; a work item is a chunk of a run's keys for some of its rows, and leaves one partial state
// a row in a slot; a row with a single part goes to the output at once.
#pragma once

#include <cstdint>
#include <vector>

#include "common/tree_item.h"
#include "dlm_fast/tree_pool.h"

namespace dlm_fast {

struct TreePlanSizes {
  int64_t items, pieces, rows, destinations, merges, slots;
};

// The packed plan: int32, one part after the other.
struct TreePlanView {
  const TreeItem* items;        // [items], long ones first
  const int32_t* piece_slots;   // [pieces] slot of a piece's first key in the pool
  const int32_t* piece_starts;  // [pieces + 1] keys before it
  const int32_t* rows;          // [rows] place in q and out of each row in depth-first order
  const int32_t* limits;        // [rows] keys of its path that it sees
  const int32_t* destinations;  // slot of an item's row; ~place: straight to the output
  const int32_t* merge_places;  // [merges] rows of the output with several parts, or none
  const int32_t* merge_indptr;  // [merges + 1] their slots
};

constexpr int64_t tree_plan_numbers(const TreePlanSizes& s) {
  return kTreeItemNumbers * s.items + 2 * s.pieces + 1 + 2 * s.rows + s.destinations +
         2 * s.merges + 1;
}

inline TreePlanView tree_plan_view(const int32_t* packed, const TreePlanSizes& s) {
  TreePlanView view{};
  view.items = reinterpret_cast<const TreeItem*>(packed);
  view.piece_slots = packed + kTreeItemNumbers * s.items;
  view.piece_starts = view.piece_slots + s.pieces;
  view.rows = view.piece_starts + s.pieces + 1;
  view.limits = view.rows + s.rows;
  view.destinations = view.limits + s.rows;
  view.merge_places = view.destinations + s.destinations;
  view.merge_indptr = view.merge_places + s.merges;
  return view;
}

enum class TreeAbsorb : int { kByCost = 0, kNever = 1, kAlways = 2 };

struct TreePlanOptions {
  bool causal;          // the rows of a node are its path's last tokens, each sees up to itself
  int64_t row_tile;     // most rows of an item
  int64_t chunk;        // about how many keys an item has; 0: as many as keep the workers busy
  int64_t key_heads;    // items of each are worked on apart
  int64_t workers;      // multiprocessors, or threads
  TreeAbsorb absorb;    // whether a run's keys are read again for each child instead of apart
  double state_tokens;  // what a partial state of a row costs, in tokens of keys and values read
};

struct TreePlan {
  TreePlanSizes sizes;
  std::vector<int32_t> packed;
  int64_t unique_tokens;  // of the active nodes
  int64_t read_tokens;    // keys of all runs: those that are read again count again
};

// Rows: row_counts[i] of them for handles[i], in the order of q. Marks the nodes as used.
TreePlan plan_tree(TreePool& pool, const std::vector<int64_t>& handles,
                   const std::vector<int64_t>& row_counts, const TreePlanOptions& options);

}  // namespace dlm_fast
