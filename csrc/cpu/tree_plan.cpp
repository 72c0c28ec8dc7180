// Plans attention over a prefix tree: rows by depth first, runs of nodes, chunks, slots.
#include "dlm_fast/tree_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <string>

#include "dlm_fast/check.h"

namespace dlm_fast {

namespace {

int64_t ceil_of(int64_t number, int64_t divisor) {
  return (number + divisor - 1) / divisor;
}

int32_t narrow(int64_t number) {
  DLM_CHECK(number <= std::numeric_limits<int32_t>::max(),
            "tree_attention: the plan has more than 2^31 keys or states; plan fewer rows at once");
  return static_cast<int32_t>(number);
}

class Planner {
 public:
  Planner(TreePool& pool, const std::vector<int64_t>& handles,
          const std::vector<int64_t>& row_counts, const TreePlanOptions& options)
      : pool_(pool), counts_(row_counts), options_(options) {
    DLM_CHECK(handles.size() == row_counts.size(), "tree_attention: one row count for each node");
    DLM_CHECK(
        options.row_tile > 0 && options.chunk >= 0 && options.key_heads > 0 && options.workers > 0,
        "tree_attention: tiles, heads and workers must be above 0, chunk not below");
    collect(handles);
    order_rows();
    find_runs();
    cut_items();
  }

  TreePlan build() {
    assign_slots();
    TreePlan plan;
    plan.sizes = {
        static_cast<int64_t>(items_.size()),        static_cast<int64_t>(slots_.size()),
        static_cast<int64_t>(rows_.size()),         static_cast<int64_t>(destinations_.size()),
        static_cast<int64_t>(merge_places_.size()), merge_indptr_.back()};
    plan.unique_tokens = 0;
    for (const Active& active : nodes_) plan.unique_tokens += pool_.nodes()[active.place].length();
    plan.read_tokens = starts_.back();
    // Long items first, so that short ones fill the gaps at the end.
    std::stable_sort(items_.begin(), items_.end(), [](const TreeItem& a, const TreeItem& b) {
      return int64_t{a.num_keys} * a.num_rows > int64_t{b.num_keys} * b.num_rows;
    });
    plan.packed.reserve(tree_plan_numbers(plan.sizes));
    const auto* items = reinterpret_cast<const int32_t*>(items_.data());
    plan.packed.insert(plan.packed.end(), items, items + kTreeItemNumbers * items_.size());
    for (const std::vector<int32_t>* part :
         {&slots_, &starts_, &rows_, &limits_, &destinations_, &merge_places_, &merge_indptr_})
      plan.packed.insert(plan.packed.end(), part->begin(), part->end());
    return plan;
  }

 private:
  // A node with rows at or below it.
  struct Active {
    int32_t place;
    int32_t first_child = -1, last_child = -1, sibling = -1, num_children = 0;
    int32_t first_group = -1, last_group = -1;  // of its own rows
    int32_t first_row = 0, own_rows = 0, num_rows = 0;
  };
  struct Run {
    int32_t first_piece, num_pieces;
    int32_t first_row, num_rows;
    int64_t position, tokens;
  };

  void collect(const std::vector<int64_t>& handles) {
    std::vector<int32_t> active_of(pool_.nodes().size(), -1);
    next_group_.assign(handles.size(), -1);
    first_row_of_group_.assign(handles.size(), 0);
    int64_t total = 0;
    for (size_t group = 0; group < handles.size(); ++group) {
      const int32_t leaf = pool_.usable(handles[group]);
      const int64_t length = pool_.nodes()[leaf].end();
      DLM_CHECK(counts_[group] >= 0 && (!options_.causal || counts_[group] <= length),
                "tree_attention: node " + std::to_string(handles[group]) + " has " +
                    std::to_string(length) + " tokens on its path, so it cannot have " +
                    std::to_string(counts_[group]) + " rows");
      first_row_of_group_[group] = narrow(total);
      total += counts_[group];
      int32_t below = -1;
      for (int32_t place = leaf; place >= 0; place = pool_.nodes()[place].parent) {
        const bool known = active_of[place] >= 0;
        if (!known) {
          active_of[place] = static_cast<int32_t>(nodes_.size());
          nodes_.push_back({place});
          pool_.touch(place);
        }
        if (below >= 0) add_child(active_of[place], below);
        below = active_of[place];
        if (known) break;
        if (pool_.nodes()[place].parent < 0) roots_.push_back(below);
      }
      Active& own = nodes_[active_of[leaf]];
      (own.last_group < 0 ? own.first_group : next_group_[own.last_group]) =
          static_cast<int32_t>(group);
      own.last_group = static_cast<int32_t>(group);
    }
    narrow(total);
  }

