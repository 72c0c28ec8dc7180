"""Tasks by name."""

from __future__ import annotations

from typing import Any

from .base import Task
from .code import Code, CodeConfig
from .countdown import Countdown, CountdownConfig
from .custom import CustomConfig, is_custom, make_custom
from .math_task import MathConfig, gsm8k_task, math_task
from .options import build, hint
from .sudoku import Sudoku, SudokuConfig

TaskConfig = SudokuConfig | CountdownConfig | MathConfig | CodeConfig | CustomConfig

TASKS: dict[str, tuple[type[TaskConfig], Any]] = {
    "sudoku": (SudokuConfig, Sudoku),
    "countdown": (CountdownConfig, Countdown),
    "gsm8k": (MathConfig, gsm8k_task),
    "math": (MathConfig, math_task),
    "code": (CodeConfig, Code),
}


def get(name: str, **options: Any) -> Task:
    """The task of a name, or of a user's reward function `path.py:function`.

    >>> get("sudoku", template="plain", max_empty=10).name
    'sudoku'
    """
    return make(name, build(config_type(name), options, name))


def make(name: str, config: TaskConfig) -> Task:
    """The task of a name with a ready config."""
    expected = config_type(name)
    if not isinstance(config, expected):
        raise TypeError(f"task {name} takes a {expected.__name__}, got {type(config).__name__}")
    if isinstance(config, CustomConfig):
        return make_custom(name, config)
    return TASKS[name][1](config)


def config_type(name: str) -> type[TaskConfig]:
    """The options of a task, a frozen dataclass; ValueError for an unknown name."""
    if is_custom(name):
        return CustomConfig
    if name in TASKS:
        return TASKS[name][0]
    raise ValueError(
        f"unknown task {name!r}; {hint(name, TASKS)} A reward function of your own is named "
        "path.py:function"
    )
