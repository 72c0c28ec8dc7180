"""Prompts that are too long: refused with file and line, left out, or cut; counted and said."""

import json

import pytest
from fake_training import ROLLOUT, ImitationConfig, tiny_policy

from dlm_fast import tasks
from dlm_fast.training import TrainConfig, Trainer
from dlm_fast.training.prompts import PromptEncoder

LENGTHS = [3, 40, 5, 21, 20]


class Words:
    """Prompts of given lengths; scores nothing."""

    name = "words"

    def load(self, path, split):
        rows = tasks.table.read_table(path)
        return [row.values for row in rows]

    def prompt(self, example):
        return example["text"]

    def demonstration(self, example):
        return "12"

    def score(self, completion, example):
        return tasks.Score(0.0, False)


@pytest.fixture
def file(tmp_path):
    """Five prompts; a blank line stands after the first, so that lines are not numbers of rows."""
    path = tmp_path / "data.jsonl"
    texts = ["".join(chr(97 + i % 26) for i in range(n)) for n in LENGTHS]
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text("\n\n".join([lines[0], "\n".join(lines[1:])]))
    return str(path)


def trainer_of(file, **options):
    train = TrainConfig(max_steps=1, prompts_per_step=5, eval_every=0, **options)
    return Trainer(tiny_policy(), Words(), ImitationConfig(), train, rollout=ROLLOUT, data=file)


def test_an_error_names_file_and_line(file):
    message = (
        r"data\.jsonl, line 3: the prompt has 40 tokens, more than the 20 that fit \('abc.*'\); "
        r"2 of 5 are too long.*long_prompts=drop"
    )
    with pytest.raises(ValueError, match=message):
        trainer_of(file, max_prompt_tokens=20)
    examples = Words().load(file, "train")
    with pytest.raises(ValueError, match=r"data, example 2: the prompt has 40 tokens"):
        trainer_of(examples, max_prompt_tokens=20)
    assert len(trainer_of(file, max_prompt_tokens=40).examples) == 5


def test_dropped_examples_are_counted_and_said(file, caplog):
    trainer = trainer_of(file, max_prompt_tokens=20, long_prompts="drop")
    assert [len(example["text"]) for example in trainer.examples] == [3, 5, 20]
    assert "left out 2 of 5 prompts of more than 20 tokens" in caplog.text
    assert "line 3" in caplog.text
    trainer.run()
    with pytest.raises(ValueError, match="5 of 5 are too long"):
        trainer_of(file, max_prompt_tokens=2, long_prompts="drop")


def test_cut_prompts_keep_their_end(file, caplog):
    trainer = trainer_of(file, max_prompt_tokens=20, long_prompts="truncate")
    assert "cut at the beginning of 2 of 5 prompts" in caplog.text
    trainer.run()
    prompts = {len(g.example["text"]): g.prompt_ids for g in trainer.algorithm.groups}
    for length, ids in prompts.items():
        text = next(e["text"] for e in trainer.examples if len(e["text"]) == length)
        assert trainer.policy.decode(ids) == text[-20:]
    assert set(prompts) == set(LENGTHS) and trainer.prompts.truncated == 2


def test_the_models_own_limit_counts():
    policy = tiny_policy(max_length=28)
    assert PromptEncoder(policy, Words(), 8).limit == 20
    assert PromptEncoder(policy, Words(), 8, 30).limit == 20
    assert PromptEncoder(policy, Words(), 8, 7).limit == 7
    encoder = PromptEncoder(policy, Words(), 8, 10, "truncate")
    for length in range(1, 30):
        ids = encoder.encode({"text": "a" * length})
        assert ids.numel() == min(length, 10)


def test_a_chat_template_stays_whole_around_a_cut_prompt(llada_directory):
    from dlm_fast import load

    policy = load(str(llada_directory))
    frame = policy.encode("").numel()
    assert frame > 5, "the template adds tokens"
    encoder = PromptEncoder(policy, Words(), 8, frame + 6, "truncate")
    whole = policy.encode("uvwxyz")
    assert encoder.encode({"text": "abcdefghijklmnopqrstuvwxyz"}).tolist() == whole.tolist()
    with pytest.raises(ValueError, match="no end of the prompt"):
        PromptEncoder(policy, Words(), 8, frame - 1, "truncate").encode({"text": "abc"})


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"train\.long_prompts must be one of"):
        TrainConfig(long_prompts="shorten")
    with pytest.raises(ValueError, match=r"train\.max_prompt_tokens must be 0 or more"):
        TrainConfig(max_prompt_tokens=-1)


def test_a_task_without_data_of_its_own_names_the_missing_option(file, tmp_path):
    (tmp_path / "reward.py").write_text("def reward(completion, example):\n    return 0.0\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "2+2="}')
    task = tasks.get(f"{tmp_path}/reward.py:reward")
    config = TrainConfig(max_steps=1, prompts_per_step=1, device="cpu")
    for data, words in (
        (None, "data is missing: task"),
        (str(tmp_path / "rows.jsonl"), r"eval_data is missing \(train.eval_every=0 does without\)"),
    ):
        with pytest.raises(ValueError, match=words):
            Trainer(tiny_policy(), task, ImitationConfig(), config, rollout=ROLLOUT, data=data)
