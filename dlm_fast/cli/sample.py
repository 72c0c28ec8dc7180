"""``dlm-fast sample``: prints completions of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from dlm_fast.cli.arguments import parse, take_option
from dlm_fast.cli.chosen_model import ChosenModel, choose_model
from dlm_fast.cli.output import write
from dlm_fast.rollout.sampler_config import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """dlm-fast sample MODEL [PROMPT ...]: completions of prompts, or of a task's examples.

    MODEL is the directory of a checkpoint, or the folder of a run: its model is taken, and its task
    and rollout settings are the defaults.
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


def run(argv: list[str]) -> int:
    chosen, words = choose_model(argv, "dlm-fast sample")
    options = _options(chosen, words)
    prompts = [*options.prompts, *_lines(options.prompt_file)]
    if not prompts and options.task is None:
        raise ValueError('nothing to complete: add prompts, as in "What is 2+2?", or --task')

    from dlm_fast import tasks
    from dlm_fast.models.load import load
    from dlm_fast.rollout import sample

    task, examples = None, []
    if not prompts:
        assert options.task is not None
        task = tasks.get(options.task, **options.task_options)
        loaded = task.load(options.data, options.split)
        examples = [loaded[i] for i in range(min(options.num_examples, len(loaded)))]
        prompts = [task.prompt(example) for example in examples]
    policy = load(chosen.path, dtype=options.dtype, device=options.device, **options.model_options)
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
        if task is not None:
            score = task.score(row["completion"], examples[index])
            row |= {"reward": score.reward, "correct": score.correct}
        write(json.dumps(row, ensure_ascii=False) if options.json else _text(row))
    return 0


def _options(chosen: ChosenModel, words: list[str]) -> SampleOptions:
    from dlm_fast.tasks.registry import config_type

    task = take_option(words, "--task")[0] or chosen.task
    kept = chosen.task_options if task == chosen.task else {}
    default = SampleOptions(
        task=task,
        task_options=kept,
        rollout=chosen.rollout,
        model_options=chosen.model_options,
    )
    return parse(
        SampleOptions,
        words,
        prog="dlm-fast sample MODEL",
        default=default,
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
