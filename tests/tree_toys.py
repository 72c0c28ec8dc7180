"""Groups whose rollouts form trees, made by hand and at random, for the tests of TreePO."""

from __future__ import annotations

import dataclasses
import random

import torch

from dlm_fast.rollout.trajectory import Group, Trajectory

PROMPT = (5, 6, 7)


def leaf(path, lengths, ids, reward=0.0, prompt=PROMPT, **fields):
    """A leaf with recorded log-probabilities that follow from its tokens."""
    response = torch.tensor(ids, dtype=torch.int64)
    recorded = -1.0 - 0.125 * (response % 7)
    return Trajectory(
        prompt_ids=torch.tensor(prompt, dtype=torch.int64),
        response_ids=response,
        node_path=tuple(path),
        node_lengths=tuple(lengths),
        logp_rollout=recorded.float(),
        step_map=torch.arange(1, len(response) + 1, dtype=torch.int32),
        reward=float(reward),
        correct=reward > 0,
        **fields,
    )


def group(leaves, group_id=0):
    for member, trajectory in enumerate(leaves):
        trajectory.group_id, trajectory.member = group_id, member
    return Group(task_id=group_id, prompt_ids=leaves[0].prompt_ids, trajectories=list(leaves))


def tree_group(parents, texts, leaves, rewards, *, prompt=PROMPT, group_id=0):
    """``parents[n]`` and ``texts[n]``: parent (-1: the prompt) and token ids of node n."""
    made = []
    for node, reward in zip(leaves, rewards, strict=True):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        ids = [token for n in path for token in texts[n]]
        made.append(leaf(path, [len(texts[n]) for n in path], ids, reward, prompt))
    return group(made, group_id)


def figure_3(lengths=(3, 5, 8, 8, 7, 9, 10, 6), group_id=0):
    """The tree of the paper's figure 3: a, b, c11, c12, c21, c22, c23, c3; responses of ``lengths``
    tokens."""
    #          a   b   c  c1 c2 c11 c12 c21 c22 c23 c3
    parents = [-1, -1, -1, 2, 2, 3, 3, 4, 4, 4, 2]
    leaves = [0, 1, 5, 6, 7, 8, 9, 10]
    rewards = [-1, 1, -1, -1, 1, 1, -1, -1]
    texts = [[]] * 11
    texts[2], texts[3], texts[4] = [20, 21], [22], [23, 24]
    before = [0, 0, 3, 3, 4, 4, 4, 2]
    for node, length, shared in zip(leaves, lengths, before, strict=True):
        texts[node] = [10 + (node + k) % 15 for k in range(length - shared)]
    return tree_group(parents, texts, leaves, rewards, group_id=group_id)


def random_group(
    seed, *, leaves=12, prompt=4, longest=5, group_id=0, rewards=(-1.0, 1.0), vocab=30
):
    """A tree of at most ``leaves`` leaves with forks, chains and nodes without tokens."""
    draw = random.Random(seed)
    parents, texts, frontier = [], [], [-1] * draw.randint(1, 3)
    ends = []
    while frontier:
        parent = frontier.pop(draw.randrange(len(frontier)))
        parents.append(parent)
        texts.append([draw.randrange(2, vocab) for _ in range(draw.randint(0, longest))])
        free = leaves - len(ends) - len(frontier)
        children = min(free, draw.choice([0, 1, 2, 2, 3]))
        if children <= 0 or len(parents) > 4 * leaves:
            ends.append(len(parents) - 1)
        frontier += [len(parents) - 1] * max(0, children if len(parents) <= 4 * leaves else 0)
    for node in ends:
        texts[node] = texts[node] or [draw.randrange(2, vocab)]
    found = [draw.choice(rewards) for _ in ends]
    ids = [draw.randrange(2, vocab) for _ in range(prompt)]
    return tree_group(parents, texts, ends, found, prompt=ids, group_id=group_id)


def block_group(seed, *, block_size=4, prompt=3, leaves=6, group_id=0, rewards=(-1.0, 1.0)):
    """As ``random_group``, for block models: node edges at block edges, steps within blocks."""
    draw = random.Random(seed)
    shape = random_group(seed, leaves=leaves, rewards=rewards, prompt=prompt, group_id=group_id)
    texts: dict[int, list[int]] = {}
    steps: dict[int, list[int]] = {}
    for trajectory in shape.trajectories:
        last, length = 0, prompt
        for node in trajectory.node_path:
            if node not in texts:
                is_leaf = node == trajectory.node_path[-1]
                count = -length % block_size + block_size * draw.randint(int(is_leaf), 2)
                count = count - draw.randint(0, 2) if is_leaf else count
                texts[node] = [draw.randrange(2, 30) for _ in range(count)]
                steps[node] = _block_steps(draw, last, length, count, block_size)
            length += len(texts[node])
            last = max([last, *steps[node]])
        path = trajectory.node_path
        trajectory.response_ids = torch.tensor([t for n in path for t in texts[n]])
        trajectory.node_lengths = tuple(len(texts[n]) for n in path)
        order = [s for n in path for s in steps[n]]
        trajectory.step_map = torch.tensor(order, dtype=torch.int32)
        trajectory.logp_rollout = (-1.0 - 0.125 * (trajectory.response_ids % 7)).float()
        trajectory.block_size = block_size
    return shape


def _block_steps(draw, last, first, count, block_size):
    steps = []
    for position in range(first, first + count):
        if position % block_size == 0 or position == first:
            last = max([last, *steps])
        steps.append(last + draw.randint(1, 3))
    return steps


def chains(made):
    """The same leaves as groups of one flat rollout each: nothing is shared."""
    groups = []
    for k, trajectory in enumerate(made.trajectories):
        alone = dataclasses.replace(trajectory, node_path=(), node_lengths=(), group_id=100 + k)
        groups.append(
            Group(task_id=100 + k, prompt_ids=trajectory.prompt_ids, trajectories=[alone])
        )
    return groups
