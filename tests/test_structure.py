"""The source tree keeps its shape: one-way imports, short files, documented options."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sorted(p for d in ("dlm_fast", "tests", "benches") for p in (ROOT / d).rglob("*.py"))
PACKAGE = [p for p in PYTHON if p.is_relative_to(ROOT / "dlm_fast")]
CPP_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}
CPP = sorted(
    p for d in ("csrc", "bindings") for p in (ROOT / d).rglob("*") if p.suffix in CPP_SUFFIXES
)

# Layer -> layers (or single modules) it may import. `config` is the bottom and open to everybody.
BELOW = {
    "config": set(),
    "ops": {"_C", "_C_emulated"},
    "benchmark": {"ops"},
    "models": {"ops"},
    "rollout": {"ops", "models"},
    "tasks": set(),
    "algorithms": {
        "ops",
        "models",
        "rollout.sampler_config",
        "rollout.trajectory",
        "rollout.tree",
        "rollout.tree_config",
        "rollout.tree_sampler",
    },
    "training": {"ops", "models", "rollout", "tasks", "algorithms"},
    "integrations": {"ops", "models", "rollout", "algorithms"},
    "cli": {
        "ops",
        "benchmark",
        "models",
        "rollout",
        "tasks",
        "algorithms",
        "training",
        "integrations",
        "_C",
    },
}
# Layer -> packages outside the standard library it may import, at the top of a file or inside.
PACKAGES = {
    "config": {"dacite", "yaml"},
    "ops": {"torch", "numpy", "cupy"},
    "benchmark": {"torch"},
    "models": {"torch", "numpy", "transformers", "safetensors", "tokenizers", "peft"},
    "rollout": {"torch", "numpy"},
    "tasks": {"math_verify", "pyarrow", "datasets"},
    "algorithms": {"torch", "numpy"},
    "training": {
        "accelerate",
        "matplotlib",
        "numpy",
        "rich",
        "safetensors",
        "tensorboard",
        "torch",
        "trackio",
    },
    "integrations": {"lm_eval", "torch"},
    "cli": {"accelerate", "lm_eval", "matplotlib", "numpy", "rich", "torch", "tyro"},
}
ARGUMENT_PARSERS = {"argparse", "optparse", "getopt", "tyro", "click"}


def layer_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "dlm_fast").with_suffix("").parts
    return parts[0] if parts[0] not in ("__init__", "__main__") else ""


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import of a file, those inside functions too."""
    package = ("dlm_fast", *path.relative_to(ROOT / "dlm_fast").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            # `from dlm_fast import ops` names a layer in its list
            if module == "dlm_fast":
                yield from ((node.lineno, f"dlm_fast.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def wrong_import(layer: str, module: str) -> str | None:
    top, *rest = module.split(".")
    if top == "dlm_fast":
        inside = ".".join(rest)
        allowed = BELOW[layer] | {layer, "config"}
        if (
            inside
            and inside != "__version__"
            and not any(inside == a or inside.startswith(f"{a}.") for a in allowed)
        ):
            return f"{layer} may not import {module}"
    elif top in ARGUMENT_PARSERS and layer != "cli":
        return f"{module}: only cli parses arguments"
    elif top not in sys.stdlib_module_names and top not in PACKAGES[layer]:
        return f"{layer} may not import {top}"
    return None


def violations_of_imports(path: Path) -> list[str]:
    layer = layer_of(path)
    found = []
    for line, module in imports_of(path):
        if layer:
            wrong = wrong_import(layer, module)
        elif path.name == "__main__.py" or not module.startswith("dlm_fast.cli"):
            wrong = None
        else:
            wrong = "only __main__ may import cli"
        if wrong:
            found.append(f"{path.relative_to(ROOT)}:{line}: {wrong}")
    return found


def test_imports_point_downwards():
    assert {layer_of(p) for p in PACKAGE} - {""} == set(BELOW), "a layer without rules, or gone"
    found = [v for path in PACKAGE for v in violations_of_imports(path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("layer", "module"),
    [
        ("ops", "dlm_fast.models.policy"),
        ("ops", "transformers"),
        ("models", "dlm_fast.rollout"),
        ("benchmark", "dlm_fast.cli.output"),
        ("rollout", "dlm_fast.algorithms.bgpo"),
        ("rollout", "transformers"),
        ("tasks", "torch"),
        ("tasks", "dlm_fast.ops"),
        ("algorithms", "dlm_fast.rollout.sampler"),
        ("algorithms", "dlm_fast.tasks"),
        ("algorithms", "dlm_fast.training.loop"),
        ("training", "dlm_fast.cli"),
        ("training", "argparse"),
        ("config", "dlm_fast.ops"),
        ("training", "dlm_fast.integrations"),
        ("integrations", "dlm_fast.cli"),
    ],
)
def test_an_upward_import_is_found(layer, module):
    assert wrong_import(layer, module)


def test_cpp_includes_point_downwards():
    found = []
    for path in CPP:
        bindings = path.is_relative_to(ROOT / "bindings")
        never = r"torch/|ATen/|c10/" if bindings else r"torch/|ATen/|c10/|pybind11/|Python\.h"
        if not bindings and path.suffix != ".cu":
            never += r"|cub/"
        for number, line in enumerate(path.read_text().splitlines(), 1):
            include = re.match(r'\s*#\s*include\s*[<"]([^>"]+)[>"]', line)
            if include and re.search(never, include[1]):
                found.append(f"{path.relative_to(ROOT)}:{number}: may not include {include[1]}")
    assert not found, "\n".join(found)


def test_files_are_short():
    limits = [(p, 400) for p in PYTHON] + [(p, 500) for p in CPP]
    found = [
        f"{path.relative_to(ROOT)}: {lines} lines, at most {limit}"
        for path, limit in limits
        if (lines := len(path.read_text().splitlines())) > limit
    ]
    assert not found, "\n".join(found)


def test_functions_are_short():
    found = []
    for path in PYTHON:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if ast.get_docstring(node) is not None:  # explanation is not length
                    lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
                if lines > 60:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}, {lines}")
    assert not found, "functions of more than 60 lines:\n" + "\n".join(found)


def test_first_line_states_the_responsibility():
    found = []
    for path in PYTHON + CPP:
        first = path.read_text().partition("\n")[0]
        opening = ('"""', 'r"""') if path.suffix == ".py" else "// "
        if not first.startswith(opening) or len(re.findall(r"\w+", first)) < 2:
            found.append(f"{path.relative_to(ROOT)}: {first!r}")
    assert not found, "first lines that say nothing:\n" + "\n".join(found)


def config_classes() -> Iterator[tuple[Path, ast.ClassDef]]:
    for path in PACKAGE:
        for node in ast.walk(ast.parse(path.read_text())):
            decorated = isinstance(node, ast.ClassDef) and any(
                "dataclass" in ast.unparse(d) for d in node.decorator_list
            )
            if decorated and node.name.endswith(("Config", "Options")):
                yield path, node


def test_every_option_is_documented():
    found = []
    for path, cls in config_classes():
        where = f"{path.relative_to(ROOT)}:{cls.name}"
        decorators = " ".join(ast.unparse(d) for d in cls.decorator_list)
        if "frozen=True" not in decorators or "kw_only=True" not in decorators:
            found.append(f"{where}: not a frozen keyword-only dataclass")
        for node, following in zip(cls.body, [*cls.body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
                continue
            documented = (
                isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            )
            if not documented:
                found.append(f"{where}.{ast.unparse(node.target)}: no docstring below the field")
    assert not found, "\n".join(found)


def calls_in(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def test_the_library_is_quiet_and_takes_arguments():
    """No print; environment variables are read for the launcher alone, and set for OpenMP alone."""
    found = []
    for path in PACKAGE:
        relative = path.relative_to(ROOT).as_posix()
        for line, name in calls_in(path):
            environment = name.startswith(("os.environ", "os.getenv"))
            allowed = relative == "dlm_fast/training/distributed.py" or (
                relative == "dlm_fast/cli/main.py"
                and name in ("os.environ", "os.environ.setdefault")
            )
            if name == "print" or (environment and not allowed):
                found.append(f"{relative}:{line}: {name}")
    assert not found, "\n".join(found)


def test_no_machine_paths():
    folders = ["dlm_fast", "csrc", "bindings", "tests", "benches", "docs", ".ci"]
    paths = [p for d in folders for p in (ROOT / d).rglob("*") if p.is_file()]
    paths += [p for p in ROOT.iterdir() if p.is_file() and p.name != ".git"]
    pattern = re.compile(r"(?<![\w.$}~-])/(home|root|work|Users|mnt|opt|tmp)/\w")
    found = []
    for path in paths:
        if path.suffix in {".so", ".pyc", ".png", ".safetensors"} or "__pycache__" in path.parts:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if match := pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found, "\n".join(found)
