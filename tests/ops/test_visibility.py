"""Intervals mean what their rules say, and dense attention under them is exact."""

import subprocess
import sys

import pytest
import torch
from attention_problems import (
    assert_close,
    free_visibility,
    random_qkv,
    values_and_gradients,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dlm_fast.ops import interval_attention_ref
from dlm_fast.ops.segment_attention import bucket_attention, segment_attention
from dlm_fast.ops.visibility import Visibility, dense_mask

packs = st.lists(st.integers(0, 9), max_size=6)


def rows_of(lengths):
    """(sample, position) of every row, the slow way."""
    return [(sample, i) for sample, length in enumerate(lengths) for i in range(length)]


def mask_from_rule(lengths, sees):
    rows = rows_of(lengths)
    mask = [[a == b and sees(i, j) for b, j in rows] for a, i in rows]
    return torch.tensor(mask, dtype=torch.bool).view(len(rows), len(rows))


@given(packs)
def test_full_and_causal_follow_their_rules(lengths):
    assert torch.equal(Visibility.full(lengths).dense(), mask_from_rule(lengths, lambda i, j: True))
    causal = mask_from_rule(lengths, lambda i, j: j <= i)
    assert torch.equal(Visibility.causal(lengths).dense(), causal)


@given(packs, st.integers(1, 6))
def test_block_causal_follows_its_rule(lengths, size):
    mask = mask_from_rule(lengths, lambda i, j: j // size <= i // size)
    assert torch.equal(Visibility.block_causal(lengths, size).dense(), mask)


@given(packs)
def test_positions_and_predecessors_restart_in_every_sample(lengths):
    visibility = Visibility.full(lengths)
    positions = [i for _, i in rows_of(lengths)]
    assert visibility.position_ids.tolist() == positions
    assert visibility.pred.tolist() == [row - 1 if i else -1 for row, i in enumerate(positions)]
    assert visibility.lengths == tuple(lengths)
    assert visibility.num_queries == visibility.num_keys == sum(lengths)


def test_tree_of_known_numbers():
    """Root [t0 t1], below it A [t2] and B [t6], below A [t3] and [t4 t5]."""
    tree = Visibility.tree([-1, 0, 1, 1, 0], [2, 1, 1, 2, 1])
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 2]
    assert tree.intervals[:, 0].tolist() == list(range(7))
    assert tree.intervals[:, 1].tolist() == [7, 7, 6, 4, 6, 6, 7]
    assert tree.pred.tolist() == [-1, 0, 1, 2, 2, 4, 1]
    assert int(tree.dense().sum()) == 22 and tree.lengths == (7,)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=9))
def test_tree_follows_its_rule(steps):
    """Each node hangs ``up`` nodes above the one before it."""
    parents, lengths, paths = [], [], []
    for up, length in steps:
        path = paths[-1][: max(len(paths[-1]) - up, 0)] if paths else []
        parents.append(path[-1] if path else -1)
        lengths.append(length)
        paths.append([*path, len(paths)])
    tree = Visibility.tree(parents, lengths)
    rows = [(node, i) for node, length in enumerate(lengths) for i in range(length)]
    for row, (node, i) in enumerate(rows):
        seen = [j for j, (other, k) in enumerate(rows)
                if other in paths[node] and (other != node or k <= i)]  # fmt: skip
        assert tree.dense()[row].nonzero()[:, 0].tolist() == seen
        assert int(tree.position_ids[row]) == len(seen) - 1
        assert int(tree.pred[row]) == (seen[-2] if len(seen) > 1 else -1)
    assert sum(tree.lengths) == len(rows) and len(tree.lengths) == parents.count(-1)


@pytest.mark.parametrize(
    ("parents", "lengths", "words"),
    [
        ([-1, 0, 0, 1], [1] * 4, r"parents\[3\] = 1 is not on the path to node 2"),
        ([0], [1], r"parents\[0\] = 0 is not on the path"),
        ([-1, 2], [1, 1], r"parents\[1\] = 2 is not on the path"),
        ([-1], [1, 2], "1 parents for 2 lengths"),
        ([-1], [-1], "lengths must not be negative, got -1 for node 0"),
    ],
)
def test_tree_refuses_nodes_out_of_order(parents, lengths, words):
    with pytest.raises(ValueError, match=words):
        Visibility.tree(parents, lengths)


