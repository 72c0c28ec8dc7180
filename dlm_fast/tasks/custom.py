"""Tasks from a user's own file, `path.py:function`: the function is the reward.

The file is the user's code and is executed as such, in this process and without limits. Two kinds
of functions are accepted:

    def reward(completion, example): ...            -> float, bool or Score
    def reward(prompts, completions, **columns):    -> list of floats, one each (TRL's convention)

Data come from a file; each row is one example, and the TRL kind gets every column as a list.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .base import Example, Score, check_split, field_of
from .options import hint
from .table import Row, pick_fields, read_table, shorten
from .templates import Template, own_or, shot_rows, shots_text

COLUMNS = {"prompt": ("prompt", "question", "problem")}
COMPLETION_COLUMNS = ("completion", "demonstration")


@dataclass(frozen=True, kw_only=True)
class CustomConfig:
    """A task from a user's own file."""

    correct_at: float = 1.0
    """rewards of at least this count as solved"""
    conversational: bool = False
    """hand prompts and completions to the function as lists of messages, {"role", "content"}, as
    TRL does for chat data; rows whose prompt is such a list turn it on for themselves"""
    prompt_template: str = ""
    """the prompt with a row's columns by name, as in "{question} Answer:": the text, or a file
    whose name ends in .txt; without it, a column holds the prompt"""
    shots: str = ""
    """examples with their answers before each prompt: a data file with a column completion, or a
    JSON list of objects"""
    thread_safe: bool = False
    """score in threads while other completions are still being decoded: only for a function that
    may run several times at once. One that takes lists is then called with parts of the batch"""
    columns: dict[str, str] = field(default_factory=dict)
    """column of the data file that holds the field prompt, where it is named otherwise"""


