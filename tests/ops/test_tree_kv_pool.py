"""The pool keeps each token once, frees what nobody holds, and says what is wrong."""

from __future__ import annotations

import pytest
import torch
from tree_pools import check_path, fill, make_pool, put, root_of

from dlm_fast.ops import TreePoolExhausted


def test_a_fork_copies_nothing_and_children_see_the_parent():
    pool = make_pool()
    root = root_of(pool, [1, 2, 3, 4, 5, 6])
    used = pool.stats.used_pages
    a, b = pool.fork(root, 2)
    assert pool.stats.used_pages == used == 2
    put(pool, a, [7])
    put(pool, b, [8, 9])
    check_path(pool, a, [1, 2, 3, 4, 5, 6, 7])
    check_path(pool, b, [1, 2, 3, 4, 5, 6, 8, 9])
    assert pool.stats.tokens == 9 and pool.stats.used_pages == 4
    assert pool.stats.used_bytes == 4 * 2 * (2 * 4 * 2 * 3 * 4)


@pytest.mark.parametrize("length", range(2, 14))
def test_split_at_every_place(length):
    tokens = list(range(100, 100 + length))
    for cut in range(1, length):
        pool = make_pool()
        node = root_of(pool, tokens)
        children = pool.fork(node, 2)
        put(pool, children[0], [1, 2])
        before = pool.stats.used_pages
        upper = pool.split(node, cut)
        pool.check()
        assert pool.stats.used_pages == before + (cut % pool.page > 0)
        check_path(pool, upper, tokens[:cut])
        check_path(pool, node, tokens)
        check_path(pool, children[0], [*tokens, 1, 2])
        (branch,) = pool.fork(upper)
        put(pool, branch, [5, 6, 7])
        check_path(pool, branch, [*tokens[:cut], 5, 6, 7])
        for again in range(1, length - cut):
            top = pool.split(node, 1)
            pool.check()
            check_path(pool, top, tokens[: cut + again])
            check_path(pool, children[0], [*tokens, 1, 2])
        for handle in (node, *children, branch):
            pool.release(handle)
        pool.check()
        assert pool.stats.nodes == pool.stats.used_pages == 0


def test_an_open_tail_may_be_split_and_grows_on():
    pool = make_pool()
    node = root_of(pool, [1, 2, 3, 4, 5])
    pool.split(node, 3)
    put(pool, node, [6, 7, 8, 9])
    check_path(pool, node, list(range(1, 10)))
    pool.check()


def test_release_is_deep_and_never_recursive():
    pool = make_pool()
    chain = [root_of(pool, [0])]
    for depth in range(1, 5000):
        chain += pool.fork(chain[-1])
        pool.append([chain[-1]], [depth])
        pool.release(chain[-2])
    assert pool.stats.nodes == 5000
    pool.release(chain[-1])
    pool.check()
    assert pool.stats.nodes == pool.stats.used_pages == 0


def test_pages_are_used_again():
    pool = make_pool()
    for _ in range(50):
        root = root_of(pool, list(range(20)))
        for child in pool.fork(root, 3):
            put(pool, child, [1] * 5)
            pool.release(child)
        pool.release(root)
    assert pool.layer(0).shape[0] <= pool.stats.peak_pages * 3 // 2 + 1
    assert pool.stats.peak_pages == 5 + 2  # a child is released before the next one is written


