"""Demonstrations that are too long or wrong are left out of fine-tuning, counted and said."""

import json

import pytest
from fake_training import ROLLOUT, tiny_policy

from dlm_fast import tasks
from dlm_fast.algorithms import sft
from dlm_fast.training import TrainConfig, Trainer
from dlm_fast.training.demonstrations import keep_demonstrations

ANSWERS = ["12", "34", "123456789", "99", "1234567"]


class Digits:
    """A demonstration is right if it begins with 1."""

    name = "digits"

    def load(self, path, split):
        return [row.values for row in tasks.table.read_table(path)]

    def prompt(self, example):
        return "digits"

    def demonstration(self, example):
        return example["answer"]

    def score(self, completion, example):
        right = completion.startswith("1")
        return tasks.Score(float(right), right)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps({"answer": answer}) for answer in ANSWERS))
    return str(path)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"max_demonstration_tokens": 7}, ["12", "34", "99", "1234567"]),
        ({"max_demonstration_tokens": 2, "only_right_demonstrations": True}, ["12"]),
        ({"only_right_demonstrations": True}, ["12", "123456789", "1234567"]),
    ],
)
def test_what_stays(file, options, kept, caplog):
    trainer = Trainer(
        tiny_policy(),
        Digits(),
        sft.Config(),
        TrainConfig(max_steps=1, prompts_per_step=2, eval_every=0, device="cpu", **options),
        rollout=ROLLOUT,
        data=file,
    )
    assert [e["answer"] for e in trainer.examples] == kept
    assert f"{len(kept)} stay" in caplog.text


def test_a_run_imitates_what_stays(file):
    config = {"max_demonstration_tokens": 7, "only_right_demonstrations": True}
    trainer = Trainer(
        tiny_policy(),
        Digits(),
        sft.Config(),
        TrainConfig(max_steps=2, prompts_per_step=2, eval_every=0, device="cpu", **config),
        rollout=ROLLOUT,
        data=file,
    )
    assert trainer.run().step == 2


def test_nothing_left():
    examples = [{"answer": "29"}, {"answer": "123456"}]
    with pytest.raises(ValueError, match=r"1 have more than 3 tokens, 1 of the others are wrong"):
        keep_demonstrations(examples, Digits(), tiny_policy(), max_tokens=3, only_right=True)
