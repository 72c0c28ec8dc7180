// Bookkeeping of a key-value cache for prefix trees: which page belongs to which node, who holds
// and who pins it. Numbers alone; keys and values lie with the caller.
#pragma once

#include <cstdint>
#include <vector>

namespace dlm_fast {

// Where the tokens of nodes have to be computed again, parents first.
struct TreeRefill {
  std::vector<int64_t> nodes;
  std::vector<int64_t> tokens, positions, slots;  // of all nodes, one after the other
};

struct TreeSplit {
  int64_t upper;           // the new node
  int64_t from_page = -1;  // tokens [begin, end) of this page go to the same places ...
  int64_t to_page = -1;    // ... of this one; -1: nothing is copied
  int64_t begin = 0, end = 0;
};

struct TreePoolStats {
  int64_t used_pages, made_pages, peak_pages;
  int64_t nodes, tokens;  // tokens that have a place
  int64_t evicted_nodes, evicted_tokens;
};

// A node is named by a handle that is never given out twice. Its tokens lie in its own pages, from
// `first` in the first page on; every page belongs to one node. A node lives as long as somebody
// holds it or a child lives. Its pages stay as long as somebody pins it or a child has pages.
// Throws std::runtime_error where pages run out and none can be taken from a node; such a call has
// done nothing but evict.
class TreePool {
 public:
  struct Node {
    int32_t parent = -1;  // place in nodes()
    int32_t generation = 0;
    int32_t children = 0, resident_children = 0, holds = 0, pins = 0;
    int32_t first = 0;  // tokens of the first page that belong to nobody any more
    bool alive = false, sealed = false, evicted = false;
    int64_t start = 0;  // tokens of the path before this node
    int64_t epoch = 0, last_use = 0;
    int64_t pending = 0;
    std::vector<int32_t> pages;
    std::vector<int64_t> tokens;

    int64_t length() const {
      return static_cast<int64_t>(tokens.size());
    }
    int64_t end() const {
      return start + length();
    }
  };

  // max_pages below 0: no limit.
  TreePool(int64_t page, int64_t max_pages);

  int64_t page() const {
    return page_;
  }
  int64_t epoch() const {
    return epoch_;
  }
  // Page numbers that were ever given out lie below this.
  int64_t made_pages() const {
    return static_cast<int64_t>(owner_.size());
  }

  // New nodes are empty, held once and pinned once.
  int64_t alloc();
  std::vector<int64_t> fork(int64_t handle, int64_t count);
  // A sealed root with exactly these tokens in this epoch, or -1. Not held.
  int64_t find_root(const std::vector<int64_t>& tokens) const;

  // counts[i] tokens for handles[i]; returns their slots, page * page_size + place.
  std::vector<int64_t> append(const std::vector<int64_t>& handles,
                              const std::vector<int64_t>& counts,
                              const std::vector<int64_t>& tokens);
  void hold(int64_t handle);
  void release(int64_t handle);
  TreeRefill pin(const std::vector<int64_t>& handles);
  void unpin(int64_t handle);
  // Cuts a node after `count` of its tokens. The handle goes on to name the end of the path; the
  // new node above it is held by its child alone.
  TreeSplit split(int64_t handle, int64_t count);
  // Takes pages from nodes that nobody needs now, those used longest ago first.
  int64_t evict(int64_t num_pages);
  void advance_epoch() {
    ++epoch_;
    ++version_;
  }
  // Goes up whenever a page changes hands: a plan of before may read what is not there any more.
  int64_t version() const {
    return version_;
  }

  TreePoolStats stats() const;
  // Throws std::logic_error unless every page has one owner and all counts are right.
  void check() const;

  // --- for readers
  const std::vector<Node>& nodes() const {
    return nodes_;
  }
  int64_t handle_of(int32_t place) const {
    return int64_t{nodes_[place].generation} << 32 | place;
  }
  // Place of a living node, whatever its epoch.
  int32_t place_of(int64_t handle) const;
  // Place of a node whose tokens may be read: of this epoch, with its pages.
  int32_t usable(int64_t handle) const;
  void touch(int32_t place) {
    nodes_[place].last_use = ++clock_;
  }
  std::vector<int64_t> path(int64_t handle) const;  // handles from the root on
  std::vector<int64_t> slots(int32_t place) const;

 private:
  int32_t new_node(int32_t parent);
  int64_t pages_for(int64_t first, int64_t tokens) const {
    return (first + tokens + page_ - 1) / page_;
  }
  bool evictable(const Node& node) const {
    return node.alive && !node.evicted && node.pins == 0 && node.resident_children == 0;
  }
  int64_t free_pages() const;
  void reserve(int64_t num_pages);
  void give_pages(int32_t place, int64_t count);
  void drop_pages(int32_t place);
  void evict_node(int32_t place);
  const Node& current(int64_t handle, int32_t place) const;
  std::vector<int32_t> protect_path(const std::vector<int64_t>& handles);
  void unprotect(const std::vector<int32_t>& places);

  int64_t page_, max_pages_;
  int64_t epoch_ = 0, clock_ = 0, peak_ = 0, version_ = 0;
  std::vector<Node> nodes_;
  std::vector<int32_t> free_nodes_;
  std::vector<int32_t> owner_;       // [made_pages] place of a page's node; -1: free
  std::vector<int32_t> free_pages_;  // pages given back
};

}  // namespace dlm_fast
