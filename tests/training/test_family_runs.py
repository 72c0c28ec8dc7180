"""Checkpoints of every family in whole runs: trained, with adapters and without, or refused."""

import json

import pytest
import torch
from family_directories import edit_config
from family_directories import write_family_directory as write

import dlm_fast
from dlm_fast import SamplerConfig, load
from dlm_fast.cli.main import main
from dlm_fast.training.checkpoint import newest_checkpoint

SETTINGS = """
rollout: {max_new_tokens: 16, block_size: 4, steps: 4, temperature: 1.0}
train: {max_steps: 1, prompts_per_step: 2, eval_every: 0, device: cpu, lr: 1e-3, save_every: 1}
"""
BGPO = SETTINGS + "algorithm: {num_samples: 2, group_size: 4}\n"
# byte models write anything: the lengths of their texts differ
REWARD = "def reward(completion, example):\n    return len(completion) % 5 / 4\n"
ADAPTERS = "lora: {rank: 2, targets: [q_proj, down_proj]}\n"
KINDS = {
    "whole": ("", ()),
    "adapters, layers recomputed": (ADAPTERS, ("--train.gradient-checkpointing",)),
    "adapters on 16 bits": (ADAPTERS + "model_options: {dtype: bfloat16}\n", ()),
}


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    """Curves take a second each and are tested elsewhere."""
    monkeypatch.setattr("dlm_fast.training.run_folder.RunFolder.write_curves", lambda self: None)


@pytest.fixture
def train(tmp_path):
    """train(algorithm, checkpoint, run, options, *words) is the command's exit status."""
    (tmp_path / "reward.py").write_text(REWARD)
    rows = [json.dumps({"prompt": f"question {i}", "completion": "yes"}) for i in range(4)]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))

    def run(algorithm, checkpoint, run_dir, options, *words):
        file = tmp_path / "run.yaml"
        file.write_text(
            f"{options}name: {algorithm}\nmodel: {checkpoint}\nrun_dir: {run_dir}\n"
            f"task: {tmp_path}/reward.py:reward\ndata: {tmp_path}/data.jsonl\n"
        )
        return main(["train", algorithm, "--config", str(file), *words])

    return run


def tensors_of(run_dir):
    checkpoint = newest_checkpoint(run_dir / "checkpoints")
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


@pytest.fixture
def dream(tmp_path):
    return write(tmp_path / "dream", "Dream")


@pytest.mark.parametrize("kind", KINDS)
def test_bgpo_trains_dream_and_goes_on_after_a_stop(tmp_path, dream, train, kind):
    options, words = KINDS[kind]
    two = ("--train.max-steps", "2")
    assert train("bgpo", dream, tmp_path / "straight", BGPO + options, *words, *two) == 0
    assert train("bgpo", dream, tmp_path / "run", BGPO + options, *words) == 0
    assert train("bgpo", dream, tmp_path / "run", BGPO + options, *words, *two, "--resume") == 0
    found, expected = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "straight")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    weights = {name for name in found if name.startswith("policy/weight/")}
    if kind == "whole":
        assert len(weights) == len(load(dream).state_dict())
        assert not (tmp_path / "run" / "model" / "adapter").exists()
        return
    assert len(weights) == 2 * 2 * 2
    assert all(".lora_" in name for name in found)
    assert all(found[name].any() for name in weights), "an adapter that was not trained"
    # what is merged into 16 bits is rounded to them
    _check_model(tmp_path / "run", dream, 1e-2 if "16" in kind else 1e-5)


TRACERL = (
    SETTINGS
    + """algorithm:
  group_size: 4
  value: shared
  schedule:
  - iterations=1,train_block_size=8,max_new_tokens=8
  - iterations=1,train_block_size=8
  - block_size=8
"""
)


