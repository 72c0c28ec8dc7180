"""``dlm-fast evaluate``: how well, and how fast, a model solves a task; or how good answers are."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlm_fast.cli.arguments import parse, take_option
from dlm_fast.cli.chosen_model import ChosenModel, choose_model
from dlm_fast.cli.output import write, write_json
from dlm_fast.config import to_dict
from dlm_fast.rollout.sampler_config import SamplerConfig

if TYPE_CHECKING:
    from dlm_fast.rollout.trajectory import Trajectory

UNIMPORTANT = (
    "answers", "resume", "json", "batch_size", "score_threads", "max_checker_failures", "device",
)  # fmt: skip
"""options that change no answer, so that a resumed evaluation may have others"""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """dlm-fast evaluate MODEL: answers to a task's examples, scored by the task.

    MODEL is the directory of a checkpoint, or the folder of a run: its model is taken, and its task
    and rollout settings are the defaults. With --responses no model is needed.
    """

    task: str = "sudoku"
    """task by name, or path.py:function"""
    task_options: dict[str, Any] = field(default_factory=dict)
    """options of the task"""
    data: str | None = None
    """file of examples; None takes the task's own"""
    split: Literal["test", "train"] = "test"
    """which of the task's own examples"""
    num_examples: int = 0
    """the first so many examples; 0: all"""
    samples: int = 1
    """answers per example, for pass@k and maj@k"""
    rollout: SamplerConfig = field(default_factory=SamplerConfig)
    """how completions are sampled"""
    max_prompt_tokens: int = 0
    """longest prompt; 0: what the model's limit leaves beside rollout.max_new_tokens"""
    long_prompts: Literal["error", "drop", "truncate"] = "error"
    """longer prompts: stop, leave the example out, or cut the prompt's beginning"""
    seed: int = 0
    """seed of the draws and of the interval's bootstrap"""
    batch_size: int = 128
    """completions decoded together; changes memory and time, not the result"""
    score_threads: int = 4
    """threads that score while other answers are being decoded, for tasks that allow it"""
    max_checker_failures: float = 0.5
    """stop when the task's checker itself fails on more than this fraction of the answers"""
    device: str = "cpu"
    """where the model runs"""
    dtype: str = "float32"
    """type of the weights"""
    model_options: dict[str, Any] = field(default_factory=dict)
    """further options of dlm_fast.load, such as mask_id or max_length"""
    answers: str | None = None
    """write every answer to this JSONL file, and the result with all options to a JSON file beside
    it; None: into the run's folder evaluations/, if MODEL is a run"""
    resume: bool = False
    """go on with an evaluation that was killed: answers in the file's .partial are kept"""
    responses: str | None = None
    """score the answers of this file instead of a model's: JSONL, CSV or parquet with a column
    response or completion, besides the task's columns or a column example; or in the order of
    --data"""
    response_column: str | None = None
    """column of --responses that holds the answers, where it has another name"""
    verdict_column: str | None = None
    """column of --responses with another checker's verdict, to compare; None: correct_by_d1,
    cell_accuracy_by_d1 or correct, if there is one"""
    json: bool = False
    """print the result as JSON for programs"""

    def __post_init__(self) -> None:
        for name, least in (
            ("num_examples", 0), ("max_prompt_tokens", 0), ("score_threads", 0), ("seed", 0),
            ("batch_size", 1), ("samples", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(f"{option} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.max_checker_failures <= 1:
            raise ValueError(
                f"--max-checker-failures must be from 0 to 1, got {self.max_checker_failures}"
            )
        if self.responses is None and (self.response_column or self.verdict_column):
            raise ValueError("--response-column and --verdict-column need --responses FILE")
        if self.samples > 1 and not self.rollout.temperature and self.rollout.rule != "random":
            raise ValueError(
                f"--samples {self.samples} with rollout.temperature=0 would give the same answer "
                f"{self.samples} times; set --rollout.temperature"
            )


def run(argv: list[str]) -> int:
    modelless = not argv or argv[0].startswith("-")
    if modelless and take_option(argv, "--responses")[0] is not None:
        return _score_responses(_options(ChosenModel(path=""), list(argv)))
    chosen, words = choose_model(argv, "dlm-fast evaluate")
    options = _options(chosen, words)
    if options.responses is not None:
        raise ValueError(f"--responses scores answers without a model: leave {argv[0]} out")

    from dlm_fast import tasks
    from dlm_fast.training.answers import AnswerFile, summarise

    task = tasks.get(options.task, **options.task_options)
    path = _answers_path(options, chosen)
    work = _Work(options, chosen, task, AnswerFile(path) if path is not None else None)
    rows = work.run()
    summary = summarise(rows, options.seed)
    summary["seconds"] = work.seconds
    if work.seconds > 0:
        summary["tokens_per_second"] = work.tokens / work.seconds
    summary["score_wait_s"] = work.waited_s
    summary["prompts"] = work.prompt_counts
    summary["metrics"] = task_metrics(task, rows)
    summary["data"] = options.data or f"{task.name}, {options.split} split"
    summary["model"] = chosen.path
    if path is not None:
        summary["answers"] = str(path)
        # beside the answers: how they were made
        beside = path.with_name(f"{path.stem}.summary.json")
        write_json(str(beside), {**summary, "options": to_dict(options)})
    _show(summary, options.json)
    return 0


def _score_responses(options: EvaluateOptions) -> int:
    from dlm_fast.cli.evaluate_responses import score_responses

    summary = score_responses(options)
    if options.answers is not None:
        beside = Path(options.answers).with_name(f"{Path(options.answers).stem}.summary.json")
        write_json(str(beside), {**summary, "options": to_dict(options)})
    _show(summary, options.json)
    return 0


def _show(summary: dict[str, Any], as_json: bool) -> None:
    from dlm_fast.cli.evaluate_report import report

    write(json.dumps(summary, indent=2, ensure_ascii=False) if as_json else report(summary))


def _options(chosen: ChosenModel, words: list[str]) -> EvaluateOptions:
    from dlm_fast.tasks.registry import config_type

    task = take_option(words, "--task")[0] or chosen.task or "sudoku"
    # options of the run's task mean nothing to another task
    kept = chosen.task_options if task == chosen.task else {}
    default = EvaluateOptions(
        task=task,
        task_options=kept,
        rollout=chosen.rollout,
        model_options=chosen.model_options,
    )
    return parse(
        EvaluateOptions,
        words,
        prog="dlm-fast evaluate MODEL",
        default=default,
        groups={"task_options": config_type(task)},
    )


def task_metrics(task: Any, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The task's own numbers over scored rows."""
    from dlm_fast.tasks import Score

    if not hasattr(task, "metrics"):
        return {}
    return task.metrics([Score(row["reward"], row["correct"], row["detail"]) for row in rows])


def _answers_path(options: EvaluateOptions, chosen: ChosenModel) -> Path | None:
    if options.answers is not None:
        return Path(options.answers)
    if chosen.run_dir is None:
        return None
    name = Path(options.data).stem if options.data else f"{Path(options.task).stem}-{options.split}"
    return chosen.run_dir / "evaluations" / f"{name}.jsonl"


class _Work:
    """One evaluation with a model: which answers are missing, decoding them, keeping them."""

    def __init__(self, options: EvaluateOptions, chosen: ChosenModel, task: Any, file: Any) -> None:
        self.options, self.chosen, self.task, self.file = options, chosen, task, file
        self.seconds = self.waited_s = 0.0
        self.tokens = 0
        """decoded by this process, in so many seconds"""
        self.prompt_counts: dict[str, int] = {}

    def run(self) -> list[dict[str, Any]]:
        """All answers, in the order of the examples."""
        from dlm_fast.models.load import load
        from dlm_fast.training.prompts import PromptEncoder

        options = self.options
        examples = list(_first(self.task.load(options.data, options.split), options.num_examples))
        if not examples:
            raise ValueError("no examples to evaluate on: the file or the task gave an empty list")
        policy = load(
            self.chosen.path,
            dtype=options.dtype,
            device=options.device,
            **options.model_options,
        )
        limits = options.max_prompt_tokens, options.long_prompts
        prompts = PromptEncoder(policy, self.task, options.rollout.max_new_tokens, *limits)
        kept = prompts.keep(examples, options.data, "--data")
        wanted = [(i, s) for i in kept for s in range(options.samples)]
        rows: list[dict[str, Any]] = []
        if self.file is not None:
            rows = self.file.open(self._fingerprint(), resume=options.resume)
        try:
            there = {(row["index"], row["sample"]) for row in rows}
            missing = [pair for pair in wanted if pair not in there]
            for part in self._parts(missing):
                self._decode(policy, prompts, examples, part, rows, len(wanted))
            self._refuse_broken_checker(rows, len(wanted))
        except BaseException:
            if self.file is not None:
                self.file.close()
            raise
        rows.sort(key=lambda row: (row["index"], row["sample"]))
        if self.file is not None:
            self.file.finish(rows)
        dropped = len(examples) - len(kept)
        self.prompt_counts = {"dropped": dropped, "truncated": prompts.truncated}
        return rows

    def _parts(self, missing: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """What is decoded before its verdicts are written: all at once where verdicts come beside
        the decoding, else a batch, so that a kill costs no more."""
        size = self.options.batch_size
        if self.options.score_threads and getattr(self.task, "thread_safe", False):
            size = max(1, len(missing))
        return [missing[start : start + size] for start in range(0, len(missing), size)]

    def _fingerprint(self) -> dict[str, Any]:
        kept = {k: v for k, v in to_dict(self.options).items() if k not in UNIMPORTANT}
        return {"model": self.chosen.path, **kept}

    def _decode(
        self,
        policy: Any,
        prompts: Any,
        examples: Sequence[Any],
        missing: Sequence[tuple[int, int]],
        rows: list[dict[str, Any]],
        total: int,
    ) -> None:
        """Appends the missing answers to ``rows`` and to the file, each when it is scored."""
        from dlm_fast.training.answers import decoding_columns, verdict_columns
        from dlm_fast.training.evaluate import evaluation_id
        from dlm_fast.training.scored_rollouts import sample_scored

        failures = sum("checker_error" in row["detail"] for row in rows)

        def keep(number: int, trajectory: Trajectory) -> None:
            nonlocal failures
            index, sample = missing[number]
            row = {
                "index": index,
                "sample": sample,
                "example": dict(examples[index]),
                "prompt": self.task.prompt(examples[index]),
                "completion": trajectory.text,
                **verdict_columns(trajectory),
                **decoding_columns(trajectory, policy.family.eos_ids),
            }
            rows.append(row)
            self.tokens += row["tokens"]
            if self.file is not None:
                self.file.add(row)
            failures += "checker_error" in trajectory.detail
            if failures > self.options.max_checker_failures * total:
                self._refuse_broken_checker(rows, total)

        encoded = {index: prompts.encode(examples[index]) for index, _ in missing}
        started = time.monotonic()
        found = sample_scored(
            policy,
            self.task,
            [encoded[index] for index, _ in missing],
            [examples[index] for index, _ in missing],
            self.options.rollout,
            seed=self.options.seed,
            sequence_ids=[evaluation_id(*pair) for pair in missing],
            max_batch=self.options.batch_size,
            threads=self.options.score_threads,
            on_scored=keep,
        )
        self.seconds += time.monotonic() - started
        self.waited_s += found.waited_s

    def _refuse_broken_checker(self, rows: Sequence[dict[str, Any]], total: int) -> None:
        from dlm_fast.tasks import CheckerError, Score, refuse_broken_checker

        scores = [Score(row["reward"], row["correct"], row["detail"]) for row in rows]
        failures = sum("checker_error" in score.detail for score in scores)
        limit = self.options.max_checker_failures
        try:
            refuse_broken_checker(self.task, failures, total, limit, scores)
        except CheckerError as error:
            kept = f"; {len(rows)} answers are in {self.file.partial}" if self.file else ""
            raise CheckerError(f"{error}{kept}") from None


def _first(examples: Sequence[Any], count: int) -> Sequence[Any]:
    return examples if count == 0 else [examples[i] for i in range(min(count, len(examples)))]
