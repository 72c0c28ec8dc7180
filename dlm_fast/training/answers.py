"""Every answer of an evaluation: the rows of its JSONL file, their summary, a file safe to kill."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlm_fast.config import differences
from dlm_fast.rollout.trajectory import Trajectory
from dlm_fast.tasks import Score
from dlm_fast.training.answer_statistics import (
    Verdict,
    bootstrap_interval,
    counts_of_samples,
    majority_at_k,
    pass_at_k,
    wilson_interval,
)

AnswerRow = dict[str, Any]


def verdict_columns(score: Score | Trajectory) -> AnswerRow:
    """What a checker said, as columns."""
    return {
        "reward": float(score.reward),
        "correct": bool(score.correct),
        "answer": score.detail.get("answer"),
        "detail": dict(score.detail),
    }


def decoding_columns(trajectory: Trajectory, eos_ids: Sequence[int]) -> AnswerRow:
    """What the answer cost. Tokens count up to the first end of text, that one included: what
    follows fills the window."""
    ids = trajectory.response_ids.tolist()
    end = next((i + 1 for i, token in enumerate(ids) if token in eos_ids), len(ids))
    return {
        "tokens": end,
        "forwards": trajectory.num_forwards,
        "finish": trajectory.finish_reason,
        "seed": trajectory.seed,
        "sequence_id": trajectory.sequence_id,
    }


class AnswerFile:
    """Appends answers as they come and sorts them in the end.

    Until then they lie in ``NAME.partial``, one flushed line each behind a line with the options,
    so that a kill loses no more than the answers being decoded and ``resume`` finds the rest.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f"{path.name}.partial")

    def open(self, options: Mapping[str, Any], *, resume: bool) -> list[AnswerRow]:
        """Starts the file, or continues one with the same options; the rows that are there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._read(options) if resume and self.partial.exists() else []
        lines = [json.dumps({"options": dict(options)}, default=str), *map(_line, rows)]
        # written anew: a kill may have left half a line
        new = self.partial.with_name(f"{self.partial.name}.new")
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(new, self.partial)
        self._file = self.partial.open("a", encoding="utf-8")
        return rows

    def add(self, row: AnswerRow) -> None:
        """One answer, on disk before the next."""
        self._file.write(_line(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Leaves the file as it is, for ``resume``."""
        self._file.close()

    def finish(self, rows: Sequence[AnswerRow]) -> None:
        """The whole file, there at once or not at all."""
        self._file.close()
        write_answers(self.path, rows)
        self.partial.unlink()

    def _read(self, options: Mapping[str, Any]) -> list[AnswerRow]:
        lines = self.partial.read_text(encoding="utf-8").split("\n")
        values = [value for line in lines if (value := _parsed(line)) is not None]
        if not values or "options" not in values[0]:
            return []
        now = json.loads(json.dumps(dict(options), default=str))
        if changed := differences(values[0]["options"], now):
            raise ValueError(
                f"{self.partial} was made with other options ({'; '.join(changed)}): give the same "
                "ones, or leave --resume out to start anew"
            )
        return values[1:]


def write_answers(path: Path, rows: Sequence[AnswerRow]) -> None:
    """A JSONL file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(_line(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(new, path)


def _line(row: AnswerRow) -> str:
    # a completion may hold halves of characters that UTF-8 cannot write
    return json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()


def _parsed(line: str) -> AnswerRow | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None  # half a line, or the empty end
    return value if isinstance(value, dict) else None


def summarise(rows: Sequence[AnswerRow], seed: int) -> dict[str, Any]:
    """Numbers of an evaluation over all its answers; rows of one ``index`` answer one example."""
    by_example: dict[Any, list[AnswerRow]] = {}
    for row in rows:
        by_example.setdefault(row["index"], []).append(row)
    groups = list(by_example.values())
    fewest = min(map(len, groups))
    right = [sum(row["correct"] for row in group) for group in groups]
    accuracy = [c / len(group) for c, group in zip(right, groups, strict=True)]
    reward = [sum(row["reward"] for row in group) / len(group) for group in groups]
    verdicts = [
        [Verdict(correct=row["correct"], answer=row["answer"]) for row in group] for group in groups
    ]
    summary: dict[str, Any] = {
        "examples": len(groups),
        "samples": len(rows) / len(groups),
        "correct": _mean(accuracy),
        "correct_interval": list(bootstrap_interval(accuracy, seed)),
        "reward": _mean(reward),
        "reward_interval": list(bootstrap_interval(reward, seed)),
        "checker_failures": sum("checker_error" in row["detail"] for row in rows),
        "answered": _mean([row["answer"] is not None for row in rows]),
    }
    if len(rows) == len(groups):
        # the bootstrap's is a point where all or none are right
        summary["correct_wilson"] = list(wilson_interval(sum(right), len(rows)))
    if fewest > 1:
        for k in counts_of_samples(fewest):
            pairs = zip(groups, right, strict=True)
            summary[f"pass@{k}"] = _mean([pass_at_k(len(group), c, k) for group, c in pairs])
        if summary["answered"]:
            for k in counts_of_samples(fewest):
                summary[f"maj@{k}"] = _mean([majority_at_k(group, k) for group in verdicts])
    if all("forwards" in row for row in rows):
        tokens, forwards = (sum(row[name] for row in rows) for name in ("tokens", "forwards"))
        summary["response_tokens"] = tokens / len(rows)
        summary["forwards"] = forwards / len(rows)
        summary["tokens_per_step"] = tokens / forwards if forwards else 0.0
    return summary


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