def test_tracerl_enlarges_the_blocks_of_sdar_and_goes_on_after_a_stop(tmp_path, train):
    """Three phases; the value head's weights and the new blocks survive the stops."""
    sdar, three = write(tmp_path / "sdar", "sdar"), ("--train.max-steps", "3")
    assert load(sdar).family.block_size == 4
    options = TRACERL + ADAPTERS
    assert train("tracerl", sdar, tmp_path / "straight", options, *three) == 0
    run = tmp_path / "run"
    assert train("tracerl", sdar, run, options) == 0
    assert train("tracerl", sdar, run, options, "--train.max-steps", "2", "--resume") == 0
    assert load(run / "model").family.block_size == 4
    assert train("tracerl", sdar, run, options, *three, "--resume") == 0
    found, expected = tensors_of(run), tensors_of(tmp_path / "straight")
    assert found.keys() == expected.keys() and any("value/weight" in name for name in found)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert load(run / "model").family.block_size == 8


def _check_model(run_dir, directory, tolerance):
    """model/ is the merged model, model/adapter gives it back on the source."""
    ids = torch.tensor([[5, 6, 7]])
    source, merged = load(directory), load(run_dir / "model")
    adapted = load(directory, lora={"adapter": str(run_dir / "model" / "adapter")})
    adapted_layer = "backbone.layers.0.self_attn.q_proj.weight"
    changed, as_it_was = (policy.get_parameter(adapted_layer) for policy in (merged, source))
    assert not torch.equal(changed, as_it_was)
    assert torch.equal(merged.lm_head.weight.bfloat16(), source.lm_head.weight.bfloat16())
    torch.testing.assert_close(
        merged.logits(ids, aligned=False),
        adapted.logits(ids, aligned=False),
        rtol=0,
        atol=tolerance,
    )
    files = {path.name for path in directory.iterdir()}
    assert files <= {path.name for path in (run_dir / "model").iterdir()}


def test_recomputing_layers_changes_no_gradient_of_adapters(tmp_path, dream, train):
    for name, words in (("kept", ()), ("again", ("--train.gradient-checkpointing",))):
        assert train("bgpo", dream, tmp_path / name, BGPO + ADAPTERS, *words) == 0
    kept, again = tensors_of(tmp_path / "kept"), tensors_of(tmp_path / "again")
    moments = [name for name in kept if "exp_avg/" in name]
    assert len(moments) == 8
    for name in moments:
        torch.testing.assert_close(again[name], kept[name], rtol=1e-4, atol=1e-7, msg=name)


def test_commands_take_a_run_with_adapters(tmp_path, dream, train, capsys):
    run, data = tmp_path / "run", ["--data", str(tmp_path / "data.jsonl")]
    assert train("bgpo", dream, run, BGPO, "--lora.rank", "2", "--lora.targets", "q_proj") == 0
    assert main(["evaluate", str(run), *data, "--num-examples", "2"]) == 0
    assert main(["sample", str(run), *data, "--num-examples", "1"]) == 0
    assert train("bgpo", dream, tmp_path / "dry", BGPO + ADAPTERS, "--dry-run") == 0
    assert not (tmp_path / "dry").exists()
    # the options of a resumed run are those of the run
    capsys.readouterr()
    assert train("bgpo", dream, run, BGPO, "--lora.rank", "4", "--resume") != 0
    assert "lora.rank: 2 and 4" in capsys.readouterr().err


def test_commands_know_what_a_run_was_told_of_its_model(tmp_path, dream, train, capsys):
    """The model is saved with its source's config, which does not name the mask."""
    edit_config(dream, without=("mask_token_id",))
    run, data = tmp_path / "run", ["--data", str(tmp_path / "data.jsonl")]
    told = ("--model-options.mask-id", "261", "--model-options.max-length", "600")
    assert train("bgpo", dream, run, BGPO, *told) == 0
    assert main(["sample", str(run), *data, "--num-examples", "1"]) == 0
    assert main(["evaluate", str(run), *data, "--num-examples", "1"]) == 0
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    out = capsys.readouterr().out
    assert "261 <|mdm_mask|>" in out
    assert "600" in out
    settings = "--rollout.max-new-tokens 4 --rollout.block-size 4 --rollout.steps 4"
    words = ["sample", str(dream), "hello", *settings.split()]
    assert main(words) == 2
    assert "pass mask_id=... to load" in capsys.readouterr().err
    assert main([*words, "--model-options.mask-id", "261"]) == 0


