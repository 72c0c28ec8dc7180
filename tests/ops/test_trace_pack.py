"""Packed rows of block-diffusion trajectories: oracles, and every conditional on its own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dlm_fast
from dlm_fast.models.requests import ScoreRequest
from dlm_fast.ops import (
    TraceNode,
    Visibility,
    fill_bins,
    join_packs,
    trace_conditionals_ref,
    trace_pack,
)


def tokens(*ids):
    return torch.tensor(ids, dtype=torch.int64)


def steps(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def chain(prompt, ids, step, **options):
    nodes = [
        TraceNode(parent=-1, ids=tokens(*prompt)),
        TraceNode(parent=0, ids=tokens(*ids), step=steps(*step)),
    ]
    return trace_pack(nodes, **({"mask_id": 99} | options))


def rounds_of_blocks(step, **options):
    """Merged steps of each token, and the number of chunks; the ids do not matter."""
    pack = chain([], range(len(step)), step, **options)
    merged = torch.zeros(len(step), dtype=torch.int32)
    merged[pack.token.long()] = pack.step
    firsts = pack.visibility.intervals[pack.rows.long(), 0]
    return merged.tolist(), firsts.unique().numel()


def test_merged_steps():
    """Oracle T1 of the specification, the blocks."""
    assert rounds_of_blocks([1, 3, 2, 4, 6, 5], block_size=3, shrink=2) == ([2, 3, 2, 5, 6, 5], 4)
    ids = [1, 1, 2, 5, 6, 6, 6, 6, 7, 8, 9, 10]
    assert rounds_of_blocks(ids, block_size=4) == (ids, 8)
    two = [2, 2, 2, 5, 6, 6, 6, 6, 8, 8, 10, 10]
    assert rounds_of_blocks(ids, block_size=4, shrink=2) == (two, 5)
    three = [5, 5, 5, 5, 6, 6, 6, 6, 9, 9, 9, 10]
    assert rounds_of_blocks(ids, block_size=4, shrink=3) == (three, 4)
    assert rounds_of_blocks(ids, block_size=4, shrink=4)[1] == 3


def test_grid():
    """Oracle T2: blocks lie on the grid from position 0; counted from the prompt on demand."""
    step = [1, 2, 3, 2, 3, 4, 5, 5]
    pack = chain([7, 7, 7], range(8), step, block_size=4)
    assert [pack.step[pack.rows.argsort()].tolist()] == [[1, 2, 2, 3, 3, 4, 5, 5]]
    assert pack.visibility.intervals[pack.rows.long(), 0].unique().numel() == 5
    moved = chain([7, 7, 7], range(8), step, block_size=4, grid_shift=1)
    assert moved.visibility.intervals[moved.rows.long(), 0].unique().numel() == 6
    block = moved.token // 4
    assert [set(moved.step[block == b].tolist()) for b in (0, 1)] == [{1, 2, 3}, {3, 4, 5}]


def test_worked_examples():
    """Section 2.4 of the specification, B: rows, targets and intervals."""
    pack = chain([10, 11], [20, 21, 22, 23], [1, 2, 3, 3], block_size=2, last_block_clean=True)
    assert pack.input_ids.tolist() == [10, 11, 20, 21, 22, 23, 99, 99, 20, 99, 99, 99]
    assert pack.visibility.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 2, 3, 4, 5]
    assert pack.rows.tolist() == [6, 9, 10, 11] and pack.targets.tolist() == [20, 21, 22, 23]
    expected = [
        *([[0, 2, 2, 12]] * 2),
        *([[2, 6, 10, 12]] * 2),
        *([[4, 6, 12, 12]] * 2),
        *([[6, 8, 0, 0]] * 2),
        *([[8, 10, 0, 0]] * 2),
        *([[10, 12, 0, 0]] * 2),
    ]
    assert pack.visibility.intervals.tolist() == expected
    # A: one chunk per block; a dense picture
    pack = chain([1, 2], [3, 4, 5, 6], [1, 1, 2, 2], block_size=2, last_block_clean=True)
    picture = """
        1 1 . . . . . . . .
        1 1 . . . . . . . .
        1 1 1 1 . . . . . .
        1 1 1 1 . . . . . .
        1 1 1 1 1 1 . . . .
        1 1 1 1 1 1 . . . .
        1 1 . . . . 1 1 . .
        1 1 . . . . 1 1 . .
        1 1 1 1 . . . . 1 1
        1 1 1 1 . . . . 1 1"""
    seen = [[c == "1" for c in line.split()] for line in picture.split("\n")[1:]]
    assert pack.visibility.dense().tolist() == seen
    # without the clean rows that nobody sees
    assert chain([1, 2], [3, 4, 5, 6], [1, 1, 2, 2], block_size=2).num_rows == 8


@st.composite
def trees(draw):
    """A prompt and a random tree of recorded segments, one or two orders each."""
    block = draw(st.integers(1, 5))
    copies = draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def node(parent, length, is_prompt):
        ids = torch.randint(0, 90, (length,), generator=generator)
        if is_prompt:
            return TraceNode(parent=parent, ids=ids)
        step = torch.randint(1, 6, (copies, length), generator=generator, dtype=torch.int32)
        trainable = torch.rand(copies, length, generator=generator) < 0.8
        return TraceNode(parent=parent, ids=ids, step=step, trainable=trainable)

    nodes = [node(-1, draw(st.integers(0, 8)), True)]
    stack = [0]
    for _ in range(draw(st.integers(1, 6))):
        depth = draw(st.integers(1, len(stack)))
        del stack[depth:]
        nodes.append(node(stack[-1], draw(st.integers(0, 9)), False))
        stack.append(len(nodes) - 1)
    options = {"block_size": block, "shrink": draw(st.integers(1, 3))}
    return nodes, options | {"grid_shift": draw(st.integers(0, block - 1))}


def conditionals_of(pack):
    """Per chunk: the ids that its rows see, in order of position, and the targets."""
    dense = pack.visibility.dense()
    found = {}
    for u, row in enumerate(pack.rows.tolist()):
        seen = dense[row].nonzero()[:, 0]
        seen = seen[pack.visibility.position_ids[seen].argsort(stable=True)]
        positions = pack.visibility.position_ids[seen].tolist()
        assert positions == list(
            range(len(positions))
        )  # every position before and in the block once
        at = int(pack.visibility.position_ids[row])
        key = (int(pack.node[u]), int(pack.token[u]), int(pack.copy[u]))
        assert key not in found
        found[key] = (pack.input_ids[seen].tolist(), at, int(pack.step[u]), int(pack.targets[u]))
    return found


@settings(max_examples=150, deadline=None)
@given(trees())
def test_every_target_sees_its_conditional(tree):
    """Random trees: what a target's row sees is the sequence of the definition, token for token."""
    nodes, options = tree
    pack = trace_pack(nodes, mask_id=99, **options)
    found = conditionals_of(pack)
    expected = {}
    for conditional in trace_conditionals_ref(nodes, mask_id=99, **options):
        for row, node, token, copy in conditional.targets:
            target = int(nodes[node].ids[token])
            ids = conditional.input_ids.tolist()
            expected[node, token, copy] = (ids, row, conditional.step, target)
    assert found == expected
    trained = {
        (n, i, c)
        for n, node in enumerate(nodes)
        if node.trainable is not None
        for c, i in node.trainable.nonzero().tolist()
    }
    assert set(found) == trained  # each trainable token exactly once
    assert pack.rows.tolist() == sorted(pack.rows.tolist())


