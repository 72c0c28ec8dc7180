"""The harness's model: its three requests, through the real package, on tasks made on the spot."""

import json
import sys
import tomllib
from importlib.metadata import EntryPoint

import pytest
import torch
from strong_weights import strengthen

from dlm_fast.rollout import SamplerConfig, sample

pytest.importorskip("lm_eval", reason="the extra eval (lm-eval) is absent")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from dlm_fast.cli.main import main
from dlm_fast.integrations.lm_eval import DlmFastLM, register

TINY = {"width": 16, "layers": 1, "heads": 2}
DOCS = [
    {"question": "1+1=", "choices": ["2", "33", "444"], "label": 0, "text": "1+1=2"},
    {"question": "2+3=", "choices": ["7", "5", "66"], "label": 1, "text": "2+3=5, as known"},
    {"question": "9-8=", "choices": ["0", "22", "1"], "label": 2, "text": "9-8=1"},
]
COMMON = """\
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
TASKS = {
    "toy_choice": """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "toy_generation": """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n", "4"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "toy_perplexity": """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with the tasks; data sets are cached beside it, not in the user's home."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        common = COMMON.format(data=json.dumps(str(data)))
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}")
    return folder


def lm_of(**options):
    return DlmFastLM(**{"mc_num": 4, "max_new_tokens": 6, "block_size": 3, **TINY, **options})


def asked(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
    ]


