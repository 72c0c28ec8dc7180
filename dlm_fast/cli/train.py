"""``dlm-fast train``: from words and a YAML file to a run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_fast.cli.arguments import parse, read_config, take_option
from dlm_fast.cli.output import write
from dlm_fast.config import from_dict, suggest, to_yaml

if TYPE_CHECKING:
    from dlm_fast.training.run_config import RunConfig

PLANNED = ("unmasking-policy",)

HELP = """A tiny model learns 4x4 Sudoku on a CPU: supervised warm start, then BGPO.

That is the demonstration, without further words. To train a model of yours, name an algorithm:
  dlm-fast train {algorithms} [OPTIONS]      all of them: dlm-fast train bgpo --help
  dlm-fast train --config FILE [OPTIONS]   options of a YAML file; those given here win
  dlm-fast train --resume --run-dir RUN    continue a run with its own options

With --print-config, it prints all options as YAML and stops."""


def run(argv: list[str]) -> int:
    logger = logging.getLogger("dlm_fast")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        return _run(argv)
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _run(argv: list[str]) -> int:
    algorithm, words = _algorithm(argv)
    print_config = "--print-config" in words
    words = [word for word in words if word != "--print-config"]
    base = _base(words)
    if algorithm is None and base is None:
        return _demonstrate(words, print_config)
    config = resolve(algorithm, words, base)
    if print_config:
        sys.stdout.write(to_yaml(config))
        return 0
    from dlm_fast.training.run import train

    return _status(train(config))


def resolve(algorithm: str | None, argv: list[str], base: dict[str, Any] | None) -> RunConfig:
    """The options of a run: defaults, then a file, then the command line."""
    from dlm_fast.tasks.registry import config_type
    from dlm_fast.training.run_config import run_config_type

    _, words = take_option(argv, "--config")
    base = dict(base or {})
    named = base.pop("name", None)
    if algorithm and named and algorithm != named:
        raise ValueError(f"the command says {algorithm}, but the file was made for {named}")
    if not (algorithm or named):
        raise ValueError("neither the command nor the file names an algorithm: add one, as in bgpo")
    name = _known(str(algorithm or named))
    cls = run_config_type(name)
    base.pop("resume", None)
    default = from_dict(base, cls)
    task = take_option(words, "--task")[0] or default.task
    groups: dict[str, type] = {"task_options": config_type(task)}
    model = take_option(words, "--model")[0] or default.model
    asked = any(w.startswith(("--model-options", "--model_options", "-h", "--help")) for w in words)
    if model == "tiny" and asked:
        from dlm_fast.models.tiny import TinyConfig

        groups["model_options"] = TinyConfig
    return parse(
        cls,
        words,
        prog=f"dlm-fast train {name}",
        default=default,
        hidden=("name",),
        groups=groups,
    )


def _algorithm(argv: list[str]) -> tuple[str | None, list[str]]:
    if not argv or argv[0].startswith("-"):
        return None, argv
    return _known(argv[0]), argv[1:]


def _known(name: str) -> str:
    from dlm_fast.training.run_config import ALGORITHMS

    if name in ALGORITHMS:
        return name
    there = ", ".join(ALGORITHMS)
    if name in PLANNED:
        raise ValueError(f"{name} is not in this version yet; it has {there}")
    hint = suggest(name, [*ALGORITHMS, *PLANNED])
    raise ValueError(f"unknown algorithm {name!r}{hint or f'; there are {there}'}")


def _base(words: list[str]) -> dict[str, Any] | None:
    """Options of --config, or those of the run that --resume continues."""
    path, _ = take_option(words, "--config")
    if path is not None:
        return read_config(path)
    folder, _ = take_option(words, "--run-dir")
    if "--resume" in words and folder is not None and (Path(folder) / "config.yaml").is_file():
        return read_config(folder)
    return None


def _demonstrate(words: list[str], print_config: bool) -> int:
    from dlm_fast.training import demonstration
    from dlm_fast.training.run_config import ALGORITHMS

    config = parse(
        demonstration.DemonstrationConfig,
        words,
        prog="dlm-fast train",
        description=HELP.format(algorithms="|".join(ALGORITHMS)),
    )
    if print_config:
        folder = Path(config.run_dir or "runs/demonstration")
        first = folder / "warm_start"
        write("# the warm start")
        write(to_yaml(demonstration.warm_start(config, first)))
        write("---\n# BGPO on its model")
        sys.stdout.write(to_yaml(demonstration.reinforcement(config, first / "model", folder)))
        return 0
    return _status(demonstration.demonstrate(config))


def _status(result: Any) -> int:
    return 0 if result.stopped_by is None else 130
