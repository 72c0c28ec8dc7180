"""``dlm-fast sample``: prints completions of a model, or trees of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from dlm_fast.cli.arguments import parse, take_option
from dlm_fast.cli.chosen_model import ChosenModel, choose_model
from dlm_fast.cli.output import write
from dlm_fast.cli.tree_report import Scorer, write_trees
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.tree_config import TreeConfig


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """dlm-fast sample MODEL [PROMPT ...]: completions of prompts, or of a task's examples.

    MODEL is the directory of a checkpoint, or the folder of a run: its model is taken, and its task
    and rollout settings are the defaults. --tree draws trees of completions instead:
    dlm-fast sample MODEL --tree --help.
    """

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """texts to complete; none: examples of the task"""
    prompt_file: str | None = None
    """file with one prompt per line, besides those above"""
    task: str | None = None
    """task whose examples are completed and scored, if there are no prompts"""
    task_options: dict[str, Any] = field(default_factory=dict)
    """options of the task"""
    data: str | None = None
    """file of examples; None takes the task's own"""
    split: Literal["test", "train"] = "test"
    """which of the task's own examples"""
    num_examples: int = 4
    """examples of the task"""
    num_samples: int = 1
    """completions of each prompt"""
    rollout: SamplerConfig = field(default_factory=SamplerConfig)
    """how completions are sampled"""
    chat: bool = True
    """use the tokenizer's chat template, if it has one"""
    seed: int = 0
    """seed of the draws"""
    batch_size: int = 32
    """completions decoded together; changes memory and time, not the result"""
    device: str = "cpu"
    """where the model runs"""
    dtype: str = "float32"
    """type of the weights"""
    model_options: dict[str, Any] = field(default_factory=dict)
    """further options of dlm_fast.load, such as mask_id or max_length"""
    json: bool = False
    """print one JSON object per completion, for programs"""

    def __post_init__(self) -> None:
        for name in ("num_examples", "num_samples", "batch_size"):
            if getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TreeOptions(SampleOptions):
    """dlm-fast sample MODEL --tree [PROMPT ...]: a tree of completions of each prompt.

    Prints each tree and writes it as JSON and as a drawing (HTML). MODEL is the directory of a
    checkpoint, or the folder of a run, whose settings are the defaults.
    """

    tree: TreeConfig = field(default_factory=TreeConfig)
    """how trees grow"""
    tree_dir: str | None = None
    """folder for tree_0.json, tree_0.html and so on; none: trees/ in the run's folder, or here"""


def run(argv: list[str]) -> int:
    chosen, words = choose_model(argv, "dlm-fast sample")
    wants_trees = "--tree" in words
    options = _options(chosen, [word for word in words if word != "--tree"], wants_trees)
    prompts = [*options.prompts, *_lines(options.prompt_file)]
    if not prompts and options.task is None:
        raise ValueError('nothing to complete: add prompts, as in "What is 2+2?", or --task')

    from dlm_fast import tasks
    from dlm_fast.models.load import load

    task, examples = None, []
    if not prompts:
        assert options.task is not None
        task = tasks.get(options.task, **options.task_options)
        loaded = task.load(options.data, options.split)
        examples = [loaded[i] for i in range(min(options.num_examples, len(loaded)))]
        prompts = [task.prompt(example) for example in examples]
    policy = load(chosen.path, dtype=options.dtype, device=options.device, **options.model_options)
    scores: list[Scorer] | None = None
    if task is not None:
        scores = [partial(task.score, example=example) for example in examples]
    if isinstance(options, TreeOptions):
        folder = Path(options.tree_dir or (chosen.run_dir or Path()) / "trees")
        write_trees(policy, prompts, options, scores, folder)
    else:
        _write_completions(policy, prompts, options, scores)
    return 0


def _write_completions(
    policy: Any, prompts: list[str], options: SampleOptions, scores: list[Scorer] | None
) -> None:
    from dlm_fast.rollout import sample

    encoded = [policy.encode(prompt, chat=options.chat) for prompt in prompts]
    trajectories = sample(
        policy,
        [ids for ids in encoded for _ in range(options.num_samples)],
        options.rollout,
        seed=options.seed,
        max_batch=options.batch_size,
    )
    for number, trajectory in enumerate(trajectories):
        index = number // options.num_samples
        row: dict[str, Any] = {
            "prompt": prompts[index],
            "completion": policy.decode(trajectory.response_ids),
            "tokens": trajectory.response_length,
            "forwards": trajectory.num_forwards,
        }
        if scores is not None:
            score = scores[index](row["completion"])
            row |= {"reward": score.reward, "correct": score.correct}
        write(json.dumps(row, ensure_ascii=False) if options.json else _text(row))


def _options(chosen: ChosenModel, words: list[str], wants_trees: bool) -> SampleOptions:
    from dlm_fast.tasks.registry import config_type

    task = take_option(words, "--task")[0] or chosen.task
    kept = chosen.task_options if task == chosen.task else {}
    defaults: dict[str, Any] = {
        "task": task,
        "task_options": kept,
        "rollout": chosen.rollout,
        "model_options": chosen.model_options,
    }
    if wants_trees:
        defaults["tree"] = chosen.tree
    made = TreeOptions if wants_trees else SampleOptions
    return parse(
        made,
        words,
        prog="dlm-fast sample MODEL --tree" if wants_trees else "dlm-fast sample MODEL",
        default=made(**defaults),
        groups={"task_options": config_type(task)} if task else {},
    )


def _lines(path: str | None) -> Iterator[str]:
    if path is None:
        return
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompt-file {path}: {error}") from error
    yield from filter(None, map(str.strip, text.splitlines()))


def _text(row: dict[str, Any]) -> str:
    facts = f"{row['tokens']} tokens, {row['forwards']} forwards"
    if "reward" in row:
        facts += f", reward {row['reward']:.3g}, {'correct' if row['correct'] else 'wrong'}"
    return f"{row['prompt']}\n>> {row['completion']}\n   ({facts})\n"
