"""``dlm-fast evaluate --responses``: answers from a file, scored, compared with other verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_fast import tasks
from dlm_fast.cli.evaluate import task_metrics
from dlm_fast.tasks.disagreement import why
from dlm_fast.tasks.score_stream import ScoreStream
from dlm_fast.tasks.table import Row, read_table, shorten
from dlm_fast.training.answers import summarise, verdict_columns, write_answers

if TYPE_CHECKING:
    from dlm_fast.cli.evaluate import EvaluateOptions

RESPONSES = ("response", "completion", "responses", "completions", "generation", "output")
VERDICTS = ("correct_by_d1", "cell_accuracy_by_d1", "correct")
_PART = 64  # answers handed to the scoring threads at once
_CLOSE = 1e-6  # two graded verdicts this near agree


def score_responses(options: EvaluateOptions) -> dict[str, Any]:
    """The summary of a file of answers; writes them with their verdicts, if asked to."""
    assert options.responses is not None, "the caller has looked"
    task = tasks.get(options.task, **options.task_options)
    source = read_table(options.responses, repeated_ids=True)
    if options.num_examples:
        source = source[: options.num_examples]
    source, without_reference = _with_reference(source, options)
    column = _column(source, options.response_column, RESPONSES, "--response-column", "answers")
    examples = _examples(task, source, options)
    texts = [_text(row, column) for row in source]
    scores = _scored(task, texts, examples, options.score_threads)
    failures = sum("checker_error" in score.detail for score in scores)
    tasks.refuse_broken_checker(task, failures, len(scores), options.max_checker_failures, scores)
    rows = [
        {"index": index, "sample": number, "example": dict(example), "completion": text}
        | verdict_columns(score)
        for (index, number), example, text, score in zip(
            _places(source, examples), examples, texts, scores, strict=True
        )
    ]
    summary = summarise(rows, options.seed)
    summary["metrics"] = task_metrics(task, rows)
    summary["data"] = f"{len(rows)} answers of {options.responses}"
    if without_reference:
        summary["data"] += f" ({without_reference} more have no reference and are left out)"
    verdicts = _verdict_column(source, options.verdict_column)
    if verdicts is not None:
        summary["agreement"] = _agreement(task.name, source, rows, verdicts)
    if options.answers is not None:
        write_answers(Path(options.answers), rows)
        summary["answers"] = options.answers
    return summary


def _scored(
    task: Any, texts: Sequence[str], examples: Sequence[Any], threads: int
) -> list[tasks.Score]:
    with ScoreStream(task, threads=threads) as stream:
        for start in range(0, len(texts), _PART):
            part = range(start, min(start + _PART, len(texts)))
            stream.add(part, [texts[i] for i in part], [examples[i] for i in part])
        return stream.finish()


def _with_reference(source: list[Row], options: EvaluateOptions) -> tuple[list[Row], int]:
    """The rows that can be judged, and how many cannot: published files hold nulls as answers."""
    if options.data is not None or "example" in source[0].values:
        return source, 0  # the reference stands elsewhere
    kept = [row for row in source if row.values.get("answer", "") is not None]
    if not kept:
        raise ValueError(f"{options.responses}: every answer is null, so nothing can be judged")
    return kept, len(source) - len(kept)


def _examples(task: Any, source: Sequence[Row], options: EvaluateOptions) -> list[Any]:
    """What each answer is an answer to: the row's own example, a row of --data, or its columns."""
    if options.data is not None:
        data = task.load(options.data, options.split)
        if all("index" in row.values for row in source):
            return [data[_index(row, len(data), options.data)] for row in source]
        if len(data) != len(source) and not options.num_examples:
            raise ValueError(
                f"{options.responses} has {len(source)} answers and {options.data} {len(data)} "
                "examples; give the answers a column index, the number of the example from 0"
            )
        return [data[i] for i in range(len(source))]
    if all(isinstance(row.values.get("example"), Mapping) for row in source):
        return [row.values["example"] for row in source]
    return [task.example(row) for row in source]