def test_eviction_takes_the_longest_unused_and_refill_brings_them_back():
    pool = make_pool(max_pages=6)
    root = root_of(pool, [1, 2, 3, 4])
    a, b, c = pool.fork(root, 3)
    paths = {}
    for node, first in ((a, 10), (b, 20), (c, 30)):
        tail = [first + i for i in range(4)]
        put(pool, node, tail)
        paths[node] = [1, 2, 3, 4, *tail]
    pool.append([a], [])  # a was used after b
    for node in (a, b):
        pool.unpin(node)
    put(pool, c, [34] * 9)  # three more pages: two are free, one must be taken
    assert pool.node(b).is_evicted and not pool.node(a).is_evicted
    assert (pool.stats.evicted_nodes, pool.stats.evicted_tokens) == (1, 4)
    pool.check()
    for call in (
        lambda: pool.fork(b),
        lambda: pool.slots(b),
        lambda: pool.append([b], [1]),
    ):
        with pytest.raises(ValueError, match=f"node {b} was evicted; pin it"):
            call()
    refill = pool.pin([b])
    assert pool.node(a).is_evicted  # the only one left to take
    assert refill.nodes == (b,) and refill.token_ids.tolist() == [20, 21, 22, 23]
    assert refill.position_ids.tolist() == [4, 5, 6, 7]
    fill(pool, refill.slots, refill.token_ids, refill.position_ids)
    check_path(pool, b, paths[b])
    with pytest.raises(TreePoolExhausted, match="1 pages of 4 tokens are needed, 0 of 6 are free"):
        pool.pin([a])
    pool.check()
    pool.release(c)
    refill = pool.pin([a])
    fill(pool, refill.slots, refill.token_ids, refill.position_ids)
    check_path(pool, a, paths[a])


def test_whole_unpinned_paths_are_evicted_from_their_ends_and_refilled_from_the_root():
    pool = make_pool()
    root = root_of(pool, [1, 2, 3, 4, 5])
    (middle,) = pool.fork(root)
    put(pool, middle, [6, 7])
    (leaf,) = pool.fork(middle)
    put(pool, leaf, [8])
    assert pool.evict(10) == 0  # all are pinned
    for node in (root, middle):
        pool.unpin(node)
    assert pool.evict(10) == 0  # the leaf needs them
    pool.unpin(leaf)
    assert pool.evict(1) == 1 and not pool.node(middle).is_evicted
    assert pool.evict(10) == 3
    assert pool.stats.used_pages == 0
    assert pool.split(root, 2) != root  # works on tokens alone
    refill = pool.pin([leaf])
    assert refill.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert refill.position_ids.tolist() == list(range(8))
    assert refill.nodes[1:] == (root, middle, leaf)
    fill(pool, refill.slots, refill.token_ids, refill.position_ids)
    check_path(pool, leaf, list(range(1, 9)))
    assert pool.pin([leaf]).slots.numel() == 0
    pool.check()


def test_nothing_happens_when_pages_do_not_suffice():
    pool = make_pool(max_pages=3)
    a = root_of(pool, [1, 2, 3])
    b = root_of(pool, [4])
    before = pool.stats
    with pytest.raises(TreePoolExhausted, match="4 pages of 4 tokens are needed, 1 of 3 are free"):
        pool.append([a, b], [0] * 14, [10, 4])
    with pytest.raises(TreePoolExhausted):
        pool.alloc([0] * 9)
    assert pool.stats == before
    pool.append([a, b], [0] * 4, [1, 3])
    pool.check()


def test_prompts_of_equal_tokens_are_found():
    pool = make_pool()
    root = pool.alloc([1, 2, 3])
    assert pool.find_root([1, 2, 3]) is None  # still open: it may become another prompt
    (child,) = pool.fork(root)
    assert pool.find_root(torch.tensor([1, 2, 3])) == root
    assert pool.find_root([1, 2]) is None
    pool.hold(root)
    pool.release(root)
    pool.release(child)
    assert pool.find_root([1, 2, 3]) == root
    pool.advance_epoch()
    assert pool.find_root([1, 2, 3]) is None
    pool.release(root)
    assert pool.stats.nodes == 0


def test_a_release_gives_up_its_pin():
    pool = make_pool()
    root = root_of(pool, [1, 2])
    (child,) = pool.fork(root)
    pool.release(root)
    pool.unpin(child)
    assert pool.evict(1) == 1 and pool.node(root).pins == 0