@pytest.fixture(scope="module")
def policy():
    options = {"kind": "block", "width": 16, "heads": 2, "layers": 3, "seed": 3}
    return lambda block: dlm_fast.load("tiny", block_size=block, **options).double()


@settings(max_examples=25, deadline=None)
@given(trees())
def test_packed_equals_each_conditional(policy, tree):
    """Oracle T4: log-probabilities and the gradient of their weighted sum, float64."""
    nodes, options = tree
    options["grid_shift"] = 0  # the model's own grid
    nodes = [TraceNode(**(vars(n) | {"ids": n.ids % 30})) for n in nodes]
    model = policy(options["block_size"])
    pack = join_packs([trace_pack(nodes, mask_id=31, **options)] * 2)
    if pack.rows.numel() == 0:
        return
    weight = torch.randn(pack.rows.numel(), dtype=torch.float64)
    found = model(
        pack.input_ids, pack.visibility, score=ScoreRequest(pack.rows, pack.targets)
    ).logprob
    half = len(found) // 2
    assert torch.allclose(found[:half], found[half:], atol=1e-12)
    assert pack.tree.tolist() == [0] * half + [1] * half
    (found * weight).sum().backward()
    packed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    both = weight[:half] + weight[half:]
    place = {
        (int(n), int(i), int(c)): u
        for u, (n, i, c) in enumerate(
            zip(pack.node[:half], pack.token[:half], pack.copy[:half], strict=True)
        )
    }
    for conditional in trace_conditionals_ref(nodes, mask_id=31, **options):
        rows = torch.tensor([t[0] for t in conditional.targets], dtype=torch.int32)
        targets = torch.tensor([int(nodes[n].ids[i]) for _, n, i, _ in conditional.targets])
        visibility = Visibility.block_causal([len(conditional.input_ids)], options["block_size"])
        alone = model(conditional.input_ids, visibility, score=ScoreRequest(rows, targets)).logprob
        at = torch.tensor([place[t[1:]] for t in conditional.targets])
        assert torch.allclose(found[at], alone, atol=1e-12)
        (alone * both[at]).sum().backward()
    separate = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(packed, separate, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


def test_merging_all_steps_masks_the_block():
    """Limit T5a; and T5d: only the order of the steps matters."""
    pack = chain([1], [2, 3, 4, 5, 6], [3, 1, 2, 9, 7], block_size=3, shrink=9)
    assert pack.input_ids[pack.rows.long()].tolist() == [99] * 5
    other = chain([1], [2, 3, 4, 5, 6], [30, 1, 4, 5, 2], block_size=3, shrink=9)
    assert torch.equal(pack.input_ids, other.input_ids)


def test_tokens_that_are_never_targets():
    """Tail tokens follow the trace; pads revealed at the very end stay masked throughout."""
    node = TraceNode(
        parent=0,
        ids=tokens(5, 6, 7, 8),
        step=steps(1, 2, 1, 9),
        trainable=torch.tensor([True, True, False, False]),
    )
    pack = trace_pack([TraceNode(parent=-1, ids=tokens()), node], block_size=4, mask_id=99)
    assert pack.input_ids.tolist() == [99, 99, 99, 99, 5, 99, 7, 99]
    assert pack.targets.tolist() == [5, 6]


def test_the_pattern_alone():
    nodes = [
        TraceNode(parent=-1, ids=tokens(7, 7, 7)),
        TraceNode(parent=0, ids=tokens(*range(8)), step=steps(1, 2, 3, 2, 3, 4, 5, 5)),
    ]
    pack = trace_pack(nodes, block_size=4, mask_id=99, shrink=2)
    pattern = Visibility.trace(nodes, block_size=4, shrink=2)
    assert torch.equal(pattern.intervals, pack.visibility.intervals)
    assert torch.equal(pattern.position_ids, pack.visibility.position_ids)


def test_a_group_shares_its_prompt():
    prompt = TraceNode(parent=-1, ids=torch.arange(10))
    group = [
        TraceNode(parent=0, ids=tokens(1, 2, 3), step=steps(1, 1, 2)),
        TraceNode(parent=0, ids=tokens(4, 5, 6), step=steps(2, 1, 2)),
    ]
    pack = trace_pack([prompt, *group], block_size=4, mask_id=99)
    # whole prompt blocks; per response the cut block clean, its rounds, the last block
    assert pack.num_rows == 8 + 2 * 4 + (4 + 1) + (2 * 4 + 1)


def test_bins():
    assert fill_bins([5, 9, 3, 4, 12], 9) == [[0, 3], [1], [2], [4]]
    assert fill_bins([], 9) == []
    with pytest.raises(ValueError, match="budget"):
        fill_bins([1], 0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"nodes": []}, ValueError, "no nodes"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1"),
        ({"shrink": 0}, ValueError, "shrink must be at least 1"),
        ({"grid_shift": 2}, ValueError, "grid_shift must be in 0..1"),
        ({"parent": 5}, ValueError, "depth-first"),
        ({"parent": -1}, ValueError, "depth-first"),
        ({"ids": tokens(1, 2).int()}, TypeError, r"nodes\[1\].ids must be int64"),
        ({"step": steps(1)}, TypeError, r"nodes\[1\].step must be"),
        ({"step": steps(-1, 1)}, ValueError, "must not be negative"),
        ({"trainable": torch.ones(2)}, TypeError, r"nodes\[1\].trainable must be"),
        (
            {"step": steps(0, 1), "trainable": torch.ones(2, dtype=torch.bool)},
            ValueError,
            "without",
        ),
    ],
)
def test_wrong_arguments(change, error, words):
    node = {"parent": 0, "ids": tokens(1, 2), "step": steps(1, 2)}
    node |= {name: value for name, value in change.items() if name in (*node, "trainable")}
    options = {"nodes": [TraceNode(parent=-1, ids=tokens(3)), TraceNode(**node)], "block_size": 2}
    options |= {name: value for name, value in change.items() if name not in node}
    options.pop("trainable", None)
    with pytest.raises(error, match=words):
        trace_pack(**options, mask_id=9)
