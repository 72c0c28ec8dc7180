// Training rows of block-diffusion trajectories, built on the host.
//
// A node has [clean rows by position][noisy chunks by (block, copy, round)]. It owns whole blocks
// of the grid; a block that the end of a node cuts belongs to every child, where tokens from before
// the cut are context. Such a token is a target once, in the first child of each fork. Nothing sees
// the clean rows of a leaf's last block, so it has none.
#include "dlm_fast/trace_pack.h"

#include <algorithm>
#include <limits>

#include "dlm_fast/check.h"

namespace dlm_fast::cpu {

namespace {

// A position of a block: which token it is, and whether its node may train it here.
struct Place {
  int64_t position, token;
  bool own;
};

class Builder {
 public:
  Builder(const TraceTree& tree, const TraceOptions& options) : tree_(tree), options_(options) {
    check();
    const auto nodes = static_cast<size_t>(tree.num_nodes);
    end_.resize(nodes);
    subtree_.assign(nodes, 1);
    first_child_.assign(nodes, -1);
    for (int64_t n = 0; n < tree.num_nodes; ++n) {
      const int64_t parent = tree.parent[n];
      end_[n] = (parent < 0 ? 0 : end_[parent]) + tree.start[n + 1] - tree.start[n];
      if (parent >= 0 && first_child_[parent] < 0) first_child_[parent] = n;
    }
    for (int64_t n = tree.num_nodes - 1; n > 0; --n) subtree_[tree.parent[n]] += subtree_[n];
  }

  TracePack build() {
    std::vector<NodeRows> rows(static_cast<size_t>(tree_.num_nodes));
    for (int64_t n = 0; n < tree_.num_nodes; ++n) rows[n] = add_node(n);
    const auto total = static_cast<int32_t>(pack_.ids.size());
    for (int64_t n = 0; n < tree_.num_nodes; ++n) {
      const int64_t after = n + subtree_[n];
      see(rows[n], after < tree_.num_nodes ? rows[after].first : total);
    }
    return std::move(pack_);
  }

 private:
  // Rows of a node, and the first chunk row of each of its blocks.
  struct NodeRows {
    int32_t first, noisy, end;
    int64_t first_block;
    std::vector<int32_t> chunks_of_block;  // [blocks + 1]
  };

  void check() const {
    DLM_CHECK(options_.block_size >= 1, "trace_pack: block_size must be at least 1");
    DLM_CHECK(options_.shrink >= 1, "trace_pack: shrink must be at least 1");
    DLM_CHECK(options_.grid_shift >= 0 && options_.grid_shift < options_.block_size,
              "trace_pack: the shift of the grid must lie in a block");
    DLM_CHECK(tree_.num_nodes >= 1 && tree_.parent[0] == -1 && tree_.copies >= 1,
              "trace_pack: a tree needs a root and at least one recorded order");
    for (int64_t n = 1; n < tree_.num_nodes; ++n) {
      // preorder: a parent is the node before, or one of that node's ancestors
      int64_t candidate = n - 1;
      while (candidate >= 0 && candidate != tree_.parent[n]) candidate = tree_.parent[candidate];
      DLM_CHECK(candidate >= 0, "trace_pack: nodes must come in depth-first order, parents first");
    }
    const int64_t numbers = tree_.copies * tree_.start[tree_.num_nodes];
    for (int64_t i = 0; i < numbers; ++i)
      DLM_CHECK(tree_.step[i] >= 0, "trace_pack: steps must not be negative");
  }

  int64_t begin_of(int64_t node) const {
    return tree_.parent[node] < 0 ? 0 : end_[tree_.parent[node]];
  }
  int64_t block_of(int64_t position) const {
    return (position + options_.grid_shift) / options_.block_size;
  }
  int64_t block_begin(int64_t block) const {
    return std::max<int64_t>(0, block * options_.block_size - options_.grid_shift);
  }

  // The positions [from, to) on the way from the root to a node.
  void find_places(int64_t node, int64_t from, int64_t to) {
    places_.resize(static_cast<size_t>(std::max<int64_t>(0, to - from)));
    bool own = true;  // of all nodes below the cut, the first child of each fork trains
    for (int64_t n = node; n >= 0 && from < to; n = tree_.parent[n]) {
      for (int64_t p = std::max(from, begin_of(n)); p < std::min(to, end_[n]); ++p)
        places_[p - from] = {p, tree_.start[n] + p - begin_of(n), own};
      own = own && tree_.parent[n] >= 0 && first_child_[tree_.parent[n]] == n;
    }
  }

  void add_row(int64_t id, int64_t position) {
    DLM_CHECK(pack_.ids.size() < static_cast<size_t>(std::numeric_limits<int32_t>::max()),
              "trace_pack: more rows than an interval can name");
    pack_.ids.push_back(id);
    pack_.position.push_back(position);
    pack_.intervals.insert(pack_.intervals.end(), 4, 0);
  }

  int32_t num_rows() const {
    return static_cast<int32_t>(pack_.ids.size());
  }

