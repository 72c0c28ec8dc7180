"""``dlm-fast sample --tree``: what is printed, saved and drawn."""

import json
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

import dlm_fast
from dlm_fast.cli.main import main
from dlm_fast.cli.tree_page import tree_page
from dlm_fast.cli.tree_report import tree_text

GROWTH = "--tree.leaves 6 --tree.segment 4 --tree.max-depth 4 --rollout.temperature 1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("causal") / "model"
    dlm_fast.load("tiny", kind="causal", width=16, layers=1, heads=2).save(directory)
    return str(directory)


def grown(model: str, folder: Path, *words: str) -> list[dict[str, Any]]:
    assert (
        main(["sample", model, "--tree", *words, *GROWTH.split(), "--tree-dir", str(folder)]) == 0
    )
    files = sorted(folder.glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


class Parsed(HTMLParser):
    """Tags, and whether each one is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(data: dict[str, Any], folder: Path, number: int) -> None:
    by_id = {node["id"]: node for node in data["nodes"]}
    for leaf in data["leaves"]:
        path, node = [], leaf["node"]
        while node >= 0:
            path.append(by_id[node])
            node = by_id[node]["parent"]
        assert sum(len(part["tokens"]) for part in path) == leaf["tokens"]
        assert "".join(part["text"] for part in path[::-1]) == leaf["completion"]
    page = Parsed((folder / f"tree_{number}.html").read_text())
    assert page.open == [] and page.links == [] and "script" not in page.tags
    assert page.tags.count("rect") == len(data["nodes"])
    assert page.tags.count("tr") == 1 + len(data["leaves"])


def test_trees_of_prompts(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = grown(model, tmp_path, "1+1=", "<b>&")
    out = capsys.readouterr().out
    assert "6 leaves" in out and "written:" in out and "|- " in out
    for number, data in enumerate((first, second)):
        assert len(data["leaves"]) == 6 and "reward" not in data["leaves"][0]
        check(data, tmp_path, number)
    assert first["prompt"] == "1+1=" and "&lt;b&gt;&amp;" in (tmp_path / "tree_1.html").read_text()


def test_trees_of_a_task_show_rewards_and_advantages(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--task countdown --num-examples 1 --rollout.cache tree --json"
    [data] = grown(model, tmp_path, *words.split())
    assert json.loads(capsys.readouterr().out) == data
    assert {leaf["reward"] for leaf in data["leaves"]} <= {0.0, 0.1, 1.0}
    assert {leaf["advantage"] for leaf in data["leaves"]} == {0.0}
    check(data, tmp_path, 0)


def test_advantages_compare_leaves_below_common_nodes() -> None:
    from dlm_fast.cli.tree_report import tree_data
    from dlm_fast.rollout import SamplerConfig, TreeConfig, sample_trees
    from dlm_fast.tasks import Score

    policy = dlm_fast.load("tiny", kind="causal", width=16, layers=1, heads=2)
    drawing = SamplerConfig(max_new_tokens=16, block_size=1, steps=16, temperature=1.0)
    config = TreeConfig(leaves=6, segment=4, max_depth=4)
    [tree] = sample_trees(policy, ["1+1="], drawing, config, seed=2)

    def letters(text: str) -> Score:
        return Score(reward=float(len(set(text))), correct=False, detail={})

    data = tree_data(policy, tree, "1+1=", letters, seed=2)
    parent = {node["id"]: node["parent"] for node in data["nodes"]}

    def path_of(node: int) -> list[int]:
        return [] if node < 0 else [*path_of(parent[node]), node]

    paths = [path_of(leaf["node"]) for leaf in data["leaves"]]
    rewards = [leaf["reward"] for leaf in data["leaves"]]
    assert len(set(rewards)) > 1
    for path, leaf in zip(paths, data["leaves"], strict=True):
        groups = [[r for p, r in zip(paths, rewards, strict=True) if node in p] for node in path]
        means = [mean(rewards)] + [mean(group) for group in groups if len(group) > 1]
        expected = mean(leaf["reward"] - value for value in means)
        assert leaf["advantage"] == pytest.approx(expected)
    assert f"advantage {data['leaves'][0]['advantage']:+.3g}" in tree_text(data)
    assert "hsl(" in tree_page(data)


def test_a_run_gives_its_tree_options(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(model)
    (run / "config.yaml").write_text(
        "algorithm: {tree: {leaves: 3, segment: 4, max_depth: 2}}\n"
        "rollout: {max_new_tokens: 8, block_size: 1, steps: 8, temperature: 1.0}\n"
    )
    assert main(["sample", str(run), "--tree", "1+1="]) == 0
    assert "3 leaves" in capsys.readouterr().out
    assert (run / "trees" / "tree_0.html").is_file()


def test_bad_options_are_named(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", model, "--tree", "1", "--tree.leaves", "0"]) != 0
    assert "tree.leaves must be a whole number from 1 on" in capsys.readouterr().err
    assert main(["sample", model, "--tree"]) != 0
    assert "nothing to complete" in capsys.readouterr().err