def test_tasks_of_the_harness(tasks):
    lm = lm_of()
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    samples = found["samples"]
    for doc, row in zip(DOCS, samples["toy_choice"], strict=True):
        pairs = [(doc["question"], choice) for choice in doc["choices"]]
        values = [value for value, _ in lm.loglikelihood(asked("loglikelihood", *pairs))]
        assert row["acc"] == float(values.index(max(values)) == doc["label"])
    for row in samples["toy_generation"]:
        [text] = [response for [response] in row["resps"]]
        assert "4" not in text and len(text) <= 6
    assert found["results"]["toy_perplexity"]["bits_per_byte,none"] > 0
    logprobs = lm.loglikelihood_rolling(asked("rolling", *[(doc["text"],) for doc in DOCS]))
    count = sum(len(doc["text"].encode()) for doc in DOCS)
    bits = -sum(logprobs) / count / torch.log(torch.tensor(2.0)).item()
    assert found["results"]["toy_perplexity"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


def test_causal_models_generate():
    lm = lm_of(kind="causal")
    [answer] = lm.generate_until(
        asked("generate_until", ("1+1=", {"until": [], "max_gen_toks": 8}))
    )
    [trajectory] = sample(lm.policy, ["1+1="], lm._sampler(8, {}))
    assert answer == lm.policy.decode(trajectory.response_ids)


@pytest.mark.slow
def test_through_the_command(tasks, tmp_path, monkeypatch):
    """As users run it: the harness reads its words, finds the model and writes its results."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # the command replaces them
    arguments = ",".join(f"{name}={value}" for name, value in TINY.items())
    words = f"lm-eval run --model dlm_fast --model_args pretrained=tiny,mc_num=2,{arguments}"
    words += f" --tasks toy_choice --include_path {tasks} --output_path {tmp_path / 'out'}"
    assert main([*words.split(), "--device", "cpu"]) == 0
    [file] = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(file.read_text())["results"]["toy_choice"]


def test_the_command_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert main(["lm-eval", "run"]) == 2
    assert "pip install 'dlm_fast[eval]'" in capsys.readouterr().err


def test_causal_likelihoods_are_exact():
    lm = lm_of(kind="causal")
    context, text = "12+3", "=15"
    [(value, greedy)] = lm.loglikelihood(asked("loglikelihood", (context, text)))
    ids = torch.tensor(lm.tok_encode(context + text))[None]
    logprob = lm.policy.logits(ids).log_softmax(-1)[0].double()
    at = torch.arange(4, 7)
    assert value == pytest.approx(logprob[at, ids[0, at]].sum().item(), abs=1e-5)
    assert greedy == bool((logprob[at].argmax(-1) == ids[0, at]).all())
    # what greedy decoding would write is recognised as such
    ids = lm.tok_encode("7")
    for _ in range(3):
        ids.append(next_token(lm, ids))
    results = lm._loglikelihood_tokens([(None, ids[:1], ids[1:]), (None, ids[:1], [3, 3, 3])])
    assert results[0][1] and not results[1][1]


def next_token(lm, ids):
    """The most likely token behind these; the place holder at its position is not seen."""
    whole = torch.tensor([*ids, 0])[None]
    return int(lm.policy.logits(whole)[0, -1].argmax())


@pytest.mark.parametrize("options", [{}, {"kind": "block", "block_size": 4}])
def test_greedy_texts_are_recognised(options):
    lm = lm_of(**options)
    prompt = torch.tensor(lm.tok_encode("1+2="))
    config = SamplerConfig(
        max_new_tokens=4, block_size=lm.policy.family.block_size or 3, steps=4, early_stop=False
    )
    text = sample(lm.policy, [prompt], config)[0].response_ids.tolist()
    other = [(token + 1) % 90 for token in text]
    results = lm._loglikelihood_tokens([(None, prompt.tolist(), t) for t in (text, other)])
    assert [greedy for _, greedy in results] == [True, False]
    lm.check_greedy = False
    assert not any(g for _, g in lm._loglikelihood_tokens([(None, prompt.tolist(), text)]))


def test_generation_is_that_of_the_sampler():
    lm = lm_of(steps=3)
    options = {"until": ["zz"], "max_gen_toks": 12}
    [text] = lm.generate_until(asked("generate_until", ("1+1=", options)))
    config = SamplerConfig(max_new_tokens=12, block_size=3, steps=6)
    prompt = torch.tensor(lm.tok_encode("1+1="))
    assert text == lm.policy.decode(sample(lm.policy, [prompt], config)[0].response_ids)
    cut = {"until": text[3], "max_gen_toks": 12}
    assert lm.generate_until(asked("generate_until", ("1+1=", cut))) == [text[: text.find(text[3])]]
    stops = [text[6], text[3]]
    cut = {"until": stops, "max_gen_toks": 12}
    first = min(text.find(stop) for stop in stops)
    assert first < max(text.find(stop) for stop in stops)
    assert lm.generate_until(asked("generate_until", ("1+1=", cut))) == [text[:first]]
    drawn = {"do_sample": True, "temperature": 1.0}
    answers = lm.generate_until(asked("generate_until", *[("1+1=", drawn)] * 4))
    assert len(set(answers)) > 1, "equal requests have draws of their own"
    assert answers == lm.generate_until(asked("generate_until", *[("1+1=", drawn)] * 4))


def test_contexts_that_are_too_long_lose_their_beginning():
    lm = lm_of(max_length=16, kind="causal", dtype="float64")
    strengthen(lm.policy, 0.3)
    contexts = ("9" * 40 + "1+1=", "9" * 11 + "1+1=", "1+1=" + "9" * 11)
    [(long, _), (end, _), (other, _)] = lm.loglikelihood(
        asked("loglikelihood", *[(context, "2") for context in contexts])
    )
    assert long == pytest.approx(end, abs=1e-9) and abs(long - other) > 1e-3
    with pytest.raises(ValueError, match="leaves no room for context"):
        lm.loglikelihood(asked("loglikelihood", ("1", "2" * 16)))
    [rolled] = lm.loglikelihood_rolling(asked("rolling", ("1" * 40,)))
    assert rolled < 0


def test_a_checkpoint_with_a_chat_template(llada_directory):
    """The harness writes the conversation, start token included; no second one is put before it."""
    lm = DlmFastLM(str(llada_directory), mc_num=2, max_new_tokens=4, block_size=4)
    text = lm.apply_chat_template([{"role": "user", "content": "1+1="}])
    assert lm.tok_encode(text) == lm.policy.encode("1+1=").tolist()
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    [answer] = lm.generate_until(asked("generate_until", (text, {"until": []})))
    [trajectory] = sample(lm.policy, ["1+1="], lm.sampler)
    assert answer == lm.policy.decode(trajectory.response_ids)


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="no generation option num_beams"):
        lm_of().generate_until(asked("generate_until", ("1", {"num_beams": 2})))
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        lm_of(max_length=16).generate_until(asked("generate_until", ("1", {"max_gen_toks": 16})))


def test_it_is_declared_and_registered(repository):
    declared = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["entry-points"]
    [(name, target)] = declared["lm_eval.models"].items()
    assert EntryPoint(name, target, "lm_eval.models").load() is DlmFastLM
    from lm_eval.api.registry import get_model

    register()
    register()
    assert get_model(name) is DlmFastLM and get_model("dummy")
