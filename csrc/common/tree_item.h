// A work item of attention over a prefix tree, as host and device read it. Compiles under NVRTC.
#pragma once

namespace dlm_fast {

// A chunk of keys for a range of rows.
struct TreeItem {
  int first_piece, num_pieces;
  int first_row, num_rows;  // in depth-first order
  int position;             // of the first key on its paths
  int num_keys;
  int destination;  // in the plan's destinations, of the first row
  int is_masked;    // some row does not see all of the keys
};
constexpr int kTreeItemNumbers = 8;
static_assert(sizeof(TreeItem) == kTreeItemNumbers * 4, "items are int32 numbers");

}  // namespace dlm_fast
