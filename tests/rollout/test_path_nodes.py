"""Tests of growing paths: keys of the draws, cuts, order."""

import pytest

from dlm_fast.rollout.path_nodes import PathNode, root_of


def written(node: PathNode, *tokens: int) -> PathNode:
    for token in tokens:
        node.tokens.append(token)
        node.logprobs.append(-float(token))
        node.confidences.append(0.5)
        node.step += 1
        node.steps.append(node.step)
    return node


def test_the_first_child_goes_on_with_its_parents_key() -> None:
    root = root_of([1, 2], key=7)
    first, second, third = (root.grow(4) for _ in range(3))
    assert first.key == 7 and len({7, second.key, third.key}) == 3
    root.children.remove(second)
    assert root.grow(4).key not in (7, second.key, third.key)  # a dropped child's key stays taken
    assert written(first, 3).grow(4).key == 7
    assert first.grow(4).key != second.key  # the same number of births at another place


def test_a_cut_keeps_the_path() -> None:
    root = root_of([1, 2], key=7)
    node = written(root.grow(4), 3, 4, 5, 6)
    child = written(node.grow(4), 8)
    node.kept = 4
    upper = node.split(3)
    assert [n.tokens for n in child.path()] == [[1, 2], [3, 4, 5], [6], [8]]
    assert (upper.start, upper.stop, node.start, node.stop, child.start) == (2, 5, 5, 6, 6)
    assert (upper.logprobs, node.logprobs) == ([-3.0, -4.0, -5.0], [-6.0])
    assert (upper.step, node.step, upper.kept, node.kept) == (3, 4, 3, 1)
    assert root.children == [upper] and upper.children == [node] and not upper.is_open
    grown = upper.grow(4)
    assert grown.step == 3 and grown.start == 5 and grown.key not in (node.key, child.key)
    assert list(root.below()) == [root, upper, node, child, grown]


@pytest.mark.parametrize("count", [0, 2, 3])
def test_a_cut_leaves_both_parts_a_token(count: int) -> None:
    node = written(root_of([1], key=0).grow(4), 3, 4)
    with pytest.raises(ValueError, match=f"2 tokens cannot be cut after {count}"):
        node.split(count)


def test_a_node_is_open_until_it_is_full_or_stopped() -> None:
    node = root_of([1], key=0).grow(2)
    assert node.is_open and written(node, 3).is_open and not written(node, 4).is_open
    other = root_of([1], key=0).grow(2)
    other.is_stopped = True
    assert not other.is_open
