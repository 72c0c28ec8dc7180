// Bookkeeping of a key-value cache for prefix trees.
#include "dlm_fast/tree_pool.h"

#include <algorithm>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>
#include <unordered_set>

#include "dlm_fast/check.h"

namespace dlm_fast {

namespace {

std::string named(int64_t handle) {
  return "tree pool: node " + std::to_string(handle);
}

void require(bool right, const std::string& what) {
  if (!right) throw std::logic_error("tree pool: " + what);
}

}  // namespace

TreePool::TreePool(int64_t page, int64_t max_pages) : page_(page), max_pages_(max_pages) {
  DLM_CHECK(page >= 1 && (page & (page - 1)) == 0 && page <= 4096,
            "tree pool: page must be a power of two up to 4096, got " + std::to_string(page));
}

// --- names

int32_t TreePool::place_of(int64_t handle) const {
  const int64_t place = handle & 0xFFFFFFFF;
  const bool known = handle >= 0 && place < static_cast<int64_t>(nodes_.size()) &&
                     nodes_[place].generation == handle >> 32;
  DLM_CHECK(known && nodes_[place].alive,
            named(handle) + (known || handle >= 0 ? " was released" : " does not exist") +
                "; hold a node for as long as you use it");
  return static_cast<int32_t>(place);
}

const TreePool::Node& TreePool::current(int64_t handle, int32_t place) const {
  const Node& node = nodes_[place];
  DLM_CHECK(node.epoch == epoch_,
            named(handle) + " belongs to epoch " + std::to_string(node.epoch) +
                ", but the pool is at " + std::to_string(epoch_) +
                ": its keys come from older weights; release it and compute it again");
  return node;
}

int32_t TreePool::usable(int64_t handle) const {
  const int32_t place = place_of(handle);
  DLM_CHECK(!current(handle, place).evicted,
            named(handle) + " was evicted; pin it and compute what pin gives back");
  return place;
}

// --- nodes

int32_t TreePool::new_node(int32_t parent) {
  if (free_nodes_.empty()) {
    DLM_CHECK(nodes_.size() < static_cast<size_t>(std::numeric_limits<int32_t>::max()),
              "tree pool: too many nodes");
    free_nodes_.push_back(static_cast<int32_t>(nodes_.size()));
    nodes_.emplace_back();
  }
  const int32_t place = free_nodes_.back();
  free_nodes_.pop_back();
  const int32_t generation = nodes_[place].generation;
  Node& node = nodes_[place] = Node{};
  node.generation = generation;
  node.alive = true;
  node.holds = node.pins = 1;
  node.epoch = epoch_;
  node.last_use = ++clock_;
  node.parent = parent;
  if (parent >= 0) {
    node.start = nodes_[parent].end();
    ++nodes_[parent].children;
    ++nodes_[parent].resident_children;
    nodes_[parent].sealed = true;
  }
  return place;
}

int64_t TreePool::alloc() {
  return handle_of(new_node(-1));
}

std::vector<int64_t> TreePool::fork(int64_t handle, int64_t count) {
  DLM_CHECK(count >= 1,
            named(handle) + " must be forked at least once, got " + std::to_string(count));
  const int32_t parent = usable(handle);
  std::vector<int64_t> made;
  for (int64_t i = 0; i < count; ++i) made.push_back(handle_of(new_node(parent)));
  touch(parent);
  return made;
}

int64_t TreePool::find_root(const std::vector<int64_t>& tokens) const {
  for (size_t place = 0; place < nodes_.size(); ++place) {
    const Node& node = nodes_[place];
    if (node.alive && node.parent < 0 && node.sealed && node.epoch == epoch_ &&
        node.tokens == tokens)
      return handle_of(static_cast<int32_t>(place));
  }
  return -1;
}

std::vector<int64_t> TreePool::append(const std::vector<int64_t>& handles,
                                      const std::vector<int64_t>& counts,
                                      const std::vector<int64_t>& tokens) {
  DLM_CHECK(handles.size() == counts.size(), "tree pool: one count for each node");
  std::vector<int32_t> places;
  int64_t total = 0;
  for (size_t i = 0; i < handles.size(); ++i) {
    const int32_t place = usable(handles[i]);
    const Node& node = nodes_[place];
    DLM_CHECK(!node.sealed,
              named(handles[i]) + " is sealed: it has been forked; append to one of its children");
    DLM_CHECK(node.pins > 0, named(handles[i]) + " is not pinned; pin it before appending");
    DLM_CHECK(counts[i] >= 0, "tree pool: counts must not be negative");
    places.push_back(place);
    total += counts[i];
  }
  DLM_CHECK(total == static_cast<int64_t>(tokens.size()),
            "tree pool: counts add up to " + std::to_string(total) + ", but there are " +
                std::to_string(tokens.size()) + " tokens");
  for (size_t i = 0; i < places.size(); ++i) nodes_[places[i]].pending += counts[i];
  int64_t need = 0;
  for (const int32_t place : places) {
    Node& node = nodes_[place];
    if (node.pending)
      need += pages_for(node.first, node.length() + node.pending) -
              static_cast<int64_t>(node.pages.size());
    node.pending = 0;
  }
  reserve(need);
  std::vector<int64_t> slots;
  slots.reserve(tokens.size());
  auto token = tokens.begin();
  for (size_t i = 0; i < places.size(); ++i) {
    Node& node = nodes_[places[i]];
    int64_t at = node.first + node.length();
    node.tokens.insert(node.tokens.end(), token, token + counts[i]);
    token += counts[i];
    give_pages(places[i], pages_for(node.first, node.length()));
    for (const int64_t end = at + counts[i]; at < end; ++at)
      slots.push_back(int64_t{node.pages[at / page_]} * page_ + at % page_);
    touch(places[i]);
  }
  return slots;
}

void TreePool::hold(int64_t handle) {
  ++nodes_[place_of(handle)].holds;
}

void TreePool::release(int64_t handle) {
  int32_t place = place_of(handle);
  DLM_CHECK(nodes_[place].holds > 0, named(handle) + " is released more often than it was held");
  --nodes_[place].holds;
  nodes_[place].pins = std::min(nodes_[place].pins, nodes_[place].holds);
  while (place >= 0 && nodes_[place].holds == 0 && nodes_[place].children == 0) {
    Node& node = nodes_[place];
    const int32_t parent = node.parent;
    if (parent >= 0) {
      --nodes_[parent].children;
      if (!node.evicted) --nodes_[parent].resident_children;
    }
    drop_pages(place);
    node.alive = false;
    ++node.generation;
    node.tokens = {};
    free_nodes_.push_back(place);
    place = parent;
  }
}

// --- pages

int64_t TreePool::free_pages() const {
  const int64_t limit = max_pages_ < 0 ? std::numeric_limits<int32_t>::max() / page_ : max_pages_;
  return limit - made_pages() + static_cast<int64_t>(free_pages_.size());
}

void TreePool::reserve(int64_t num_pages) {
  if (num_pages > free_pages()) evict(num_pages - free_pages());
  if (num_pages <= free_pages()) return;
  throw std::runtime_error("tree pool: " + std::to_string(num_pages) + " pages of " +
                           std::to_string(page_) + " tokens are needed, " +
                           std::to_string(free_pages()) + " of " +
                           std::to_string(free_pages() + stats().used_pages) +
                           " are free and all others are pinned; release or unpin nodes, wait for "
                           "other trees to end, or raise max_pages");
}

// Up to `count` pages; they were reserved before.
void TreePool::give_pages(int32_t place, int64_t count) {
  Node& node = nodes_[place];
  while (static_cast<int64_t>(node.pages.size()) < count) {
    if (free_pages_.empty()) {
      free_pages_.push_back(static_cast<int32_t>(owner_.size()));
      owner_.push_back(-1);
    }
    owner_[free_pages_.back()] = place;
    node.pages.push_back(free_pages_.back());
    free_pages_.pop_back();
  }
  peak_ = std::max(peak_, made_pages() - static_cast<int64_t>(free_pages_.size()));
}

void TreePool::drop_pages(int32_t place) {
  std::vector<int32_t>& pages = nodes_[place].pages;
  ++version_;
  // Backwards, so that the next node gets them in order.
  for (auto page = pages.rbegin(); page != pages.rend(); ++page) {
    owner_[*page] = -1;
    free_pages_.push_back(*page);
  }
  pages.clear();
}

void TreePool::evict_node(int32_t place) {
  drop_pages(place);
  nodes_[place].evicted = true;
  nodes_[place].first = 0;
  if (nodes_[place].parent >= 0) --nodes_[nodes_[place].parent].resident_children;
}

int64_t TreePool::evict(int64_t num_pages) {
  using Candidate = std::pair<int64_t, int32_t>;  // last use, place
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<Candidate>> oldest;
  for (size_t place = 0; place < nodes_.size(); ++place)
    if (evictable(nodes_[place]))
      oldest.push({nodes_[place].last_use, static_cast<int32_t>(place)});
  int64_t freed = 0;
  while (freed < num_pages && !oldest.empty()) {
    const int32_t place = oldest.top().second, parent = nodes_[place].parent;
    oldest.pop();
    freed += static_cast<int64_t>(nodes_[place].pages.size());
    evict_node(place);
    if (parent >= 0 && evictable(nodes_[parent])) oldest.push({nodes_[parent].last_use, parent});
  }
  return freed;
}

// Pins everything from the given nodes up to the root while pages are being looked for.
std::vector<int32_t> TreePool::protect_path(const std::vector<int64_t>& handles) {
  std::vector<int32_t> places;
  std::unordered_set<int32_t> seen;
  for (const int64_t handle : handles)
    for (int32_t place = place_of(handle); place >= 0 && seen.insert(place).second;
         place = nodes_[place].parent)
      places.push_back(place);
  for (const int32_t place : places) ++nodes_[place].pins;
  return places;
}

void TreePool::unprotect(const std::vector<int32_t>& places) {
  for (const int32_t place : places) --nodes_[place].pins;
}

TreeRefill TreePool::pin(const std::vector<int64_t>& handles) {
  for (const int64_t handle : handles) {
    const Node& node = current(handle, place_of(handle));
    DLM_CHECK(node.holds > 0, named(handle) + " is held by its children alone; hold it to pin it");
  }
  std::vector<int32_t> path = protect_path(handles);
  // Parents first; only nodes without tokens, which have nothing to compute, start where others do.
  std::stable_sort(path.begin(), path.end(),
                   [this](int32_t a, int32_t b) { return nodes_[a].start < nodes_[b].start; });
  int64_t need = 0;
  for (const int32_t place : path)
    if (nodes_[place].evicted) need += pages_for(0, nodes_[place].length());
  try {
    reserve(need);
  } catch (const std::runtime_error&) {
    unprotect(path);
    throw;
  }
  TreeRefill refill;
  for (const int32_t place : path) {
    Node& node = nodes_[place];
    if (!node.evicted) continue;
    node.evicted = false;
    if (node.parent >= 0) ++nodes_[node.parent].resident_children;
    give_pages(place, pages_for(0, node.length()));
    if (node.tokens.empty()) continue;
    refill.nodes.push_back(handle_of(place));
    const std::vector<int64_t> places = slots(place);
    refill.slots.insert(refill.slots.end(), places.begin(), places.end());
    refill.tokens.insert(refill.tokens.end(), node.tokens.begin(), node.tokens.end());
    for (int64_t i = 0; i < node.length(); ++i) refill.positions.push_back(node.start + i);
  }
  unprotect(path);
  for (const int64_t handle : handles) {
    ++nodes_[place_of(handle)].pins;
    touch(place_of(handle));
  }
  return refill;
}

void TreePool::unpin(int64_t handle) {
  const int32_t place = place_of(handle);
  DLM_CHECK(nodes_[place].pins > 0, named(handle) + " is unpinned more often than it was pinned");
  --nodes_[place].pins;
}

TreeSplit TreePool::split(int64_t handle, int64_t count) {
  const int32_t lower = place_of(handle);
  const int64_t length = current(handle, lower).length();
  DLM_CHECK(count > 0 && count < length, named(handle) + " of " + std::to_string(length) +
                                             " tokens cannot be cut after " +
                                             std::to_string(count));
  const bool copies = !nodes_[lower].evicted && (nodes_[lower].first + count) % page_ != 0;
  if (copies) {
    const std::vector<int32_t> path = protect_path({handle});
    try {
      reserve(1);
    } catch (const std::runtime_error&) {
      unprotect(path);
      throw;
    }
    unprotect(path);
  }
  const int32_t upper = new_node(-1);
  Node &above = nodes_[upper], &below = nodes_[lower];
  above.holds = above.pins = 0;
  above.parent = below.parent;
  above.start = below.start;
  above.sealed = true;
  above.evicted = below.evicted;
  above.first = below.first;
  above.children = 1;
  above.resident_children = below.evicted ? 0 : 1;
  above.last_use = below.last_use;
  above.tokens.assign(below.tokens.begin(), below.tokens.begin() + count);
  below.tokens.erase(below.tokens.begin(), below.tokens.begin() + count);
  below.parent = upper;
  below.start += count;
  TreeSplit made{handle_of(upper)};
  if (below.evicted) return made;
  const int64_t cut = above.first + count, whole = cut / page_;
  above.pages.assign(below.pages.begin(), below.pages.begin() + whole);
  below.pages.erase(below.pages.begin(), below.pages.begin() + whole);
  for (const int32_t page : above.pages) owner_[page] = upper;
  below.first = static_cast<int32_t>(cut % page_);
  if (!copies) return made;
  made.from_page = below.pages.front();
  made.begin = whole == 0 ? above.first : 0;
  made.end = cut % page_;
  give_pages(upper, whole + 1);
  made.to_page = above.pages.back();
  return made;
}

// --- for readers

std::vector<int64_t> TreePool::path(int64_t handle) const {
  std::vector<int64_t> handles;
  for (int32_t place = place_of(handle); place >= 0; place = nodes_[place].parent)
    handles.push_back(handle_of(place));
  std::reverse(handles.begin(), handles.end());
  return handles;
}

std::vector<int64_t> TreePool::slots(int32_t place) const {
  const Node& node = nodes_[place];
  std::vector<int64_t> slots;
  for (int64_t at = node.first; at < node.first + node.length(); ++at)
    slots.push_back(int64_t{node.pages[at / page_]} * page_ + at % page_);
  return slots;
}

TreePoolStats TreePool::stats() const {
  TreePoolStats stats{};
  stats.made_pages = made_pages();
  stats.used_pages = made_pages() - static_cast<int64_t>(free_pages_.size());
  stats.peak_pages = peak_;
  for (const Node& node : nodes_) {
    if (!node.alive) continue;
    ++stats.nodes;
    stats.evicted_nodes += node.evicted;
    (node.evicted ? stats.evicted_tokens : stats.tokens) += node.length();
  }
  return stats;
}

void TreePool::check() const {
  std::vector<int32_t> owner(owner_.size(), -1);
  std::vector<int32_t> children(nodes_.size(), 0), resident(nodes_.size(), 0);
  for (size_t place = 0; place < nodes_.size(); ++place) {
    const Node& node = nodes_[place];
    const std::string name = "node " + std::to_string(handle_of(static_cast<int32_t>(place)));
    if (!node.alive) {
      require(node.pages.empty() && node.tokens.empty(), name + " is dead and has pages");
      continue;
    }
    require(node.holds > 0 || node.children > 0, name + " lives and nobody holds it");
    require(node.pins == 0 || node.holds > 0, name + " is pinned, but nobody holds it");
    const int64_t pages = node.evicted ? 0 : pages_for(node.first, node.length());
    require(static_cast<int64_t>(node.pages.size()) == pages,
            name + " has " + std::to_string(node.pages.size()) + " pages instead of " +
                std::to_string(pages));
    for (const int32_t page : node.pages) {
      require(owner[page] < 0, "page " + std::to_string(page) + " belongs to two nodes");
      owner[page] = static_cast<int32_t>(place);
    }
    if (node.parent < 0) {
      require(node.start == 0, name + " is a root that does not start at 0");
      continue;
    }
    const Node& parent = nodes_[node.parent];
    require(parent.alive && parent.sealed, name + " has a parent that is dead or open");
    require(node.start == parent.end(), name + " does not start where its parent ends");
    require(node.evicted || !parent.evicted, name + " has pages, but its parent was evicted");
    ++children[node.parent];
    resident[node.parent] += !node.evicted;
  }
  for (size_t place = 0; place < nodes_.size(); ++place)
    require(!nodes_[place].alive || (children[place] == nodes_[place].children &&
                                     resident[place] == nodes_[place].resident_children),
            "a count of children is wrong");
  require(owner == owner_, "an owner of a page is wrong");
  std::vector<bool> is_free(owner_.size(), false);
  for (const int32_t page : free_pages_) {
    require(owner_[page] < 0 && !is_free[page], "a page is free twice or has an owner");
    is_free[page] = true;
  }
  require(static_cast<int64_t>(free_pages_.size()) == std::count(owner_.begin(), owner_.end(), -1),
          "a page is lost");
}

}  // namespace dlm_fast