def test_old_epochs_can_only_be_released():
    pool = make_pool()
    root = root_of(pool, [1, 2, 3])
    (child,) = pool.fork(root)
    pool.advance_epoch()
    assert pool.epoch == 1
    words = f"node {child} belongs to epoch 0, but the pool is at 1"
    for call in (
        lambda: pool.append([child], [1]),
        lambda: pool.fork(child),
        lambda: pool.pin([child]),
        lambda: pool.slots(child),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match="belongs to epoch 0"):
        pool.split(root, 1)
    new = root_of(pool, [9])
    pool.release(child)
    pool.release(root)
    check_path(pool, new, [9])
    assert pool.stats.nodes == 1


def test_names_are_never_given_out_twice():
    pool = make_pool()
    old = pool.alloc([1])
    pool.release(old)
    assert pool.alloc([2]) != old
    for call in (
        lambda: pool.release(old),
        lambda: pool.fork(old),
        lambda: pool.node(old),
        lambda: pool.hold(old),
        lambda: pool.path(old),
        lambda: pool.tokens(old),
    ):
        with pytest.raises(ValueError, match=f"node {old} was released; hold a node"):
            call()


def wrong_calls(pool):
    root = pool.alloc([1, 2, 3])
    (child,) = pool.fork(root)
    loose = pool.alloc()
    pool.unpin(loose)
    upper = pool.split(root, 1)
    return {
        "is sealed: it has been forked": lambda: pool.append([root], [4]),
        "must be forked at least once, got 0": lambda: pool.fork(child, 0),
        "3 tokens cannot be shared equally by 2": lambda: pool.append([child, child], [1, 2, 3]),
        "counts add up to 2, but there are 1": lambda: pool.append([child], [1], [2]),
        "one count for each node": lambda: pool.append([child], [1], [1, 0]),
        "counts must not be negative": lambda: pool.append([child, child], [1], [2, -1]),
        "is not pinned; pin it before": lambda: pool.append([loose], [1]),
        "unpinned more often": lambda: pool.unpin(loose),
        "of 0 tokens cannot be cut after 1": lambda: pool.split(child, 1),
        "of 2 tokens cannot be cut after 2": lambda: pool.split(root, 2),
        "of 2 tokens cannot be cut after 0": lambda: pool.split(root, 0),
        "is held by its children alone": lambda: pool.pin([upper]),
        "released more often than it was held": lambda: pool.release(upper),
        "node -1 does not exist": lambda: pool.release(-1),
        "node 99 was released|node 99 does not exist": lambda: pool.fork(99),
        "layer 2 of 2 does not exist": lambda: pool.layer(2),
        r"key must be \[3, 2, 3\]": lambda: pool.write(
            0, pool.slots(loose).new_zeros(3), torch.zeros(3, 1, 3), torch.zeros(3, 2, 3)
        ),
    }


@pytest.mark.parametrize("words", list(wrong_calls(make_pool())))
def test_wrong_calls_are_named_and_change_nothing(words):
    pool = make_pool()
    calls = wrong_calls(pool)
    before = pool.stats
    with pytest.raises(ValueError, match=words):
        calls[words]()
    pool.check()
    assert pool.stats == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"page": 12}, ValueError, "power of two up to 4096, got 12"),
        ({"page": 0}, ValueError, "power of two"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"width": 0}, ValueError, "width must be at least 1"),
        ({"max_pages": 0}, ValueError, "max_pages must be at least 1 or None"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float32 or"),
        ({"layout": "nhd"}, ValueError, "layout must be one of"),
    ],
)
def test_wrong_pools_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        make_pool(**options)


def test_a_key_of_another_type_is_refused():
    pool = make_pool(dtype=torch.bfloat16)
    pool.alloc([1])
    with pytest.raises(TypeError, match="key must be bfloat16"):
        pool.write(0, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))