def test_block_causal_equals_the_familys_own_mask(shared_data):
    path = shared_data / "checkpoints" / "sdar_tiny" / "reference.safetensors"
    mask = load_file(path)["block_causal_mask"]
    assert torch.equal(Visibility.block_causal([mask.shape[0]], 4).dense(), mask)


def test_clean_and_noisy_streams_fit_into_two_intervals():
    """Worked example B of TraceRL's layout: clean rows 0-5, chunks 6-7, 8-9 and 10-11."""
    keys = [[0, 2, 2, 12], [2, 6, 10, 12], [4, 6, 12, 12], [6, 8, 0, 0], [8, 10, 0, 0]]
    keys += [[10, 12, 0, 0]]
    intervals = torch.tensor(keys, dtype=torch.int32).repeat_interleave(2, 0)
    seen = [range(2), range(4), range(6), [0, 1, 6, 7], [0, 1, 8, 9], [0, 1, 2, 3, 10, 11]]
    expected = torch.zeros(12, 12, dtype=torch.bool)
    for chunk, columns in enumerate(seen):
        expected[2 * chunk : 2 * chunk + 2, list(columns)] = True
    visibility = Visibility(
        intervals=intervals,
        position_ids=torch.tensor([0, 1, 2, 3, 4, 5, 2, 3, 2, 3, 4, 5]),
        pred=torch.full((12,), -1, dtype=torch.int32),
    )
    assert torch.equal(visibility.dense(), expected)


def test_a_tree_fits_into_one_interval():
    """TreePO's micro-oracle: key j is seen from j to the end of its node's subtree."""
    end = [7, 7, 6, 4, 6, 6, 7]
    intervals = torch.tensor([[j, e, e, e] for j, e in enumerate(end)], dtype=torch.int32)
    assert int(dense_mask(intervals, 7).sum()) == 22


