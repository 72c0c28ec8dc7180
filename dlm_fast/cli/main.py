"""Chooses the command and turns its errors into one line for people."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence

from dlm_fast import __version__
from dlm_fast.config import suggest
from dlm_fast.tasks import CheckerError

COMMANDS = {
    "train": "train a model: reinforcement learning or fine-tuning; alone: the demonstration",
    "sample": "print completions of a model",
    "evaluate": "score a model on a task",
    "lm-eval": "the lm-eval harness with this model: dlm-fast lm-eval run --model dlm_fast ...",
    "plot": "draw the curves of one or several runs",
    "bench": "time the ops of this build beside plain PyTorch",
    "info": "what was built, what this machine has, what is in force; of a model: what it is",
}
"""command -> what it does; module dlm_fast.cli.<command> holds ``run(argv)``, - being _"""

HELP = f"""usage: dlm-fast COMMAND [OPTIONS]

Reinforcement learning of diffusion language models.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

  dlm-fast COMMAND --help   the options of a command
  dlm-fast --version        the version
  --traceback               with any command: where an error comes from
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line; returns the exit status."""
    # threads that spin while they wait make a shared machine slower by an order of magnitude; the
    # OpenMP runtime reads this when torch loads it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        status = _run(words)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader of our output has left, as in `| head`: nothing is wrong, and what is still
        # buffered must not be tried again when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, CheckerError) as error:
        # what users meet: bad options, unreadable files, a missing extra; the rest is our mistake
        if traceback:
            raise
        return _fail(f"dlm-fast {words[0]}", str(error) or type(error).__name__)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(HELP)
        return 0
    if words[0] in ("--version", "-V"):
        sys.stdout.write(f"dlm_fast {__version__}\n")
        return 0
    command = words[0]
    if command not in COMMANDS:
        hint = suggest(command, list(COMMANDS)) or f"; commands: {', '.join(COMMANDS)}"
        return _fail("dlm-fast", f"unknown command {command!r}{hint}")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    run: Callable[[list[str]], int] = importlib.import_module(
        f"dlm_fast.cli.{command.replace('-', '_')}"
    ).run
    return run(words[1:])


def _fail(prog: str, message: str) -> int:
    sys.stderr.write(f"{prog}: error: {message}\n")
    return 2