def _index(row: Row, count: int, data: str) -> int:
    index = row.values["index"]
    if isinstance(index, str) and index.isdecimal():
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
        raise ValueError(f"{row.where}: index must lie in 0..{count - 1} ({data}), got {index!r}")
    return index


def _places(source: Sequence[Row], examples: Sequence[Any]) -> list[tuple[int, int]]:
    """(number of the example, number of its answer) of each row; equal examples are one."""
    first: dict[str, int] = {}
    seen: dict[int, int] = {}
    places = []
    for row, example in zip(source, examples, strict=True):
        own = row.values.get("index")
        key = json.dumps(example, sort_keys=True, default=str)
        index = own if isinstance(own, int) else first.setdefault(key, len(first))
        places.append((index, seen.get(index, 0)))
        seen[index] = seen.get(index, 0) + 1
    return places


def _column(
    source: Sequence[Row], named: str | None, known: Sequence[str], option: str, what: str
) -> str:
    have = source[0].values
    column = named or next((name for name in known if name in have), None)
    if column is None or column not in have:
        looked = named or ", ".join(known)
        raise ValueError(
            f"{source[0].where}: no column with the {what} (looked for {looked}); the row has "
            f"{', '.join(map(str, have))}; name yours with {option}"
        )
    return column


def _text(row: Row, column: str) -> str:
    text = row.values.get(column)
    if not isinstance(text, str):
        raise ValueError(f"{row.where}: {column} must be a text, got {shorten(text)}")
    return text


def _verdict_column(source: Sequence[Row], named: str | None) -> str | None:
    if named is None and not any(name in source[0].values for name in VERDICTS):
        return None
    return _column(source, named, VERDICTS, "--verdict-column", "verdicts")


def _agreement(
    task: str, source: Sequence[Row], rows: Sequence[dict[str, Any]], column: str
) -> dict[str, Any]:
    """How often the verdicts agree, and every case in which they do not.

    Verdicts of 0 and 1, or true and false, are compared with `correct`, others with the reward.
    """
    theirs = [_number(row, column) for row in source]
    binary = set(theirs) <= {0.0, 1.0}
    ours = [float(row["correct"]) if binary else row["reward"] for row in rows]
    differ = [i for i in range(len(rows)) if abs(ours[i] - theirs[i]) > _CLOSE]
    return {
        "column": column,
        "compared": "correct" if binary else "reward",
        "rows": len(rows),
        "agree": len(rows) - len(differ),
        "fraction": (len(rows) - len(differ)) / len(rows),
        "ours": sum(ours) / len(rows),
        "theirs": sum(theirs) / len(rows),
        "disagreements": [
            {
                "where": source[i].where,
                "ours": ours[i],
                "theirs": theirs[i],
                "answer": rows[i]["answer"],
                "found": rows[i]["detail"].get("found", rows[i]["answer"]),
                "reference": _reference(rows[i]["example"]),
                "reason": _reason(task, rows[i]),
                "end": rows[i]["completion"][-200:],
            }
            for i in differ
        ],
    }


def _number(row: Row, column: str) -> float:
    value = row.values.get(column)
    words = {"true": 1.0, "false": 0.0}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(
            f"{row.where}: {column} must be a verdict (true, false or a number), "
            f"got {shorten(value)}"
        ) from None


def _reference(example: Mapping[str, Any]) -> str:
    """What the right answer is, as the example says it."""
    for names in (("answer",), ("solution",), ("numbers", "target")):
        if all(name in example for name in names):
            values = [example[name] for name in names]
            text = values[0] if len(values) == 1 and isinstance(values[0], str) else str(values)
            return text if len(text) <= 80 else text[:77] + "..."
    return shorten({k: v for k, v in example.items() if k not in ("prompt", "question")}, 80)


def _reason(task: str, row: Mapping[str, Any]) -> str:
    """Why the other verdict is not ours; else the short entries of our verdict's detail."""
    detail, example = row["detail"], row["example"]
    if "reason" in detail:
        return str(detail["reason"])
    known = why(task, row["completion"], str(example.get("answer", "")), row)
    parts = (f"{k}={v}" for k, v in detail.items() if k != "answer" and len(str(v)) <= 40)
    return known or ", ".join(parts)
