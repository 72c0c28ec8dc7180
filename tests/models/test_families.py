"""Every family: its own logits, its facts, its files bit for bit, and what of it is refused."""

import filecmp
import json
import logging

import pytest
import torch
from family_directories import CAUSAL, FAMILIES, edit_config, transformers_model
from family_directories import write_family_directory as write
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dlm_fast import Visibility, load

LENGTHS = [7, 3, 7, 12]


def some_ids(count, seed=0):
    return torch.randint(0, 250, (count,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["dream", "sdar"])
def test_logits_equal_the_familys_own(shared_data, name):
    directory = shared_data / "checkpoints" / f"{name}_tiny"
    reference = load_file(directory / "reference.safetensors")
    policy = load(directory)
    with torch.no_grad():
        logits = policy.logits(reference["input_ids"], aligned=False)
    torch.testing.assert_close(logits, reference["logits"], rtol=0, atol=1e-5)
    assert (policy.family.mask_id, policy.family.eos_ids) == (511, (509,))
    if name == "sdar":
        dense = Visibility.block_causal([reference["input_ids"].shape[1]], 4).dense()
        assert torch.equal(dense, reference["block_causal_mask"].bool().view_as(dense))


@pytest.mark.parametrize("name", ["dream", "sdar"])
def test_a_published_checkpoint_survives_the_round_trip(shared_data, tmp_path, name):
    directory = shared_data / "checkpoints" / f"{name}_tiny"
    load(directory).save(tmp_path / "saved")
    load(tmp_path / "saved").save(tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert filecmp.cmp(tmp_path / "again" / file, directory / file, shallow=False), file


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(("shards", "dtype"), [(1, "float32"), (3, "bfloat16")])
def test_load_save_load_is_bitwise_stable(tmp_path, model_type, shards, dtype):
    source = write(tmp_path / "source", model_type, shards=shards, dtype=getattr(torch, dtype))
    assert len(list(source.glob("*.safetensors"))) >= shards
    load(source, dtype=dtype).save(tmp_path / "saved")
    load(tmp_path / "saved", dtype=dtype).save(tmp_path / "again")
    for path in source.iterdir():
        saved = tmp_path / "saved" / path.name
        if path.suffix == ".safetensors":
            tensors, found = load_file(path), load_file(saved)
            assert tensors.keys() == found.keys()
            for name, tensor in tensors.items():
                assert found[name].dtype == tensor.dtype
                assert torch.equal(found[name], tensor), name
        elif "index" in path.name:
            maps = [json.loads(file.read_text())["weight_map"] for file in (path, saved)]
            assert maps[0] == maps[1]
        else:
            assert saved.read_bytes() == path.read_bytes(), path.name
    names = {path.name for path in source.iterdir()}
    assert names == {path.name for path in (tmp_path / "again").iterdir()}
    for name in names:
        assert filecmp.cmp(tmp_path / "saved" / name, tmp_path / "again" / name, shallow=False)


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
VARIANTS = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "one-key-head": ("llama", {"num_key_value_heads": 1}),
    "activation": ("llama", {"hidden_act": "gelu"}),
    "theta": ("qwen3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "linear": ("llama", {"rope_parameters": LINEAR}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_transformers(tmp_path, variant):
    model_type, changes = VARIANTS[variant]
    directory = write(tmp_path / "model", model_type, tokenizer=False, **changes)
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    policy = load(directory)
    batch, parts = some_ids(36).view(3, 12), some_ids(sum(LENGTHS), 1).split(LENGTHS)
    with torch.no_grad():
        expected = theirs(batch).logits
        found = policy.logits(batch, aligned=False)
        packed = policy.logits(torch.cat(parts), Visibility.causal(LENGTHS), aligned=False)
        separate = torch.cat([theirs(part[None]).logits[0] for part in parts])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(packed, separate, rtol=0, atol=1e-5)
    assert (policy.family.kind, policy.family.logit_shift) == ("causal", 1)


@pytest.mark.parametrize("changes", [{"rope_parameters": LLAMA3}, {"rope_parameters": YARN}])
def test_rope_in_the_older_form_of_config_files(tmp_path, changes):
    directory = write(tmp_path / "model", "llama", tokenizer=False, **changes)
    expected = load(directory).logits(some_ids(8)[None], aligned=False)
    rope = dict(changes["rope_parameters"])
    theta, rope["type"] = rope.pop("rope_theta"), rope.pop("rope_type")
    edit_config(directory, ("rope_parameters",), rope_theta=theta, rope_scaling=rope)
    assert torch.equal(load(directory).logits(some_ids(8)[None], aligned=False), expected)


@pytest.mark.parametrize("model_type", CAUSAL)
def test_what_is_saved_loads_in_transformers(tmp_path, model_type):
    policy = load(write(tmp_path / "source", model_type, dtype=torch.bfloat16))
    with torch.no_grad():
        policy.lm_head.weight.mul_(2)
    policy.save(tmp_path / "saved", dtype="source")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    ids = some_ids(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids).logits, policy.logits(ids, aligned=False), rtol=0, atol=1e-5
        )


def test_aligned_logits_of_dream_are_the_row_before(tmp_path):
    policy = load(write(tmp_path / "model", "Dream", tokenizer=False))
    ids = some_ids(6)[None]
    emitted, aligned = policy.logits(ids, aligned=False), policy.logits(ids)
    assert torch.equal(aligned[:, 1:], emitted[:, :-1])
    assert aligned[:, 0].isnan().all()


def test_attention_patterns_differ_between_the_families(tmp_path):
    """Later tokens reach all rows of Dream, rows of the same block of SDAR, no row before them."""
    for model_type, seen_from in (("Dream", 0), ("sdar", 4), ("qwen2", 6)):
        policy = load(write(tmp_path / model_type, model_type, tokenizer=False))
        ids = some_ids(8)[None]
        other = ids.clone()
        other[0, 6] = 251
        moved = (policy.logits(ids, aligned=False) != policy.logits(other, aligned=False)).any(-1)
        assert moved[0].tolist() == [row >= seen_from for row in range(8)], model_type


def test_facts_of_the_families(tmp_path):
    facts = {}
    for model_type in FAMILIES:
        policy = load(write(tmp_path / model_type, model_type, tokenizer=False))
        family = policy.family
        facts[model_type] = (family.kind, family.logit_shift, family.mask_id, family.block_size)
        assert (family.vocab_size, family.max_length) == (264, 512)
    mask = 261
    assert facts == {
        "Dream": ("full", 1, mask, None),
        "sdar": ("block", 0, mask, 4),
        "qwen2": ("causal", 1, None, None),
        "qwen3": ("causal", 1, None, None),
        "llama": ("causal", 1, None, None),
    }


def test_the_block_size_of_sdar_can_be_set(tmp_path):
    directory = write(tmp_path / "model", "sdar", tokenizer=False)
    assert load(directory, block_size=8).family.block_size == 8
    edit_config(directory, without=("block_size",))
    with pytest.raises(ValueError, match=r"does not say the model's block_size; pass block_size="):
        load(directory)
    assert load(directory, block_size=2).family.block_size == 2
    with pytest.raises(ValueError, match="block_size must be a positive integer, got 0"):
        load(directory, block_size=0)
    with pytest.raises(ValueError, match=r"block_size=4 was given, but .* attention is 'full'"):
        load(write(tmp_path / "dream", "Dream", tokenizer=False), block_size=4)


def test_no_embedding_row_is_cut_off_from_training(tmp_path):
    """Transformers gives the padding token's row no gradient; pad is the end of text here."""
    policy = load(write(tmp_path / "model", "Dream", tokenizer=False))
    assert policy.family.pad_id == policy.family.eos_ids[0]
    ids = torch.full((1, 3), policy.family.pad_id)
    policy.logits(ids, aligned=False).sum().backward()
    assert policy.backbone.embed_tokens.weight.grad[policy.family.pad_id].any()


REFUSED = [
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True, which is not supported"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "layer_types names 'sliding_attention'"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout is 0.1, which is not supported"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config is .*not supported"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("qwen2", {"attention_bias": True}, "attention_bias is True, which qwen2 does not compute"),
    ("Dream", {"mlp_bias": True}, "mlp_bias is True, which Dream does not compute"),
    ("qwen2", {"head_dim": 16}, "head_dim 16 differs from hidden_size / num_attention_heads = 8"),
    ("qwen3", {"head_dim": 15}, "heads of 15 numbers cannot be turned in pairs"),
    ("llama", {"hidden_act": "swoosh"}, "hidden_act 'swoosh' is no activation"),
    ("llama", {"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of .* 3"),
    ("qwen2", {"num_attention_heads": 5}, "hidden_size 32 is not a multiple|5 is not a multiple"),
    ("llama", {"hidden_size": "wide"}, "hidden_size must be int, got 'wide'"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers must be above 0, got 0"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps must be above 0, got nan"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be bool, got 'yes'"),
    ("sdar", {"block_size": -4}, "block_size must be above 0, got -4"),
]
ROPE_REFUSED = [
    ({"rope_type": "spiral"}, "rope_scaling has the unknown type 'spiral'; known are 'default'"),
    ({"type": "dynamic", "factor": 2.0}, "type 'dynamic', whose frequencies follow the longest"),
    ({"rope_type": "longrope"}, "type 'longrope', whose frequencies follow"),
    ({"rope_type": "linear"}, "of type 'linear' needs factor above 0, got None"),
    ({"rope_type": "linear", "factor": "2"}, "needs factor above 0, got '2'"),
    ({"rope_type": "llama3", "factor": 2.0}, "'llama3' needs low_freq_factor above 0"),
    ({"rope_type": "default", "mrope_section": [2, 2]}, "has 'mrope_section', which is not"),
    ({"full_attention": {"rope_type": "default"}}, "rope_scaling differs between layers"),
    ("yarn", "rope_scaling must be an object, got 'yarn'"),
]


@pytest.mark.parametrize(("model_type", "changes", "words"), REFUSED)
def test_what_the_backbone_does_not_compute_is_refused(tmp_path, model_type, changes, words):
    directory = write(tmp_path / "model", model_type, tokenizer=False)
    edit_config(directory, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        load(directory)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize(("rope", "words"), ROPE_REFUSED)
def test_rope_that_is_not_computed_is_refused(tmp_path, rope, words):
    directory = write(tmp_path / "model", "llama", tokenizer=False)
    edit_config(directory, ("rope_parameters",), rope_theta=10000.0, rope_scaling=rope)
    with pytest.raises(ValueError, match=words):
        load(directory)
    edit_config(directory, rope_parameters={"rope_type": "default"}, rope_scaling=LINEAR)
    with pytest.raises(ValueError, match="rope_parameters and rope_scaling differ"):
        load(directory)


def test_a_missing_size_is_named(tmp_path):
    directory = write(tmp_path / "model", "qwen3", tokenizer=False)
    edit_config(directory, without=("intermediate_size",))
    with pytest.raises(ValueError, match=r"config\.json lacks 'intermediate_size'"):
        load(directory)


def test_unknown_keys_are_said(tmp_path, caplog):
    directory = write(tmp_path / "model", "llama", tokenizer=False)
    with caplog.at_level(logging.WARNING, "dlm_fast"):
        load(directory)
        load(write(tmp_path / "sdar", "sdar", tokenizer=False))
        assert not caplog.messages
        edit_config(directory, residual_multiplier=0.2, off=None, also_off=False)
        load(directory)
    assert [m for m in caplog.messages if "residual_multiplier is unknown to llama" in m]


def test_another_family_of_the_same_backbone_is_not_taken_for_it(tmp_path):
    """A Qwen2 file without its biases belongs to Llama, and the reverse."""
    directory = write(tmp_path / "model", "llama", tokenizer=False, head_dim=8)
    edit_config(directory, model_type="qwen2")
    with pytest.raises(
        ValueError, match=r"lacks tensor 'model\.layers\.0\.self_attn\.k_proj\.bias"
    ):
        load(directory)
    directory = write(tmp_path / "other", "qwen2", tokenizer=False)
    edit_config(directory, model_type="llama")
    with pytest.raises(ValueError, match=r"no place for tensor .*bias"):
        load(directory)


def test_the_test_models_are_no_constants():
    """Biases and norms would otherwise hide a missing one."""
    model = transformers_model("qwen2")
    assert all(p.std() > 0.01 for p in model.parameters())