  void add_child(int32_t parent, int32_t child) {
    Active& node = nodes_[parent];
    (node.last_child < 0 ? node.first_child : nodes_[node.last_child].sibling) = child;
    node.last_child = child;
    ++node.num_children;
  }

  // A node's own rows come before those of its children.
  void order_rows() {
    std::vector<int32_t> waiting(roots_.rbegin(), roots_.rend());
    while (!waiting.empty()) {
      const int32_t index = waiting.back();
      waiting.pop_back();
      order_.push_back(index);
      Active& node = nodes_[index];
      node.first_row = static_cast<int32_t>(rows_.size());
      const int64_t end = pool_.nodes()[node.place].end();
      for (int32_t g = node.first_group; g >= 0; g = next_group_[g])
        for (int64_t i = 0; i < counts_[g]; ++i) {
          rows_.push_back(first_row_of_group_[g] + static_cast<int32_t>(i));
          limits_.push_back(narrow(options_.causal ? end - counts_[g] + i + 1 : end));
        }
      node.own_rows = static_cast<int32_t>(rows_.size()) - node.first_row;
      const auto first = waiting.size();
      for (int32_t c = node.first_child; c >= 0; c = nodes_[c].sibling) waiting.push_back(c);
      std::reverse(waiting.begin() + static_cast<int64_t>(first), waiting.end());
    }
    for (auto index = order_.rbegin(); index != order_.rend(); ++index) {
      Active& node = nodes_[*index];
      node.num_rows = node.own_rows;
      for (int32_t c = node.first_child; c >= 0; c = nodes_[c].sibling)
        node.num_rows += nodes_[c].num_rows;
    }
  }

  bool keeps_apart(int64_t tokens, int64_t rows, int64_t readers) const {
    if (options_.absorb != TreeAbsorb::kByCost) return options_.absorb == TreeAbsorb::kNever;
    return static_cast<double>(tokens * (readers - 1)) >
           options_.state_tokens * static_cast<double>(rows);
  }

  // Down from the roots, each node with the nodes above it whose keys nobody has read yet.
  void find_runs() {
    starts_.push_back(0);
    std::vector<std::vector<int32_t>> carried(nodes_.size());
    for (const int32_t index : order_) {
      const Active& node = nodes_[index];
      if (node.num_rows == 0) continue;
      std::vector<int32_t> run = std::move(carried[index]);
      if (pool_.nodes()[node.place].length() > 0) run.push_back(node.place);
      int64_t tokens = 0, readers = node.own_rows > 0;
      for (const int32_t place : run) tokens += pool_.nodes()[place].length();
      for (int32_t c = node.first_child; c >= 0; c = nodes_[c].sibling)
        readers += nodes_[c].num_rows > 0;
      if (readers > 1 && keeps_apart(tokens, node.num_rows, readers)) {
        add_run(run, node.first_row, node.num_rows);
        run.clear();
      } else if (node.own_rows > 0) {
        add_run(run, node.first_row, node.own_rows);
      }
      for (int32_t c = node.first_child; c >= 0; c = nodes_[c].sibling)
        if (nodes_[c].num_rows > 0) carried[c] = nodes_[c].sibling < 0 ? std::move(run) : run;
    }
  }

  void add_run(const std::vector<int32_t>& places, int32_t first_row, int32_t num_rows) {
    if (places.empty()) return;
    Run run{static_cast<int32_t>(slots_.size()), 0, first_row, num_rows,
            pool_.nodes()[places.front()].start, 0};
    for (const int32_t place : places) {
      const TreePool::Node& node = pool_.nodes()[place];
      int64_t left = node.length(), at = node.first;
      for (const int32_t page : node.pages) {
        const int64_t count = std::min(left, pool_.page() - at);
        slots_.push_back(narrow(page * pool_.page() + at));
        starts_.push_back(narrow(starts_.back() + count));
        left -= count;
        at = 0;
      }
      run.tokens += node.length();
    }
    run.num_pieces = static_cast<int32_t>(slots_.size()) - run.first_piece;
    runs_.push_back(run);
  }

