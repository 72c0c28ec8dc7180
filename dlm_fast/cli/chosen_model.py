"""The model a command works on: a checkpoint, a run's model with the run's settings, or "tiny"."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlm_fast.cli.arguments import read_config
from dlm_fast.config import from_dict
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.tree_config import TreeConfig


@dataclass(frozen=True, kw_only=True)
class ChosenModel:
    """What the first word of a command line stands for."""

    path: str
    """directory of the checkpoint, or "tiny" """
    run_dir: Path | None = None
    """folder of the run that made it"""
    task: str | None = None
    task_options: dict[str, Any] = field(default_factory=dict)
    model_options: dict[str, Any] = field(default_factory=dict)
    """facts that the run had to add to its checkpoint, for ``dlm_fast.load``"""
    rollout: SamplerConfig = field(default_factory=SamplerConfig)
    """how the run sampled"""
    tree: TreeConfig = field(default_factory=TreeConfig)
    """how the run's trees grew"""


def choose_model(argv: list[str], prog: str) -> tuple[ChosenModel, list[str]]:
    """The model that the first word names, and the other words."""
    asked_for_help = any(word in ("-h", "--help") for word in argv)
    if not argv or argv[0].startswith("-"):
        if asked_for_help:
            return ChosenModel(path="tiny"), argv
        raise ValueError(f"name the model first: {prog} MODEL [OPTIONS], a checkpoint or a run")
    folder, rest = Path(argv[0]), argv[1:]
    if not (folder / "config.yaml").is_file():
        return ChosenModel(path=argv[0]), rest
    model = folder / "model"
    if not model.is_dir():
        raise ValueError(
            f"the run in {folder} has no model yet: it is written at the run's end; continue it "
            f"with dlm-fast train --resume --run-dir {folder}"
        )
    options = read_config(str(folder))
    rollout = from_dict(options.get("rollout") or {}, SamplerConfig, path="rollout")
    tree = (options.get("algorithm") or {}).get("tree") or {}
    return ChosenModel(
        path=str(model),
        run_dir=folder,
        task=options.get("task"),
        task_options=options.get("task_options") or {},
        model_options=_facts(options),
        rollout=rollout,
        tree=from_dict(tree, TreeConfig, path="algorithm.tree"),
    ), rest


def _facts(options: dict[str, Any]) -> dict[str, Any]:
    """What a run's model, saved as its source was, does not know by itself."""
    names = ["mask_id", "eos_ids"]
    if options.get("model", "tiny") != "tiny":  # whose sizes stand in its own config
        names += ["block_size", "max_length"]
    given = options.get("model_options") or {}
    return {name: given[name] for name in names if name in given}