def batched(attention, batch):
    """Calls an attention in a policy's layout with the pack as [batch, T / batch]."""

    def attend(*tensors):
        folded = [x.view(batch, x.shape[0] // batch, *x.shape[1:]).transpose(1, 2) for x in tensors]
        return attention(*folded).transpose(1, 2).flatten(0, 1)

    return attend


KINDS = {
    "full": Visibility.full,
    "causal": Visibility.causal,
    "block": lambda lengths: Visibility.block_causal(lengths, 3),
}


both_ways = pytest.mark.parametrize("attention", [segment_attention, bucket_attention])


@both_ways
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lengths", "batch"),
    [
        ([7], 1),
        ([600, 600], 2),
        ([5, 5, 5, 5], 1),
        ([5, 5, 5, 5], 4),
        ([5, 5, 5, 5], 2),
        ([4, 7, 0, 4, 1, 7], 1),
    ],
)
def test_fast_path_equals_the_definition(kind, lengths, batch, attention):
    visibility = KINDS[kind](lengths)
    tensors = random_qkv(sum(lengths), sum(lengths))
    fast = batched(lambda q, k, v: attention(q, k, v, visibility), batch)
    slow = values_and_gradients(lambda *t: interval_attention_ref(*t, visibility), tensors)
    assert_close(values_and_gradients(fast, tensors), slow)


@both_ways
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_separate(kind, attention):
    lengths = [3, 8, 1, 8]
    tensors = random_qkv(sum(lengths), sum(lengths))

    def separately(q, k, v):
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([interval_attention_ref(*p, KINDS[kind]([len(p[0])])) for p in parts])

    visibility = KINDS[kind](lengths)
    fast = batched(lambda q, k, v: attention(q, k, v, visibility), 1)
    assert_close(values_and_gradients(fast, tensors), values_and_gradients(separately, tensors))


@both_ways
@given(queries=st.integers(0, 12), keys=st.integers(1, 12), seed=st.integers(0, 1000))
def test_free_intervals_of_any_size_equal_the_definition(attention, queries, keys, seed):
    visibility = free_visibility(queries, keys, seed)
    tensors = random_qkv(queries, keys, seed=seed)
    fast = batched(lambda q, k, v: attention(q, k, v, visibility, scale=0.7), 1)
    slow = values_and_gradients(lambda *t: interval_attention_ref(*t, visibility, 0.7), tensors)
    assert_close(values_and_gradients(fast, tensors), slow)


@both_ways
@pytest.mark.parametrize("lengths", [(6, 6), (6, 4, 6), (5,)])
def test_segments_with_patterns_of_their_own(lengths, attention):
    total = sum(lengths)
    visibility = free_visibility(total, total, 3, lengths)
    tensors = random_qkv(total, total)
    fast = batched(lambda q, k, v: attention(q, k, v, visibility), 1)
    slow = values_and_gradients(lambda *t: interval_attention_ref(*t, visibility), tensors)
    assert_close(values_and_gradients(fast, tensors), slow)


def test_a_row_that_sees_nothing_gives_zeros():
    q, k, v = random_qkv(3, 3)
    intervals = torch.tensor([[0, 1, 1, 1], [2, 3, 3, 3], [0, 1, 2, 3]], dtype=torch.int32)
    out = interval_attention_ref(q, k, v, intervals)
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(gradient[1], torch.zeros_like(gradient[1]))


def test_the_definition_is_softmax_over_visible_keys():
    q, k, v = random_qkv(2, 3, heads=1, key_heads=1)
    intervals = torch.tensor([[0, 2, 2, 2], [1, 2, 2, 2], [0, 1, 1, 1]], dtype=torch.int32)
    out = interval_attention_ref(q, k, v, intervals)
    for row, seen in ((0, [0, 2]), (1, [0, 1])):
        scores = torch.stack([q[row, 0] @ k[j, 0] / 6**0.5 for j in seen])
        expected = (scores.softmax(0)[:, None] * v[seen, 0]).sum(0)
        torch.testing.assert_close(out[row, 0], expected, rtol=0, atol=1e-14)


def good_parts():
    visibility = Visibility.full([2, 2])
    names = ("intervals", "position_ids", "pred", "lengths")
    return {name: getattr(visibility, name) for name in names}


INT32 = {"dtype": torch.int32}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"intervals": torch.zeros(4, 3, **INT32)}, r"intervals must be int32 \[keys, 4\].*\[4, 3"),
        ({"intervals": torch.zeros(4, 4)}, "intervals must be int32.*float32"),
        ({"position_ids": torch.zeros(4, **INT32)}, "position_ids must be int64"),
        ({"pred": torch.zeros(3, **INT32)}, r"pred must be int32 \[4\]"),
        ({"lengths": (2, 3)}, "lengths add up to 5, but there are 4 query rows and 4 key rows"),
        (
            {"intervals": torch.tensor([[0, 5, 5, 5]] * 4, **INT32)},
            r"intervals\[0\] = \[0, 5, 5, 5",
        ),
        ({"intervals": torch.tensor([[2, 0, 0, 0]] * 4, **INT32)}, "two disjoint intervals"),
        ({"intervals": torch.tensor([[-1, 1, 1, 1]] * 4, **INT32)}, "two disjoint intervals"),
        ({"intervals": torch.tensor([[0, 2, 1, 2]] * 4, **INT32)}, "two disjoint intervals"),
        ({"intervals": torch.tensor([[0, 4, 4, 4]] * 4, **INT32)}, "outside the key's segment"),
        ({"pred": torch.tensor([-1, 0, 4, 2], **INT32)}, r"pred\[2\] = 4 is no row"),
    ],
)
def test_what_cannot_be_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        Visibility(**(good_parts() | change))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"lengths must not be negative, got \[3, -1\]"):
        Visibility.full([3, -1])
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        Visibility.block_causal([3], 0)
    q, k, v = random_qkv(4, 4)
    with pytest.raises(ValueError, match="3 rows of the visibility"):
        interval_attention_ref(q, k, v, Visibility.full([3]))
    with pytest.raises(ValueError, match="4 query heads of q are not a multiple of the 3"):
        interval_attention_ref(q, k.new_zeros(4, 3, 6), v.new_zeros(4, 3, 6), Visibility.full([4]))


def test_moving_keeps_everything():
    visibility = Visibility.block_causal([5, 3], 2)
    assert visibility.to("cpu") is visibility
    moved = visibility.to("meta")
    assert moved.lengths == visibility.lengths
    assert moved.intervals.device.type == moved.pred.device.type == "meta"


def test_ops_need_torch_and_numpy_alone(tmp_path):
    code = "import sys, dlm_fast.ops; print('transformers' in sys.modules, 'yaml' in sys.modules)"
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert out.split() == ["False", "False"]
