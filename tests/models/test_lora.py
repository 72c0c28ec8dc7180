"""Adapters: exact against the formula, off for the reference, in peft's files, merged on save."""

import builtins
import json

import pytest
import torch
from family_directories import CAUSAL, FAMILIES
from family_directories import write_family_directory as write
from llada_directory import write_llada_directory
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dlm_fast import ScoreRequest, load
from dlm_fast.models.lora_options import LINEAR_LAYERS, LoraOptions

peft = pytest.importorskip("peft", reason="the extra lora is not installed")
IDS = torch.tensor([[3, 50, 7, 120, 9]])
SMALL = LoraOptions(rank=3, alpha=5.0, targets=("q_proj", "down_proj"))


def directory_of(tmp_path, model_type, **changes):
    if model_type == "llada":
        return write_llada_directory(tmp_path / "llada", **changes)
    return write(tmp_path / model_type, model_type, tokenizer=False, **changes)


def shake(policy, seed=1, size=0.2):
    """B is zero at first; the shaken one stands for a trained one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(policy).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += size * noise.to(parameter.dtype)
    return policy


def trained(policy):
    return {name: p for name, p in policy.named_parameters() if p.requires_grad}


@pytest.fixture
def directory(tmp_path):
    return directory_of(tmp_path, "Dream")


def test_new_adapters_change_nothing_and_are_all_that_is_trained(directory):
    plain, policy = load(directory), load(directory, lora=SMALL)
    assert torch.equal(policy.logits(IDS, aligned=False), plain.logits(IDS, aligned=False))
    names = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained(policy)}
    assert names == {"q_proj", "down_proj"}
    sizes = [p.numel() for p in trained(policy).values()]
    assert sum(sizes) == 2 * 3 * (32 + 32 + 48 + 32)
    policy.logits(IDS, aligned=False).square().sum().backward()
    assert {n for n, p in policy.named_parameters() if p.grad is not None} == set(trained(policy))


def test_adapters_follow_the_formula(directory):
    policy = shake(load(directory, dtype="float64", lora=SMALL))
    plain = load(directory, dtype="float64")
    state = policy.state_dict()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            module = name.removesuffix(".weight")
            if module.endswith(SMALL.targets):
                a_rI, b_Or = (state[f"{module}.lora_{x}.default.weight"] for x in "AB")
                parameter += 5.0 / 3 * b_Or @ a_rI
    torch.testing.assert_close(
        policy.logits(IDS, aligned=False), plain.logits(IDS, aligned=False), rtol=0, atol=1e-12
    )


def test_weights_come_from_the_seed_alone(directory):
    before = torch.random.get_rng_state()
    first, again = (trained(load(directory, lora={"rank": 2})) for _ in range(2))
    other = trained(load(directory, lora={"rank": 2, "seed": 1}))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if "lora_A" in n)
    assert len(first) == 2 * 2 * len(LINEAR_LAYERS)


def test_the_reference_is_the_policy_without_adapters(directory):
    plain, policy = load(directory), shake(load(directory, lora=SMALL))
    own = policy.logits(IDS, aligned=False)
    frozen = next(iter(trained(policy)))
    policy.get_parameter(frozen).requires_grad_(False)
    before = set(trained(policy))
    with policy.reference():
        assert torch.equal(policy.logits(IDS, aligned=False), plain.logits(IDS, aligned=False))
        with policy.reference():
            pass
        assert torch.equal(policy.logits(IDS, aligned=False), plain.logits(IDS, aligned=False))
    assert torch.equal(policy.logits(IDS, aligned=False), own)
    assert not torch.equal(own, plain.logits(IDS, aligned=False))
    assert set(trained(policy)) == before
    with pytest.raises(RuntimeError, match="inside"), policy.reference():
        raise RuntimeError("inside")
    assert torch.equal(policy.logits(IDS, aligned=False), own)
    with pytest.raises(ValueError, match=r"has no adapters.*lora=LoraOptions\(rank=16\)"):
        plain.reference()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_train_adapters_with_and_without_checkpointing(directory, checkpointing):
    policy = shake(load(directory, lora=SMALL))
    if checkpointing:
        policy.gradient_checkpointing_enable()
    request = ScoreRequest(torch.tensor([1, 2]), torch.tensor([7, 8]), torch.tensor([1.0, -0.5]))
    policy(IDS, score=request).objective.backward()
    found = {name: p.grad for name, p in trained(policy).items()}
    assert all(gradient is not None and gradient.any() for gradient in found.values())
    policy.zero_grad()
    policy.gradient_checkpointing_disable()
    logprob = policy.logits(IDS, aligned=False)[0].log_softmax(-1)
    (logprob[1, 7] - 0.5 * logprob[2, 8]).backward()
    for name, parameter in trained(policy).items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_adapters_of_16_bit_models_are_float32(directory):
    policy = load(directory, dtype="bfloat16", lora=SMALL)
    assert {p.dtype for p in trained(policy).values()} == {torch.float32}
    assert policy.lm_head.weight.dtype == torch.bfloat16
    assert policy.logits(IDS, aligned=False).dtype == torch.bfloat16
    policy.logits(IDS, aligned=False).float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in trained(policy).values())


@pytest.mark.parametrize("model_type", ["llada", *FAMILIES])
def test_saving_merges_and_keeps_the_adapters(tmp_path, model_type):
    directory = directory_of(tmp_path, model_type)
    policy = shake(load(directory, lora=SMALL))
    policy.save(tmp_path / "saved")
    merged = load(tmp_path / "saved")
    torch.testing.assert_close(
        merged.logits(IDS, aligned=False), policy.logits(IDS, aligned=False), rtol=0, atol=1e-5
    )
    source = load_file(directory / "model.safetensors")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == source.keys()
    again = load(directory, lora={"adapter": str(tmp_path / "saved" / "adapter")})
    assert (again.adapters.rank, again.adapters.alpha) == (3, 5.0)
    assert torch.equal(again.logits(IDS, aligned=False), policy.logits(IDS, aligned=False))
    again.save_adapter(tmp_path / "adapter")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        saved = tmp_path / "saved" / "adapter" / file
        assert (tmp_path / "adapter" / file).read_bytes() == saved.read_bytes()
    gathered = {name: tensor * 1 for name, tensor in policy.state_dict().items()}
    load(directory, lora=SMALL).save(tmp_path / "gathered", state_dict=gathered)
    assert torch.equal(
        load(tmp_path / "gathered").logits(IDS, aligned=False), merged.logits(IDS, aligned=False)
    )


@pytest.mark.parametrize("model_type", CAUSAL)
def test_peft_itself_reads_and_writes_the_same_adapters(tmp_path, model_type):
    directory = directory_of(tmp_path, model_type)
    policy = shake(load(directory, lora=SMALL))
    policy.save_adapter(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    with torch.no_grad():
        expected = theirs(IDS).logits
    own = policy.logits(IDS, aligned=False)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = load(directory, lora=LoraOptions(adapter=str(tmp_path / "theirs")))
    assert torch.equal(again.logits(IDS, aligned=False), own)


def test_rslora_of_others_is_read(tmp_path):
    directory = directory_of(tmp_path, "qwen2")
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    options = peft.LoraConfig(
        r=4, lora_alpha=3, use_rslora=True, target_modules=["v_proj"], init_lora_weights="gaussian"
    )
    theirs = peft.get_peft_model(theirs, options)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.3)
        expected = theirs(IDS).logits
    theirs.save_pretrained(tmp_path / "theirs")
    policy = load(directory, lora={"adapter": str(tmp_path / "theirs")})
    torch.testing.assert_close(policy.logits(IDS, aligned=False), expected, rtol=0, atol=1e-5)
    assert policy.adapters.scaling == 1.5


def test_lladas_last_layer_is_not_its_head(tmp_path):
    """Both are called ff_out there: the files name the layers whole."""
    policy = load(directory_of(tmp_path, "llada"), lora=SMALL)
    policy.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    blocks = "model.transformer.blocks"
    assert config["target_modules"] == [
        f"{blocks}.{i}.{n}" for i in (0, 1) for n in ("ff_out", "q_proj")
    ]
    small = load(directory_of(tmp_path, "llada"), lora={"rank": 1, "targets": ["q_proj"]})
    small.save_adapter(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]


def test_tied_heads_stay_tied_and_frozen(tmp_path):
    directory = directory_of(tmp_path, "qwen3", tie_word_embeddings=True)
    policy = shake(load(directory, lora=SMALL))
    assert policy.lm_head.weight is policy.backbone.embed_tokens.weight
    policy.save(tmp_path / "saved")
    torch.testing.assert_close(
        load(tmp_path / "saved").logits(IDS, aligned=False),
        policy.logits(IDS, aligned=False),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": -1}, "lora.rank must be 0 .* got -1"),
        ({"rank": 2, "alpha": 0.0}, "lora.alpha must be above 0, got 0.0"),
        ({"rank": 2, "targets": []}, "lora.targets is empty"),
        ({"rank": 2, "targets": ["q_proj", "head"]}, "names 'head'; linear layers .* are q_proj"),
        ({"rank": 2, "adapter": "x"}, "brings its own rank, alpha and targets"),
        ({"ranks": 2}, r"unknown option lora\.ranks; did you mean lora\.rank"),
    ],
)
def test_options_that_make_no_sense_are_named(directory, options, words):
    with pytest.raises(ValueError, match=words):
        load(directory, lora=options)


def test_no_rank_means_no_adapters(directory):
    for options in (None, {}, LoraOptions()):
        policy = load(directory, lora=options)
        assert policy.adapters is None
        assert all(p.requires_grad for p in policy.parameters())
    with pytest.raises(TypeError, match="lora must be LoraOptions or a mapping"):
        load(directory, lora=16)


def edit_json(key, value):
    def edit(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    return edit


def edit_tensors(change):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json is no readable"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is miss"),
        (edit_json("peft_type", "IA3"), "peft_type must be LORA"),
        (edit_json("r", 0), "with r and lora_alpha above 0"),
        (edit_json("use_dora", True), "use_dora is True, which is not computed"),
        (edit_json("modules_to_save", ["lm_head"]), r"modules_to_save is \['lm_head'\]"),
        (edit_json("alpha_pattern", {"q_proj": 3}), "alpha_pattern is"),
        (edit_json("bias", "all"), "bias is 'all'"),
        (edit_json("init_lora_weights", "pissa"), "'pissa', whose base model is changed"),
        (edit_json("r", 4), r"is not of rank 4"),
        (edit_tensors(lambda t: t.pop(FIRST)), "one half of the adapter of .*down_proj"),
        (edit_tensors(lambda t: t.clear()), "holds no adapter"),
        (edit_tensors(lambda t: t.update(other=torch.ones(1))), "'other' is no adapter"),
        (edit_tensors(lambda t: t.update({FIRST: torch.ones(3, 9)})), r"A \[3, 9\],.* 48 inputs"),
    ],
)
def test_damaged_adapters_are_named(tmp_path, directory, damage, words):
    load(directory, lora=SMALL).save_adapter(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(ValueError, match=words) as caught:
        load(directory, lora={"adapter": str(tmp_path / "adapter")})
    assert str(tmp_path / "adapter") in str(caught.value)


def test_without_peft_the_error_names_the_extra(directory, monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    load(directory)
    with pytest.raises(
        ImportError, match=r"needs the package peft.*pip install 'dlm_fast\[lora\]'"
    ):
        load(directory, lora=SMALL)
