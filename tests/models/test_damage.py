"""Directories that are damaged, hostile or unusual: named, refused, or read all the same."""

import json
import logging
import os

import pytest
import torch
from family_directories import FAMILIES, edit_config
from family_directories import write_family_directory as write
from safetensors.torch import load_file, save_file

from dlm_fast import load

INDEX = "model.safetensors.index.json"
FAMILY_TYPES = tuple(FAMILIES)
IDS = torch.tensor([[3, 50, 7]])


def edit_tensors(directory, change, file="model.safetensors"):
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def make(tmp_path, model_type="qwen2", **options):
    return write(tmp_path / "model", model_type, tokenizer=False, **options)


def second_shard(directory):
    return sorted(directory.glob("model-*.safetensors"))[1]


@pytest.mark.parametrize("model_type", FAMILY_TYPES)
def test_damaged_files_are_named_for_every_family(tmp_path, model_type):
    directory = make(tmp_path, model_type, shards=2)
    shard = second_shard(directory)
    content = shard.read_bytes()
    first = next(iter(load_file(shard)))

    def refused(words):
        with pytest.raises(ValueError, match=words) as caught:
            load(directory)
        assert str(directory) in str(caught.value)

    shard.write_bytes(content[: len(content) // 2])
    refused("no complete safetensors file .*truncated")
    shard.write_bytes(b"")
    refused("no complete safetensors file")
    shard.unlink()
    refused("is missing, but .* lists it")
    shard.write_bytes(content)
    edit_tensors(directory, lambda t: t.update({first: torch.ones(3, 5)}), shard.name)
    refused(r"has shape \[3, 5\], but config\.json asks for")
    edit_tensors(directory, lambda t: t.update(stranger=torch.ones(1)), shard.name)
    refused(r"holds tensor 'stranger', which model\.safetensors\.index\.json does not list")
    edit_tensors(directory, lambda t: (t.pop("stranger"), t.pop(first)), shard.name)
    refused(f"lacks tensor '{first}'")


def test_a_tensor_lies_in_one_file_only(tmp_path):
    directory = make(tmp_path, shards=2)
    first, second = sorted(directory.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    edit_tensors(directory, lambda t: t.update({name: torch.ones(1)}), second.name)
    with pytest.raises(ValueError, match=rf"'{name}' lies in {first.name} and in {second.name}"):
        load(directory)


@pytest.mark.parametrize(
    "file",
    ["../other.safetensors", "/other.safetensors", "a/../../other.safetensors", "..", "a\\b", ""],
)
def test_an_index_names_files_beside_it_only(tmp_path, file):
    directory = make(tmp_path, shards=2)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    index = json.loads((directory / INDEX).read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"][first] = file
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map must name \.safetensors files beside"):
        load(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_opened(tmp_path, name):
    directory = make(tmp_path)
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(b"cos\nsystem\n(S'touch " + b"executed'\ntR.")
    with pytest.raises(ValueError, match=rf"only {name}: pickled files can run code.*safetensors"):
        load(directory)
    assert not list(directory.rglob("executed"))


def test_code_beside_the_weights_is_copied_and_never_run(tmp_path, monkeypatch):
    directory = make(tmp_path, "Dream")
    trap = directory / "configuration_dream.py"
    trap.write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    load(directory).save(tmp_path / "saved")
    assert (tmp_path / "saved" / trap.name).read_bytes() == trap.read_bytes()
    assert not (tmp_path / "executed").exists()


def test_links_of_a_download_cache_are_followed_and_never_written_through(tmp_path):
    """`hf download` without a folder makes snapshots of links into a store of blobs."""
    store = make(tmp_path, shards=2)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in store.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    policy = load(snapshot)
    assert torch.equal(policy.logits(IDS, aligned=False), load(store).logits(IDS, aligned=False))
    before = {path.name: path.read_bytes() for path in store.iterdir()}
    with torch.no_grad():
        policy.lm_head.weight.add_(1)
    policy.save(snapshot)
    assert before == {path.name: path.read_bytes() for path in store.iterdir()}
    assert not any(path.is_symlink() for path in snapshot.glob("*.safetensors"))
    assert torch.equal(load(snapshot).lm_head.weight, policy.lm_head.weight)


def test_a_link_to_nowhere_is_a_missing_file(tmp_path):
    directory = make(tmp_path, shards=2)
    shard = second_shard(directory)
    shard.unlink()
    shard.symlink_to("nowhere")
    with pytest.raises(ValueError, match=rf"{shard.name} is missing"):
        load(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_said(tmp_path, caplog, value):
    directory = make(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    with caplog.at_level(logging.WARNING, "dlm_fast"):
        load(directory)
        assert not caplog.messages
        edit_tensors(directory, lambda t: t[name].__setitem__((3, 4), value))
        load(directory)
    (message,) = caplog.messages
    assert f"tensor '{name}' holds numbers that are not finite" in message
    assert str(directory) in message


def test_numbers_too_large_for_the_asked_type_are_said(tmp_path, caplog):
    directory = make(tmp_path)
    edit_tensors(directory, lambda t: t["model.norm.weight"].__setitem__(0, 1e6))
    with caplog.at_level(logging.WARNING, "dlm_fast"):
        load(directory)
        assert not caplog.messages
        load(directory, dtype="float16")
    assert "dtype=float16 is too narrow" in caplog.text


def test_a_tied_head_may_lie_in_the_file_a_second_time(tmp_path):
    directory = make(tmp_path, tie_word_embeddings=True)
    once = load(directory).logits(IDS, aligned=False)

    def twice(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(directory, twice)
    policy = load(directory)
    assert policy.lm_head.weight is policy.backbone.embed_tokens.weight
    assert torch.equal(policy.logits(IDS, aligned=False), once)
    policy.save(tmp_path / "saved")
    saved, source = (load_file(d / "model.safetensors") for d in (tmp_path / "saved", directory))
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in source.items())
    edit_tensors(directory, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"'lm_head\.weight' differs from .*tie_word_embeddings"):
        load(directory)
    edit_config(directory, tie_word_embeddings=False)
    load(directory)


def test_a_head_that_should_be_there_is_missed(tmp_path):
    directory = make(tmp_path, "llama", tie_word_embeddings=True)
    edit_config(directory, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lacks tensor 'lm_head\.weight'"):
        load(directory)


def test_rotary_frequencies_of_older_files_are_passed_over(tmp_path):
    directory = make(tmp_path, "llama", shards=2)
    expected = load(directory).logits(IDS, aligned=False)
    name, shard = "model.layers.0.self_attn.rotary_emb.inv_freq", second_shard(directory).name
    edit_tensors(directory, lambda t: t.update({name: torch.ones(8)}), shard)
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"][name] = shard
    (directory / INDEX).write_text(json.dumps(index))
    policy = load(directory)
    assert torch.equal(policy.logits(IDS, aligned=False), expected)
    policy.save(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / INDEX).read_text())["weight_map"]
    del index["weight_map"][name]
    assert kept == index["weight_map"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_another_type_keeps_the_rotary_frequencies(tmp_path, dtype):
    for policy in (load("tiny", dtype=dtype), load(make(tmp_path), dtype=dtype)):
        assert {p.dtype for p in policy.parameters()} == {getattr(torch, dtype)}
        assert policy.backbone.rotary_emb.inv_freq.dtype == torch.float32