  int64_t chosen_chunk() const {
    if (options_.chunk > 0) return options_.chunk;
    for (int64_t chunk = 128; chunk < 8192; chunk *= 2) {
      int64_t items = 0;
      for (const Run& run : runs_)
        items += ceil_of(run.tokens, chunk) * ceil_of(run.num_rows, options_.row_tile);
      if (items * options_.key_heads <= 4 * options_.workers) return chunk;
    }
    return 8192;
  }

  // Chunks of a run are about equally long and end where a page does.
  void cut_items() {
    const int64_t chunk = chosen_chunk();
    for (const Run& run : runs_) {
      const int64_t chunks = ceil_of(run.tokens, chunk), origin = starts_[run.first_piece];
      int32_t piece = run.first_piece;
      const int32_t end = run.first_piece + run.num_pieces;
      for (int64_t c = 1; c <= chunks && piece < end; ++c) {
        const int32_t first = piece;
        const int64_t target = ceil_of(run.tokens * c, chunks);
        while (piece < end && starts_[piece] - origin < target) ++piece;
        if (piece > first) add_items(run, first, piece);
      }
    }
  }

  void add_items(const Run& run, int32_t first_piece, int32_t end_piece) {
    const int64_t position = run.position + starts_[first_piece] - starts_[run.first_piece];
    const int32_t keys = starts_[end_piece] - starts_[first_piece];
    const int64_t tiles = ceil_of(run.num_rows, options_.row_tile);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t begin = run.num_rows * t / tiles, end = run.num_rows * (t + 1) / tiles;
      const auto first = limits_.begin() + run.first_row + begin;
      const auto bounds = std::minmax_element(first, first + (end - begin));
      if (*bounds.second <= position) continue;
      items_.push_back({first_piece, end_piece - first_piece,
                        static_cast<int32_t>(run.first_row + begin),
                        static_cast<int32_t>(end - begin), narrow(position), keys,
                        narrow(num_destinations_), *bounds.first < position + keys});
      num_destinations_ += end - begin;
    }
  }

  // The items are still in the order from the roots down, and so are the slots of a row.
  void assign_slots() {
    std::vector<int32_t> parts(rows_.size(), 0);
    for (const TreeItem& item : items_)
      for (int32_t i = 0; i < item.num_rows; ++i) ++parts[item.first_row + i];
    std::vector<int32_t> next(rows_.size(), 0);
    merge_indptr_.push_back(0);
    for (size_t row = 0; row < rows_.size(); ++row) {
      if (parts[row] == 1) continue;
      next[row] = merge_indptr_.back();
      merge_places_.push_back(rows_[row]);
      merge_indptr_.push_back(narrow(int64_t{next[row]} + parts[row]));
    }
    destinations_.resize(static_cast<size_t>(num_destinations_));
    for (const TreeItem& item : items_)
      for (int32_t i = 0; i < item.num_rows; ++i) {
        const int32_t row = item.first_row + i;
        destinations_[item.destination + i] = parts[row] == 1 ? ~rows_[row] : next[row]++;
      }
  }

  TreePool& pool_;
  const std::vector<int64_t>& counts_;
  const TreePlanOptions& options_;
  std::vector<Active> nodes_;
  std::vector<int32_t> roots_, order_, next_group_, first_row_of_group_;
  std::vector<Run> runs_;
  std::vector<TreeItem> items_;
  std::vector<int32_t> slots_, starts_, rows_, limits_, destinations_, merge_places_, merge_indptr_;
  int64_t num_destinations_ = 0;
};

}  // namespace

TreePlan plan_tree(TreePool& pool, const std::vector<int64_t>& handles,
                   const std::vector<int64_t>& row_counts, const TreePlanOptions& options) {
  return Planner(pool, handles, row_counts, options).build();
}

}  // namespace dlm_fast