@dataclass(frozen=True)
class Custom:
    """The task; `tasks.get("path.py:function")` makes one."""

    function: Callable[..., Any]
    config: CustomConfig
    name: str

    @property
    def thread_safe(self) -> bool:
        """as the config says: the function is not ours"""
        return self.config.thread_safe

    def __post_init__(self) -> None:
        # read and checked when the task is made, not at the first prompt of a run
        _ = self._template.fields(), self._shots

    def load(self, path: str | None, split: str) -> Sequence[Example]:
        """The rows of a file, all their columns, with the text to complete under `prompt`."""
        check_split(split)
        if path is None:
            raise ValueError(
                f"task {self.name} generates no data: give a JSONL, CSV or parquet file whose rows "
                "have a prompt"
            )
        return [self.example(row) for row in read_table(path)]

    def example(self, row: Row) -> Example:
        """A row with its prompt."""
        if not self.config.prompt_template:
            return row.values | pick_fields(row, COLUMNS, self.config.columns, "custom")
        try:
            return row.values | {"prompt": self._template.fill(row.values)}
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None

    def prompt(self, example: Example) -> str:
        """The row's prompt behind the few-shot examples; of a list of messages, their contents."""
        prompt = field_of(example, "prompt", self.name)
        if isinstance(prompt, str):
            return self._shots + prompt
        if _is_chat(prompt):
            return self._shots + "\n\n".join(str(message["content"]) for message in prompt)
        raise ValueError(
            f"task {self.name}: a prompt must be a text or a list of messages, "
            f"got {shorten(prompt)}"
        )

    def demonstration(self, example: Example) -> str:
        """The row's own completion, where the file has one."""
        for column in COMPLETION_COLUMNS:
            if isinstance(example.get(column), str):
                return example[column]
        raise ValueError(
            f"task {self.name} has no demonstrations: the data file needs a column "
            f"{' or '.join(COMPLETION_COLUMNS)}"
        )

    def score(self, completion: str, example: Example) -> Score:
        """The function's verdict; what it raises passes through."""
        if _takes_batches(self.function):
            return self.score_many([completion], [example])[0]
        return self._verdict(self.function(completion, dict(example)))

    def score_many(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Score]:
        """One call for the whole batch where the function takes batches."""
        if not _takes_batches(self.function):
            return [self.score(*pair) for pair in zip(completions, examples, strict=True)]
        arguments = self._columns(completions, examples)
        rewards = self.function(**_accepted(self.function, arguments))
        if isinstance(rewards, str) or not hasattr(rewards, "__len__"):
            raise TypeError(
                f"{self.name} must return a list of {len(completions)} numbers, "
                f"got {type(rewards).__name__} {shorten(rewards)}"
            )
        if len(rewards) != len(completions):
            raise ValueError(
                f"{self.name} returned {len(rewards)} rewards for {len(completions)} completions"
            )
        return [self._verdict(reward) for reward in rewards]

    def metrics(self, scores: Sequence[Score]) -> dict[str, float]:
        """None beyond reward and correctness."""
        return {}

    @cached_property
    def _template(self) -> Template:
        return own_or(self.config.prompt_template, "", "custom.prompt_template")

    @cached_property
    def _shots(self) -> str:
        examples = [self.example(row) for row in shot_rows(self.config.shots, "custom.shots")]
        return shots_text((str(e["prompt"]), self.demonstration(e)) for e in examples)

    def _columns(self, completions: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
        arguments: dict[str, Any] = {"prompts": [], "completions": []}
        for completion, example in zip(completions, examples, strict=True):
            prompt = field_of(example, "prompt", self.name)
            if self.config.conversational or _is_chat(prompt):
                if isinstance(prompt, str):
                    prompt = [{"role": "user", "content": prompt}]
                arguments["completions"].append([{"role": "assistant", "content": completion}])
            else:
                arguments["completions"].append(completion)
            arguments["prompts"].append(prompt)
        names = dict.fromkeys(name for example in examples for name in example)
        for name in names:
            if name not in ("prompt", "prompts", "completion", "completions"):
                arguments[name] = [example.get(name) for example in examples]
        return arguments

    def _verdict(self, reward: Any) -> Score:
        if isinstance(reward, Score):
            return reward
        try:
            # float() also takes the zero-dimensional arrays and tensors that users return.
            if reward is None or isinstance(reward, str):
                raise TypeError
            value = float(reward)
        except (TypeError, ValueError):
            raise TypeError(
                f"{self.name} must give a number for each completion, got {shorten(reward)}"
            ) from None
        if not math.isfinite(value):
            raise ValueError(f"{self.name} gave the reward {value}; rewards must be finite")
        return Score(value, value >= self.config.correct_at)


def is_custom(name: str) -> bool:
    """Whether a task name means a file of the user's."""
    return name.endswith(".py") or ".py:" in name


def make_custom(name: str, config: CustomConfig) -> Custom:
    """The task of `path.py:function`; ValueError names what is wrong with it."""
    path_text, colon, function_name = name.rpartition(":")
    if not colon or not path_text.endswith(".py") or not function_name:
        raise ValueError(f"a custom task reads path.py:function, got {name!r}")
    path = Path(path_text)
    if not path.is_file():
        raise ValueError(f"task {name}: no file {path} (looked in {Path.cwd()})")
    module = _execute(path.resolve(), name)
    function = getattr(module, function_name, None)
    if not callable(function):
        have = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        suggestion = hint(function_name, have) if have else "it defines none"
        raise ValueError(f"task {name}: {path} has no function {function_name}; {suggestion}")
    _check_signature(function, name)
    return Custom(function, config, f"{path.name}:{function_name}")


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list | tuple)
        and len(prompt) > 0
        and all(isinstance(message, dict) and "content" in message for message in prompt)
    )


def _execute(path: Path, name: str) -> Any:
    # A name of its own per path: two files reward.py of different folders must not meet.
    module_name = f"_dlm_fast_task_{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(f"task {name}: {path} fails when run: {error!r}") from error
    return module


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


def _takes_batches(function: Callable[..., Any]) -> bool:
    parameters = _parameters(function)
    only_keywords = [parameter.kind for parameter in parameters] == [inspect.Parameter.VAR_KEYWORD]
    return only_keywords or any(parameter.name == "completions" for parameter in parameters)


def _check_signature(function: Callable[..., Any], name: str) -> None:
    try:
        if _takes_batches(function):
            return
        inspect.signature(function).bind("completion", {})
    except (TypeError, ValueError):
        raise ValueError(
            f"task {name}: the function must take (completion, example), or (completions, ...) "
            "with lists as TRL's reward functions do"
        ) from None


def _accepted(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    # TRL's functions usually end in **kwargs; one that does not gets what it names.
    parameters = _parameters(function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return arguments
    names = {parameter.name for parameter in parameters}
    return {name: value for name, value in arguments.items() if name in names}
