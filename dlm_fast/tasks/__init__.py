"""The tasks layer: data, prompts, rewards. Knows no tensors; imports the standard library only."""

from .base import Example, Score, Task
from .code import CodeConfig
from .countdown import CountdownConfig
from .custom import CustomConfig
from .math_task import MathConfig
from .registry import TaskConfig, config_type, get, make
from .score_stream import ScoreStream
from .scoring import CheckerError, ScoringReport, refuse_broken_checker, score_batch
from .sudoku import SudokuConfig

__all__ = [
    "get",
    "make",
    "config_type",
    "score_batch",
    "ScoreStream",
    "refuse_broken_checker",
    "ScoringReport",
    "CheckerError",
    "Task",
    "Example",
    "Score",
    "TaskConfig",
    "SudokuConfig",
    "CountdownConfig",
    "MathConfig",
    "CodeConfig",
    "CustomConfig",
]
