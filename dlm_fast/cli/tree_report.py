"""Trees of completions on the terminal and in files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dlm_fast.cli.output import write, write_json
from dlm_fast.cli.tree_page import leaf_facts, tree_page

Scorer = Callable[[str], Any]
"""a completion -> ``Score``"""
_WIDEST = 72
"""characters of a node's text on the terminal"""


def write_trees(
    policy: Any,
    prompts: Sequence[str],
    options: Any,
    scores: Sequence[Scorer] | None,
    folder: Path,
) -> None:
    """Grows, prints and saves ``options.num_samples`` trees of each prompt."""
    from dlm_fast.rollout import sample_trees

    encoded = [policy.encode(prompt, chat=options.chat) for prompt in prompts]
    trees = sample_trees(
        policy,
        [ids for ids in encoded for _ in range(options.num_samples)],
        options.rollout,
        options.tree,
        seed=options.seed,
        max_batch=options.batch_size,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for number, tree in enumerate(trees):
        index = number // options.num_samples
        scorer = None if scores is None else scores[index]
        data = tree_data(policy, tree, prompts[index], scorer, options.seed)
        write_json(str(folder / f"tree_{number}.json"), data)
        (folder / f"tree_{number}.html").write_text(tree_page(data), encoding="utf-8")
        write(json.dumps(data, ensure_ascii=False) if options.json else tree_text(data))
    if not options.json:
        write(f"written: {folder}/tree_0.html{' and so on' if len(trees) > 1 else ''}")


def tree_data(
    policy: Any, tree: Any, prompt: str, scorer: Scorer | None, seed: int
) -> dict[str, Any]:
    """A tree as plain data: ``nodes`` below the prompt, parents first, and ``leaves`` in the order
    they ended; rewards and advantages (TreePO's mean over shared prefixes) where scored."""
    numbers = tree.numbers()
    trajectories = tree.trajectories(seed=seed, block_size=policy.family.block_size or 1)
    nodes = [
        {
            "id": numbers[id(node)],
            "parent": numbers.get(id(node.parent), -1),
            "start": node.start - tree.root.stop,
            "tokens": node.tokens,
            "logprobs": node.logprobs,
            "text": policy.decode(node.tokens),
        }
        for node in tree.root.below()
        if node is not tree.root
    ]
    leaves = []
    for trajectory in trajectories:
        trajectory.text = policy.decode(trajectory.response_ids)
        row = {
            "node": trajectory.node_path[-1],
            "completion": trajectory.text,
            "tokens": trajectory.response_length,
            **{key: trajectory.detail["tree"][key] for key in ("reason", "fallback", "copies")},
        }
        if scorer is not None:
            score = scorer(trajectory.text)
            trajectory.reward = float(score.reward)
            row |= {"reward": trajectory.reward, "correct": bool(score.correct)}
        leaves.append(row)
    if scorer is not None:
        for row, advantage in zip(leaves, _advantages(tree, trajectories), strict=True):
            row["advantage"] = advantage
    return {
        "prompt": prompt,
        "prompt_tokens": tree.prompt_ids.tolist(),
        "flat_tokens": tree.flat_tokens,
        "unique_tokens": tree.unique_tokens,
        "nodes": nodes,
        "leaves": leaves,
    }


def _advantages(tree: Any, trajectories: Sequence[Any]) -> list[float]:
    """Of each leaf, before they are standardised over a batch."""
    from dlm_fast.algorithms.tree_advantages import AdvantageOptions, tree_advantages
    from dlm_fast.rollout.trajectory import Group
    from dlm_fast.rollout.tree import Forest, PackedTree

    if not trajectories:
        return []
    group = Group(task_id=0, prompt_ids=tree.prompt_ids, trajectories=list(trajectories))
    forest = Forest.of([PackedTree.of(group)])
    options = AdvantageOptions(whiten="none")
    advantage_Q = tree_advantages(forest, group.rewards, options).tolist()
    # one number for all segments of a leaf
    of_leaf = dict(zip(forest.pairs[0].tolist(), advantage_Q, strict=True))
    return [of_leaf[leaf] for leaf in range(len(trajectories))]


def tree_text(data: dict[str, Any]) -> str:
    """The tree by indentation, for a terminal."""
    facts = (
        f"{len(data['leaves'])} leaves, {data['flat_tokens']} tokens, "
        f"{data['unique_tokens']} of them decoded"
    )
    return "\n".join([data["prompt"], *_lines(data), f"   ({facts})", ""])


def _lines(data: dict[str, Any]) -> Iterator[str]:
    children: dict[int, list[dict[str, Any]]] = {}
    for node in data["nodes"]:
        children.setdefault(node["parent"], []).append(node)
    ends = {leaf["node"]: leaf for leaf in data["leaves"]}
    waiting = [(node, "") for node in reversed(children.get(-1, []))]
    while waiting:
        node, indent = waiting.pop()
        siblings = children[node["parent"]]
        is_last = node is siblings[-1]
        text = " ".join(node["text"].split())
        text = text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "..."
        end = leaf_facts(ends[node["id"]]) if node["id"] in ends else ""
        yield f"{indent}{'`- ' if is_last else '|- '}{text}{f'   ({end})' if end else ''}"
        below = indent + ("   " if is_last else "|  ")
        waiting += [(child, below) for child in reversed(children.get(node["id"], []))]