  NodeRows add_node(int64_t node) {
    const bool leaf = first_child_[node] < 0;
    NodeRows rows;
    rows.first = num_rows();
    rows.first_block = block_of(begin_of(node));
    const int64_t begin = block_begin(rows.first_block), end = end_[node];
    // Behind the last block with chunks; nothing, where the node adds nothing to a whole block.
    int64_t last_block =
        leaf ? (end > begin ? block_of(end - 1) + 1 : rows.first_block) : block_of(end);
    last_block = std::max(last_block, rows.first_block);
    int64_t clean_end =
        leaf ? block_begin(std::max(last_block - 1, rows.first_block)) : block_begin(last_block);
    if (leaf && options_.last_block_clean) clean_end = end;
    find_places(node, begin, std::max(begin, clean_end));
    for (const Place& place : places_) add_row(tree_.ids[place.token], place.position);
    rows.noisy = num_rows();
    for (int64_t block = rows.first_block; block < last_block; ++block) {
      rows.chunks_of_block.push_back(num_rows());
      find_places(node, block_begin(block), std::min(block_begin(block + 1), end));
      for (int64_t copy = 0; copy < tree_.copies; ++copy) add_chunks(copy);
    }
    rows.chunks_of_block.push_back(num_rows());
    rows.end = num_rows();
    return rows;
  }

  // One chunk per round of the block that `places_` holds.
  void add_chunks(int64_t copy) {
    const int64_t tokens = tree_.start[tree_.num_nodes];
    const int32_t* step = tree_.step + copy * tokens;
    const bool* trainable = tree_.trainable + copy * tokens;
    merge_steps(step);
    for (const int32_t round : rounds_) {
      const auto is_target = [&](size_t i) {
        return places_[i].own && merged_[i] == round && trainable[places_[i].token];
      };
      bool any = false;
      for (size_t i = 0; i < places_.size(); ++i) any = any || is_target(i);
      if (!any) continue;
      const int32_t first = num_rows();
      for (size_t i = 0; i < places_.size(); ++i) {
        if (is_target(i)) {
          pack_.target_row.push_back(num_rows());
          pack_.target_token.push_back(places_[i].token);
          pack_.target_step.push_back(round);
          pack_.target_copy.push_back(static_cast<int32_t>(copy));
        }
        const bool masked = merged_[i] >= round;
        add_row(masked ? options_.mask_id : tree_.ids[places_[i].token], places_[i].position);
      }
      for (int32_t row = first; row < num_rows(); ++row) {
        pack_.intervals[4 * static_cast<size_t>(row)] = first;
        pack_.intervals[4 * static_cast<size_t>(row) + 1] = num_rows();
      }
    }
  }

  // `shrink` neighbouring steps of the block become the last of them. 0 stays 0.
  void merge_steps(const int32_t* step) {
    rounds_.clear();
    for (const Place& place : places_)
      if (step[place.token] > 0) rounds_.push_back(step[place.token]);
    std::sort(rounds_.begin(), rounds_.end());
    rounds_.erase(std::unique(rounds_.begin(), rounds_.end()), rounds_.end());
    const auto count = static_cast<int64_t>(rounds_.size());
    const auto last_of_group = [&](int64_t i) {
      return rounds_[std::min((i / options_.shrink + 1) * options_.shrink, count) - 1];
    };
    merged_.clear();
    for (const Place& place : places_) {
      const int32_t own = step[place.token];
      const auto at = std::lower_bound(rounds_.begin(), rounds_.end(), own) - rounds_.begin();
      merged_.push_back(own > 0 ? last_of_group(at) : 0);
    }
    std::vector<int32_t> groups;
    for (int64_t i = 0; i < count; i += options_.shrink) groups.push_back(last_of_group(i));
    rounds_ = std::move(groups);
  }

  // A clean row is seen by the clean rows from its block on, by the chunks of later blocks, and by
  // every node below.
  void see(const NodeRows& rows, int32_t subtree_end) {
    const int64_t begin = block_begin(rows.first_block);
    for (int32_t row = rows.first; row < rows.noisy; ++row) {
      const int64_t block = block_of(pack_.position[row]);
      int32_t* interval = pack_.intervals.data() + 4 * static_cast<size_t>(row);
      interval[0] = rows.first + static_cast<int32_t>(block_begin(block) - begin);
      interval[1] = rows.noisy;
      const auto later = static_cast<size_t>(block + 1 - rows.first_block);
      interval[2] = later < rows.chunks_of_block.size() ? rows.chunks_of_block[later] : rows.end;
      interval[3] = subtree_end;
    }
  }

  const TraceTree& tree_;
  const TraceOptions& options_;
  std::vector<int64_t> end_;          // [nodes], position behind a node's last token
  std::vector<int64_t> subtree_;      // [nodes], nodes of its subtree
  std::vector<int64_t> first_child_;  // [nodes], -1: none
  std::vector<Place> places_;         // of the block at hand
  std::vector<int32_t> merged_;       // their steps after merging
  std::vector<int32_t> rounds_;       // the different ones
  TracePack pack_;
};

}  // namespace

TracePack trace_pack(const TraceTree& tree, const TraceOptions& options) {
  return Builder(tree, options).build();
}

}  // namespace dlm_fast::cpu
