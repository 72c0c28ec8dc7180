"""An optimizer step's forward and backward passes on packed trees, against separate sequences.

Run: OMP_NUM_THREADS=1 python benches/tree_update.py [--out FOLDER] [--rounds N]
Then `python benches/make_tables.py` renews docs/benchmarks.md.

Full trees of 16 leaves, two branches at every fork until there are 16 paths, as TreePO's sampler
makes them when no path ends early; Qwen3's backbone with random weights. Both sides train the same
leaves with TreePO's loss (old log-probabilities given), rows_per_forward as by default:

    packed     each unique token once (U of them), weights A+, A- and n
    separate   each leaf a sequence of its own (S tokens), prompt included

U/S of separate's time is what packing would take if time were proportional to tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from protocol_machine import facts
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

import dlm_fast
from dlm_fast.algorithms.contract import Context
from dlm_fast.algorithms.tree_tokens import TreeTokens
from dlm_fast.algorithms.treepo import Config, TreePO
from dlm_fast.benchmark.timing import Plan, cpu_clock, interleaved, summary
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Group, Trajectory
from dlm_fast.rollout.tree_config import TreeConfig

LEAVES, SEED = 16, 0
MODEL = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A full tree."""

    prompt: int
    segment: int
    depth: int
    first: int = 2
    """branches of the prompt"""

    @property
    def name(self) -> str:
        return (
            f"prompt {self.prompt}, {self.depth} segments of {self.segment}, "
            f"{self.first} first branches"
        )


SHAPES = (
    Shape(prompt=64, segment=32, depth=4),
    Shape(prompt=64, segment=32, depth=6),
    Shape(prompt=64, segment=32, depth=8),
    Shape(prompt=64, segment=32, depth=6, first=8),
    Shape(prompt=256, segment=64, depth=4),
    Shape(prompt=256, segment=128, depth=1, first=16),
)


def make_policy() -> Any:
    """Random weights, the head scaled so that logits spread by 1."""
    torch.manual_seed(SEED)
    disable_progress_bar()
    whole = Qwen3ForCausalLM(
        Qwen3Config(**MODEL, tie_word_embeddings=False, max_position_embeddings=2048)
    )
    with torch.no_grad():
        whole.lm_head.weight.normal_().mul_(MODEL["hidden_size"] ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        return dlm_fast.load(folder, eos_ids=[MODEL["vocab_size"] - 1])


def full_tree(shape: Shape) -> Group:
    generator = torch.Generator().manual_seed(SEED)

    def draw(count: int) -> Tensor:
        return torch.randint(0, MODEL["vocab_size"] - 1, (count,), generator=generator)

    prompt, count = draw(shape.prompt), 0
    paths: list[tuple[tuple[int, ...], Tensor]] = [((), prompt[:0])] * shape.first
    for level in range(shape.depth):
        grown = []
        for path, ids in paths:
            grown.append(((*path, count), torch.cat([ids, draw(shape.segment)])))
            count += 1
        copies = max(1, min(2, LEAVES // len(grown))) if level + 1 < shape.depth else 1
        paths = [one for one in grown for _ in range(copies)]
    leaves = [
        Trajectory(
            prompt_ids=prompt,
            response_ids=ids,
            node_path=path,
            node_lengths=(shape.segment,) * len(path),
            logp_rollout=torch.zeros(len(ids)),
            reward=float(member % 3 == 0),
            correct=member % 3 == 0,
        )
        for member, (path, ids) in enumerate(paths)
    ]
    return Group(task_id=0, prompt_ids=prompt, trajectories=leaves)


def separated(group: Group) -> list[Group]:
    """Each leaf alone, with nothing to share."""
    return [
        Group(
            task_id=0,
            prompt_ids=group.prompt_ids,
            trajectories=[replace(leaf, node_path=(), node_lengths=())],
        )
        for leaf in group.trajectories
    ]


def step_of(policy: Any, groups: list[Group]) -> tuple[TreePO, list[TreeTokens]]:
    """The passes of one optimizer step."""
    config = Config(
        estimator="rfpp", whiten="none", reject="none", tree=TreeConfig(leaves=LEAVES), epochs=2
    )
    algorithm = config.build(
        rollout=SamplerConfig(max_new_tokens=2048), num_prompts=1, mask_id=-1, seed=SEED
    )
    algorithm.modules(policy)

    def score(*inputs: Any, **requests: Any) -> Any:
        with torch.no_grad():
            return policy(*inputs, **requests)

    context = Context(score=score, global_sum=float, iteration=0, seed=SEED)
    (step,) = algorithm.prepare(groups, context)
    return algorithm, step


def pass_of(policy: Any, groups: list[Group], reward: float) -> tuple[Callable[[], float], int]:
    """Forward, loss and backward of all micro-batches; and the rows they forward.

    ``reward`` is taken off the advantages of trees of one leaf, which are compared with nothing.
    """
    algorithm, step = step_of(policy, groups)
    for micro in step if len(groups) > 1 else ():
        net = micro.plus - micro.minus - reward
        micro.plus, micro.minus = net.clamp(min=0), (-net).clamp(min=0)

    def run() -> float:
        policy.zero_grad(set_to_none=True)
        total = 0.0
        for micro in step:
            loss, _ = algorithm.loss(micro, policy)
            loss.backward()
            total += float(loss.detach())
        return total

    return run, sum(micro.rows.input_ids.numel() for micro in step)


def gradient(policy: Any, run: Callable[[], float]) -> tuple[float, Tensor]:
    loss = run()
    return loss, torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def measure(rounds: int) -> list[dict[str, Any]]:
    policy, cases = make_policy(), []
    for shape in SHAPES:
        group = full_tree(shape)
        mean = float(group.rewards.mean())
        packed, unique = pass_of(policy, [group], mean)
        separate, flat = pass_of(policy, separated(group), mean)
        (loss, ours), (other, theirs) = (gradient(policy, run) for run in (packed, separate))
        calls = {"packed": packed, "separate": separate}
        times = interleaved(calls, cpu_clock, Plan(rounds=rounds, warm_ups=0))
        seconds = {name: summary(found) for name, found in times.items()}
        least = {name: found["cpu_s"]["least"] for name, found in seconds.items()}
        proportional = unique / flat * least["separate"]
        cases.append(
            {
                "shape": shape.name, "unique": unique, "flat": flat, "sharing": flat / unique,
                "seconds": seconds,
                "over_proportional": least["packed"] / proportional,
                "difference": {
                    "loss": abs(loss - other),
                    "gradient": float((ours - theirs).norm() / theirs.norm()),
                },
            }
        )  # fmt: skip
        print(cases[-1], flush=True)
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=default, help="folder of the JSON file")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of each")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "what": "seconds of the forward and backward passes of a TreePO step on one tree",
        "command": "OMP_NUM_THREADS=1 python benches/tree_update.py",
        "model": {**MODEL, "dtype": "float32"},
        "leaves": LEAVES,
        "seed": SEED,
        "rounds": arguments.rounds,
        **facts("cpu"),
        "cases": measure(arguments.rounds),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "tree_update.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
