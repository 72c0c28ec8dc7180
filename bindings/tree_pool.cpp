// Binding of the bookkeeping of prefix trees in a key-value cache.
#include "dlm_fast/tree_pool.h"

#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;

namespace dlm_fast {

void bind_tree_pool(py::module_& m) {
  py::class_<TreePool>(m, "TreePool")
      .def(py::init<int64_t, int64_t>())
      .def_property_readonly("epoch", &TreePool::epoch)
      .def_property_readonly("made_pages", &TreePool::made_pages)
      .def_property_readonly("version", &TreePool::version)
      // raises unless the tokens of all these nodes may be read
      .def("check_usable",
           [](const TreePool& pool, const std::vector<int64_t>& handles) {
             for (const int64_t handle : handles) pool.usable(handle);
           })
      .def("alloc", &TreePool::alloc)
      .def("fork", &TreePool::fork)
      .def("find_root", &TreePool::find_root)
      .def("append", &TreePool::append)
      .def("hold", &TreePool::hold)
      .def("release", &TreePool::release)
      .def("unpin", &TreePool::unpin)
      .def("evict", &TreePool::evict)
      .def("advance_epoch", &TreePool::advance_epoch)
      .def("path", &TreePool::path)
      .def("check", &TreePool::check)
      // (nodes, tokens, positions, slots)
      .def("pin",
           [](TreePool& pool, const std::vector<int64_t>& handles) {
             TreeRefill refill = pool.pin(handles);
             return py::make_tuple(refill.nodes, refill.tokens, refill.positions, refill.slots);
           })
      // (upper, from_page, to_page, begin, end)
      .def("split",
           [](TreePool& pool, int64_t handle, int64_t count) {
             const TreeSplit made = pool.split(handle, count);
             return py::make_tuple(made.upper, made.from_page, made.to_page, made.begin, made.end);
           })
      .def("tokens", [](const TreePool& pool,
                        int64_t handle) { return pool.nodes()[pool.place_of(handle)].tokens; })
      .def("slots",
           [](const TreePool& pool, int64_t handle) { return pool.slots(pool.usable(handle)); })
      // (parent handle or -1, start, length, children, holds, pins, sealed, evicted, epoch)
      .def("node",
           [](const TreePool& pool, int64_t handle) {
             const TreePool::Node& node = pool.nodes()[pool.place_of(handle)];
             return py::make_tuple(node.parent < 0 ? -1 : pool.handle_of(node.parent), node.start,
                                   node.length(), node.children, node.holds, node.pins, node.sealed,
                                   node.evicted, node.epoch);
           })
      // (used, made, peak pages, nodes, tokens, evicted nodes, evicted tokens)
      .def("stats", [](const TreePool& pool) {
        const TreePoolStats s = pool.stats();
        return py::make_tuple(s.used_pages, s.made_pages, s.peak_pages, s.nodes, s.tokens,
                              s.evicted_nodes, s.evicted_tokens);
      });
}

}  // namespace dlm_fast
