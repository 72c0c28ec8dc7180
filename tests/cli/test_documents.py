"""What the pages say works: README's commands and Python run, links lead somewhere."""

import contextlib
import io
import json
import re
import shlex
import shutil

import pytest

from dlm_fast import tasks
from dlm_fast.cli.main import main


def pages(repository):
    return [*repository.glob("*.md"), *repository.glob("docs/**/*.md")]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)


def test_links_lead_somewhere(repository):
    broken = []
    for page in pages(repository):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(repository)}: {target}")
    assert not broken, "\n".join(broken)


def test_pages_name_files_that_exist(repository):
    """Paths in backticks, such as `dlm_fast/config.py`; "mine" and NAME are the reader's own."""
    broken = []
    for page in pages(repository):
        for path in re.findall(
            r"`((?:dlm_fast|csrc|bindings|tests|benches|docs)/[\w./]+)`", page.read_text()
        ):
            if not re.search("mine|NAME", path) and not (repository / path).exists():
                broken.append(f"{page.relative_to(repository)}: {path}")
    assert not broken, "\n".join(broken)


def test_python_of_the_readme_runs(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = blocks(repository / "README.md", "python")
    assert len(examples) >= 2
    for example in examples:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


def readme_commands(repository):
    lines = [line for block in blocks(repository / "README.md", "sh") for line in block.split("\n")]
    return [shlex.split(line, comments=True) for line in lines if "dlm-fast" in line]


def test_commands_of_the_readme_run(repository, small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        shutil.copytree(small_run, tmp_path / "runs" / name)
    shutil.copy(small_run / "config.yaml", "run.yaml")
    example = tasks.get("sudoku").load(None, "test")[0]
    (tmp_path / "test.jsonl").write_text(json.dumps(dict(example)) + "\n")
    quick = ["--seconds", "0.01", "--vocab", "11", "--no-memory"]
    short = {"train": ["--print-config"], "bench": quick}
    ran = set()
    for words in readme_commands(repository):
        assert words[0] == "dlm-fast"
        assert main([*words[1:], *short.get(words[1], [])]) == 0, words
        ran.add(words[1])
    assert ran == {"train", "evaluate", "sample", "plot", "bench"}
    assert (tmp_path / "both.png").exists()


@pytest.mark.parametrize("name", ["main", "test"])
def test_the_marked_commands_are_there(name, repository):
    text = (repository / "README.md").read_text()
    block = re.search(rf"<!-- {name} -->\s*```sh\n(.*?)```", text, re.S)
    assert block
    first, second = block[1].splitlines()
    assert first.startswith("pip install -c constraints.txt ")
    assert second.startswith({"main": "dlm-fast train", "test": "pytest"}[name])
