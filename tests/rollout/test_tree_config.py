"""Tests of TreeConfig: every contradiction is named with its option, and configs survive YAML."""

from typing import Any

import pytest

from dlm_fast.config import from_yaml, to_yaml
from dlm_fast.rollout.tree_config import TreeConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"leaves": 0}, "tree.leaves must be a whole number from 1 on, got 0"),
        ({"branch": 0}, "tree.branch must be a whole number from 1 on, got 0"),
        ({"segment": 0}, "tree.segment must be a whole number from 1 on, got 0"),
        ({"max_depth": 0}, "tree.max_depth must be a whole number from 1 on, got 0"),
        ({"leaves": True}, "tree.leaves must be a whole number"),
        ({"leaves": 4, "first_branch": 5}, "tree.first_branch=5 starts more paths"),
        ({"leaves": 4, "first_branch_max": 8}, "tree.first_branch_max=8 starts more paths"),
        ({"first_branch": 3, "first_branch_max": 2}, "lies below tree.first_branch=3"),
        ({"cut_window": 0}, "tree.cut_window must be a whole number from 1 on, got 0"),
        ({"cut_window": -1}, "tree.cut_window must be a whole number from 1 on, got -1"),
        ({"cut_window": 300}, "neither a divisor nor a multiple of tree.segment=512"),
        ({"cut": "min_logprob_token"}, "falls inside segments; set tree.allow_split=true"),
        ({"max_back": 0}, "tree.max_back must be a whole number from 1 on, got 0"),
        ({"min_finished_tokens": -1}, "tree.min_finished_tokens must be a whole number from 0"),
        ({"max_prompt": 0}, "tree.max_prompt must be a whole number from 1 on, got 0"),
        ({"budget": "random"}, "tree.budget=random needs tree.branch_max, got None"),
        ({"branch_max": 3}, "tree.budget=fixed takes no tree.branch_max, got 3"),
        ({"budget": "random", "branch_max": 1}, "tree.branch_max=1 lies below tree.branch=2"),
        ({"token_budget": 100}, "tree.budget=fixed takes no tree.token_budget, got 100"),
        ({"budget": "response_tokens"}, "needs tree.token_budget"),
        ({"budget": "step_tokens", "token_budget": 9}, "set tree.sync=global, got tree"),
        ({"min_width": 65}, "tree.max_width=64 lies below tree.min_width=65"),
        ({"share_temperature": 0.0}, "tree.share_temperature must be a finite number above 0"),
        ({"share_temperature_end": float("nan")}, "tree.share_temperature_end must be a finite"),
        ({"share": "logprob", "sync": "path"}, "set tree.sync to tree or global"),
        ({"share": "odd"}, "tree.share must be one of even, logprob, got 'odd'"),
        ({"budget": "odd"}, "tree.budget must be one of fixed, random"),
        ({"fallback": "odd"}, "tree.fallback must be one of answer_or_eos"),
        ({"cut": "odd"}, "tree.cut must be one of random"),
        ({"answer": "odd"}, "tree.answer must be one of boxed_and_eos"),
        ({"repetition": "odd"}, "tree.repetition must be one of text, token, none"),
        ({"long_prompt": "odd"}, "tree.long_prompt must be one of error"),
        ({"sync": "odd"}, "tree.sync must be one of tree, global, path"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="tree") as raised:
        TreeConfig(**changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"leaves": 1},
        {"cut_window": 256},
        {"cut_window": 1024},
        {"cut_window": 300, "allow_split": True},
        {"first_branch_max": 8},
        {"budget": "step_tokens", "token_budget": 4096, "sync": "global"},
        {"budget": "response_tokens", "token_budget": 4096, "leaves": 1, "first_branch": 4},
        {"share": "logprob", "share_temperature": 5.0, "share_temperature_end": 1.0},
    ],
)
def test_configs_survive_yaml(changes: dict[str, Any]) -> None:
    config = TreeConfig(**changes)
    assert from_yaml(to_yaml(config), TreeConfig) == config


def test_the_defaults_are_the_papers_launch() -> None:
    config = TreeConfig()
    assert (config.segment, config.max_depth, config.leaves) == (512, 14, 16)
    assert (config.branch, config.first_branch, config.window) == (2, 2, 512)
    assert (config.share, config.fallback, config.cut) == ("even", "answer_or_eos", "random")
    assert (config.answer, config.repetition_first) == ("boxed_and_eos", True)
