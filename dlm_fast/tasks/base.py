"""What a task is: examples in, prompts out, completions scored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

Example = Mapping[str, Any]


@dataclass(frozen=True)
class Score:
    """The verdict on one completion."""

    reward: float
    """what the training maximises"""
    correct: bool
    """whether the task is solved; what evaluations count"""
    detail: dict[str, Any] = field(default_factory=dict)
    """how the verdict came about; `checker_error` holds the reason when the checker failed"""


@runtime_checkable
class Task(Protocol):
    """Data, prompts and rewards of one kind of problem.

    With an attribute `thread_safe = True` a task says that it may score in several threads at once.
    A method `example(row)`, from a table's `Row` to an example, lets files of answers carry their
    own examples. A method `trace(example)` gives the beginning of a right completion, of which
    rollouts may be given pieces; without it they are pieces of the demonstration.
    """

    @property
    def name(self) -> str:
        """the name `tasks.get` knows it by"""
        ...

    def load(self, path: str | None, split: str) -> Sequence[Example]:
        """Examples of a file, or generated ones of the split ("train" or "test") without a path.

        A file is read whole, whatever the split: which file trains and which one tests is the
        caller's word.
        """
        ...

    def prompt(self, example: Example) -> str:
        """The text a model is asked to complete."""
        ...

    def score(self, completion: str, example: Example) -> Score:
        """Judge a completion. Any text is legal; only a broken checker or example raises."""
        ...

    def demonstration(self, example: Example) -> str:
        """A completion to imitate. ValueError where the task has none."""
        ...

    def metrics(self, scores: Sequence[Score]) -> dict[str, float]:
        """Means over a batch that the task adds to reward and correctness, under bare names."""
        ...


@runtime_checkable
class BatchTask(Protocol):
    """A task whose checker wants the whole batch at once."""

    def score_many(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Score]:
        """As `score`, one verdict per completion; raises if the checker fails on any of them."""
        ...


def mean_details(scores: Iterable[Score], *names: str) -> dict[str, float]:
    """Mean of numeric or boolean details over the scores that have them; 0 when none has."""
    scores = list(scores)
    means = {}
    for name in names:
        values = [float(score.detail[name]) for score in scores if name in score.detail]
        means[name] = sum(values) / len(values) if values else 0.0
    return means


def check_split(split: str) -> None:
    """Raise on anything but the two splits."""
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')


def field_of(example: Example, name: str, task: str) -> Any:
    """A field every example of the task must have."""
    try:
        return example[name]
    except KeyError:
        raise ValueError(
            f"a {task} example needs the field {name!r}, got fields {sorted(example)}; "
            f"load it with tasks.get({task!r}).load(path, split)"
        ) from None
