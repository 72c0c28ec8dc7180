// Training rows of block-diffusion trajectories: one clean stream and every noisy state once.
#pragma once

#include <cstdint>
#include <vector>

namespace dlm_fast {

// A tree of token runs in depth-first preorder: a response behind its prompt (chain), a group
// behind its prompt (star), or a tree of blocks. A run continues its parent at the next position.
struct TraceTree {
  int64_t num_nodes;
  const int64_t* parent;  // [nodes], -1 for the root, which is the first
  const int64_t* start;   // [nodes + 1], first token of each run
  const int64_t* ids;     // [tokens]
  int64_t copies;         // recorded orders of revelation, each with its own chunks
  const int32_t* step;    // [copies, tokens], when a token was revealed; 0: known from the start
  const bool* trainable;  // [copies, tokens], whether a token may be a target
};

struct TraceOptions {
  int64_t block_size;
  int64_t mask_id;
  int64_t shrink;         // neighbouring steps of a block that are merged
  int64_t grid_shift;     // block of position p: (p + shift) / block_size; 0: the grid of the model
  bool last_block_clean;  // clean rows for the last block of a leaf too, which nobody sees
};

// T rows, U targets.
struct TracePack {
  std::vector<int64_t> ids;           // [T]
  std::vector<int64_t> position;      // [T]
  std::vector<int32_t> intervals;     // [T, 4], the query rows that see a row
  std::vector<int32_t> target_row;    // [U]
  std::vector<int64_t> target_token;  // [U], index of the token in the tree
  std::vector<int32_t> target_step;   // [U], after merging
  std::vector<int32_t> target_copy;   // [U]
};

namespace cpu {

// Throws std::invalid_argument where the tree is none, or sizes do not fit.
TracePack trace_pack(const TraceTree& tree, const TraceOptions& options);

}  // namespace cpu
}  // namespace dlm_fast