@pytest.mark.parametrize("model_type", ["Dream", "sdar", "llada"])
def test_every_diffusion_family_samples(tmp_path, model_type, llada_directory):
    directory = llada_directory if model_type == "llada" else write(tmp_path / "m", model_type)
    policy = load(directory)
    size = policy.family.block_size or 8
    settings = SamplerConfig(max_new_tokens=16, block_size=size, steps=16, temperature=1.0)
    prompts = ["one", "another", "a third that is longer"]
    together = dlm_fast.sample(policy, prompts, settings, seed=3)
    for row, trajectory in enumerate(together):
        ids = trajectory.response_ids
        assert ids.shape == (16,)
        assert not torch.isin(ids, torch.tensor([policy.family.mask_id, 262, 263])).any()
        alone = dlm_fast.sample(policy, [prompts[row]], settings, seed=3, sequence_ids=[row])
        assert torch.equal(alone[0].response_ids, ids)
        prompt = policy.tokenizer.decode(trajectory.prompt_ids)
        assert prompt.endswith("assistant<|end_header_id|>\n\n")


def test_blocks_of_sdar_must_be_its_own(tmp_path):
    policy = load(write(tmp_path / "model", "sdar"))
    with pytest.raises(ValueError, match="differs from the model's own blocks of 4"):
        dlm_fast.sample(policy, ["a"], SamplerConfig(max_new_tokens=16, block_size=8, steps=16))


@pytest.mark.parametrize(("model_type", "kind"), [("sdar", "block"), ("qwen2", "causal")])
@pytest.mark.parametrize("algorithm", ["bgpo", "sft"])
def test_algorithms_refuse_families_they_do_not_fit(
    tmp_path, train, capsys, model_type, kind, algorithm
):
    directory = write(tmp_path / "model", model_type)
    assert train(algorithm, directory, tmp_path / "run", SETTINGS) != 0
    words = f"this model's attention is '{kind}'; take a model with full attention"
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [{}, {"logit_shift": 1}, {"kind": "block"}])
def test_float64_policies_sample(kind):
    policy = load("tiny", dtype="float64", width=16, layers=1, heads=2, **kind)
    for rule in ({}, {"rule": "threshold", "bound": 0.5}, {"rule": "eb", "bound": 0.1}):
        settings = SamplerConfig(
            max_new_tokens=8, block_size=4, steps=8, temperature=1.0, record_confidence=True, **rule
        )
        (trajectory,) = dlm_fast.sample(policy, [torch.tensor([1, 2, 3])], settings)
        assert trajectory.logp_rollout.dtype == trajectory.confidence.dtype == torch.float32
        assert (trajectory.logp_rollout < 0).all()


TREES = (
    SETTINGS
    + """algorithm:
  tree: {leaves: 4, segment: 4, max_depth: 4, answer: none, repetition: none}
  reject: reward
"""
)


def test_treepo_trains_qwen_and_goes_on_after_a_stop(tmp_path, train):
    qwen = write(tmp_path / "qwen", "qwen2")
    two = ("--train.max-steps", "2")
    assert train("treepo", qwen, tmp_path / "straight", TREES, *two) == 0
    assert train("treepo", qwen, tmp_path / "run", TREES) == 0
    assert train("treepo", qwen, tmp_path / "run", TREES, *two, "--resume") == 0
    found, expected = tensors_of(tmp_path / "run"), tensors_of(tmp_path / "straight")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["tree/leaves"] == 4
