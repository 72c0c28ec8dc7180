"""Random calls on a pool of prefix trees, beside a dictionary of what must be in it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree_pools import check_path, fill, make_pool, pages_of, root_of

from dlm_fast.ops import TreePoolExhausted


class Model:
    """Runs random calls on a pool and on plain Python, and compares."""

    def __init__(self, data, limit=None, layout="token"):
        self.data = data
        self.pool = make_pool(max_pages=limit, layout=layout)
        self.tokens: dict[int, list[int]] = {}  # of the node alone, by handle that we hold
        self.paths: dict[int, list[int]] = {}
        self.holds: dict[int, int] = {}
        self.open: set[int] = set()
        self.unpinned: set[int] = set()
        self.next_token = 1

    def pick(self, nodes):
        return self.data.draw(st.sampled_from(sorted(nodes)))

    def take(self, count):
        self.next_token += count
        return list(range(self.next_token - count, self.next_token))

    def adopt(self, node, path):
        self.paths[node], self.holds[node] = path, 1
        self.open.add(node)

    def step(self):
        actions = ["alloc"]
        pinned = sorted(set(self.holds) - self.unpinned)
        if pinned:
            actions += ["fork", "fork", "append", "append", "split", "hold", "release", "unpin"]
        if self.unpinned:
            actions += ["pin"]
        getattr(self, self.data.draw(st.sampled_from(actions)))(pinned)

    def alloc(self, _pinned):
        tokens = self.take(self.data.draw(st.integers(0, 9)))
        self.adopt(root_of(self.pool, tokens), tokens)

    def fork(self, pinned):
        node = self.pick(pinned)
        before = self.pool.stats
        made = self.pool.fork(node, self.data.draw(st.integers(1, 3)))
        after = self.pool.stats
        assert (after.used_pages, after.tokens) == (before.used_pages, before.tokens)
        self.open.discard(node)
        for child in made:
            self.adopt(child, list(self.paths[node]))

    def append(self, pinned):
        ready = sorted(set(pinned) & self.open)
        if not ready:
            return
        nodes = self.data.draw(st.lists(st.sampled_from(ready), min_size=1, max_size=4))
        counts = [self.data.draw(st.integers(0, 6)) for _ in nodes]
        tokens = self.take(sum(counts))
        starts = []
        for node, count in zip(nodes, counts, strict=True):
            starts += range(len(self.paths[node]), len(self.paths[node]) + count)
            self.paths[node] = self.paths[node] + tokens[len(starts) - count : len(starts)]
        slots = self.pool.append(nodes, tokens, counts)
        fill(self.pool, slots, torch.tensor(tokens), torch.tensor(starts))

    def split(self, pinned):
        node = self.pick(pinned)
        facts = self.pool.node(node)
        if facts.length < 2:
            return
        cut = self.data.draw(st.integers(1, facts.length - 1))
        upper = self.pool.split(node, cut)
        assert self.pool.node(upper).length == cut and self.pool.node(upper).is_sealed
        assert self.pool.node(node).parent == upper
        if self.data.draw(st.booleans()):
            self.pool.hold(upper)
            self.pool.pin([upper])
            self.paths[upper] = self.paths[node][: facts.start + cut]
            self.holds[upper] = 1

    def hold(self, pinned):
        node = self.pick(pinned)
        self.pool.hold(node)
        self.holds[node] += 1

    def release(self, pinned):
        self.give_back(self.pick(pinned))

    def give_back(self, node):
        self.pool.release(node)
        self.holds[node] -= 1
        if not self.holds[node]:
            for table in (self.holds, self.paths):
                del table[node]
            self.open.discard(node)
            self.unpinned.discard(node)

    def unpin(self, pinned):
        node = self.pick(pinned)
        for _ in range(self.pool.node(node).pins):
            self.pool.unpin(node)
        self.unpinned.add(node)

    def pin(self, _pinned):
        node = self.pick(self.unpinned)
        refill = self.pool.pin([node])
        fill(self.pool, refill.slots, refill.token_ids, refill.position_ids)
        self.unpinned.discard(node)

    def check(self):
        self.pool.check()
        used = set()
        for node, path in self.paths.items():
            if node in self.unpinned and any(
                self.pool.node(one).is_evicted for one in self.pool.path(node)
            ):
                assert self.pool.path_tokens(node) == path
                continue
            check_path(self.pool, node, path)
            used |= set(self.pool.path(node))
        stats = self.pool.stats
        assert stats.used_pages >= sum(pages_of(self.pool, n) for n in used)
        if not self.unpinned:
            assert stats.used_pages == sum(pages_of(self.pool, n) for n in used)
            assert stats.tokens == sum(self.pool.node(n).length for n in used)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(["token", "head"]))
def test_random_calls_equal_a_dictionary(data, layout):
    model = Model(data, layout=layout)
    for _ in range(data.draw(st.integers(1, 25))):
        model.step()
        model.check()
    for node, count in list(model.holds.items()):
        for _ in range(count):
            model.give_back(node)
    model.pool.check()
    assert model.pool.stats.used_pages == model.pool.stats.nodes == model.pool.stats.tokens == 0


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_calls_on_a_pool_that_is_too_small(data):
    model = Model(data, limit=6)
    for _ in range(data.draw(st.integers(5, 25))):
        try:
            model.step()
        except TreePoolExhausted:
            # the model is ahead of the pool; what the pool still has must be in order
            model.pool.check()
            return
        model.check()
        assert model.pool.stats.used_pages <= 6
