"""Checkpoint directories: what is right loads and saves bit for bit, what is wrong is named."""

import json
import shutil
import time

import pytest
import torch
from llada_directory import VOCABULARY, write_llada_directory
from safetensors.torch import load_file, save_file

from dlm_fast import Visibility, load

WTE = "model.transformer.wte.weight"
LAST = "model.transformer.blocks.1.ff_out.weight"


def tensors_of(directory):
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_save_load_is_bitwise_stable(tmp_path, shards, dtype):
    source = write_llada_directory(tmp_path / "source", shards=shards, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    load(source, dtype=name).save(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == sorted(
        p.name for p in source.iterdir()
    )
    for path in source.iterdir():
        if path.suffix != ".safetensors" and "index" not in path.name:
            assert (tmp_path / "saved" / path.name).read_bytes() == path.read_bytes(), path.name
    for path in source.glob("*.safetensors"):
        assert_same_tensors(load_file(tmp_path / "saved" / path.name), load_file(path))
    again = load(tmp_path / "saved", dtype=name)
    again.save(tmp_path / "again")
    for path in (tmp_path / "saved").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_training_keeps_float32_and_saving_can_return_to_the_sources_type(tmp_path):
    source = write_llada_directory(tmp_path / "source", dtype=torch.bfloat16)
    policy = load(source)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    policy.save(tmp_path / "exact")
    assert {t.dtype for t in tensors_of(tmp_path / "exact").values()} == {torch.float32}
    policy.save(tmp_path / "like", dtype="source")
    assert_same_tensors(tensors_of(tmp_path / "like"), tensors_of(source))
    policy.save(tmp_path / "half", dtype="float16")
    assert {t.dtype for t in tensors_of(tmp_path / "half").values()} == {torch.float16}
    with pytest.raises(ValueError, match=r"dtype must be one of .*, got 'int8'"):
        policy.save(tmp_path / "wrong", dtype="int8")


def test_saving_over_the_source_and_without_it(tmp_path):
    source = write_llada_directory(tmp_path / "source", shards=2)
    policy = load(source)
    with torch.no_grad():
        policy.lm_head.weight.add_(1)
    policy.save(source)
    assert torch.equal(load(source).lm_head.weight, policy.lm_head.weight)
    shutil.rmtree(source)
    policy.save(tmp_path / "elsewhere")
    assert torch.equal(load(tmp_path / "elsewhere").lm_head.weight, policy.lm_head.weight)


def test_gathered_parameters_can_be_saved(tmp_path, llada_directory):
    policy = load(llada_directory)
    gathered = {name: tensor + 1 for name, tensor in policy.state_dict().items()}
    policy.save(tmp_path / "saved", state_dict=gathered)
    saved = load(tmp_path / "saved")
    assert torch.equal(saved.lm_head.weight, policy.lm_head.weight + 1)


def test_large_checkpoints_are_split(tmp_path, llada_directory, monkeypatch):
    monkeypatch.setattr("dlm_fast.models.safetensors_files.MAX_SHARD_BYTES", 60_000)
    load("tiny", width=32, layers=2).save(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all((tmp_path / "saved" / f).stat().st_size < 70_000 for f in files)
    assert_same_tensors(
        load(tmp_path / "saved").state_dict(), load("tiny", width=32, layers=2).state_dict()
    )
    monkeypatch.undo()
    load(tmp_path / "saved", dtype="float64").save(tmp_path / "saved2")
    assert sorted(p.name for p in (tmp_path / "saved2").glob("model-*")) == files


def test_stale_shards_are_removed(tmp_path):
    target = write_llada_directory(tmp_path / "target", shards=3)
    policy = load(write_llada_directory(tmp_path / "source", seed=1))
    policy.save(target)
    assert [p.name for p in target.glob("model*.safe*")] == ["model.safetensors"]
    assert torch.equal(load(target).lm_head.weight, policy.lm_head.weight)


def test_another_models_directory_is_not_overwritten(llada_directory):
    before = {p.name: p.read_bytes() for p in llada_directory.iterdir()}
    with pytest.raises(ValueError, match="holds a checkpoint of model_type 'llada', not 'dlm_fast"):
        load("tiny").save(llada_directory)
    assert before == {p.name: p.read_bytes() for p in llada_directory.iterdir()}


def test_a_failed_write_leaves_the_old_file(tmp_path, llada_directory, monkeypatch):
    before = (llada_directory / "model.safetensors").read_bytes()
    policy = load(llada_directory)

    def full_disk(tensors, path, metadata):
        path.write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dlm_fast.models.safetensors_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        policy.save(llada_directory)
    assert (llada_directory / "model.safetensors").read_bytes() == before
    assert not [p for p in llada_directory.iterdir() if "partial" in p.name]


def test_a_loaded_policy_does_not_depend_on_the_file(llada_directory):
    policy = load(llada_directory)
    before = policy.lm_head.weight.clone()
    path = llada_directory / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(5000)
        file.write(b"\xff" * 10_000)
    assert torch.equal(policy.lm_head.weight, before)


def test_facts_come_from_config_and_tokenizer(tmp_path, llada_directory):
    family = load(llada_directory).family
    assert family.mask_id == VOCABULARY["<|mdm_mask|>"]
    assert family.eos_ids == (VOCABULARY["<|endoftext|>"], VOCABULARY["<|eot_id|>"])
    assert family.pad_id == VOCABULARY["<|endoftext|>"]
    assert (family.kind, family.logit_shift, family.max_length) == ("full", 0, 512)
    chosen = load(llada_directory, mask_id=7, eos_ids=[8]).family
    assert (chosen.mask_id, chosen.eos_ids) == (7, (8,))
    bare = write_llada_directory(tmp_path / "bare", tokenizer=False, eos_token_id=[3, 4])
    (bare / "generation_config.json").unlink()
    assert load(bare).family.eos_ids == (3, 4)


def test_text_goes_through_the_chat_template(llada_directory):
    policy = load(llada_directory)
    ids = policy.encode(" What is 2+2? ")
    assert policy.tokenizer.decode(ids) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nWhat is 2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert ids.dtype == torch.int64
    plain = policy.encode("Größe 4", chat=False)
    assert len(plain) == len("Größe 4".encode())
    assert policy.decode(plain) == "Größe 4"


def test_decode_stops_at_the_end_and_drops_special_tokens(llada_directory):
    policy = load(llada_directory)
    special = VOCABULARY["<|start_header_id|>"]
    text = policy.encode("4", chat=False).tolist()
    end = VOCABULARY["<|eot_id|>"]
    assert policy.decode([special, *text, end, *text, VOCABULARY["<|endoftext|>"]]) == "4"
    assert policy.decode(torch.tensor([end])) == ""
    # the head has more rows than the tokenizer has tokens
    assert policy.decode([*text, policy.family.vocab_size - 1]) == "4"


def test_a_prompt_must_not_hold_the_mask(llada_directory):
    with pytest.raises(ValueError, match=r"the prompt holds the mask token '<\|mdm_mask\|>'"):
        load(llada_directory).encode("fill <|mdm_mask|> in", chat=False)


def test_without_tokenizer_ids_still_work(tmp_path):
    policy = load(write_llada_directory(tmp_path / "bare", tokenizer=False))
    assert policy.tokenizer is None
    assert policy.logits(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 264)
    for call in (lambda: policy.encode("a"), lambda: policy.decode([1])):
        with pytest.raises(ValueError, match=r"no tokenizer: put tokenizer\.json"):
            call()


def test_tied_weights_are_stored_once(tmp_path):
    source = write_llada_directory(tmp_path / "source", weight_tying=True)
    policy = load(source)
    assert policy.lm_head.weight is policy.backbone.embed_tokens.weight
    policy.save(tmp_path / "saved")
    assert_same_tensors(tensors_of(tmp_path / "saved"), tensors_of(source))
    policy.logits(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    assert policy.backbone.embed_tokens.weight.grad is not None


def drop(name):
    return lambda d: edit_tensors(d, lambda t: t.pop(name))


def add(name):
    return lambda d: edit_tensors(d, lambda t: t.update({name: torch.zeros(2)}))


def reshape(name, shape):
    return lambda d: edit_tensors(d, lambda t: t.update({name: torch.zeros(shape)}))


def retype(name):
    return lambda d: edit_tensors(d, lambda t: t.update({name: t[name].to(torch.int8)}))


def cut(file, size):
    def break_it(directory):
        content = (directory / file).read_bytes()
        (directory / file).write_bytes(content[:size])

    return break_it


def write(file, content):
    return lambda d: (d / file).write_text(content)


def remove(file):
    return lambda d: (d / file).unlink()


def pickled(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop(LAST), rf"lacks tensor '{LAST}'; its files are incomplete"),
        (add("extra.weight"), r"model\.safetensors: config\.json has no place for .*extra\.weight"),
        (reshape(WTE, (5, 32)), rf"'{WTE}' has shape \[5, 32\], but .* asks for \[264, 32\]"),
        (retype(WTE), rf"tensor '{WTE}' has type I8; quantised checkpoints are not supported"),
        (cut("model.safetensors", 20_000), r"model\.safetensors is no complete .*truncated"),
        (cut("model.safetensors", 4), r"model\.safetensors is no complete .*truncated"),
        (
            remove("model.safetensors"),
            "holds neither model.safetensors nor model.safetensors.index",
        ),
        (pickled, r"only pytorch_model\.bin: pickled files can run code.*convert"),
        (remove("config.json"), r"config\.json is missing"),
        (write("config.json", "{"), r"config\.json is not JSON"),
        (write("config.json", "[]"), r"config\.json must hold a JSON object, got list"),
        (write("tokenizer.json", "{}"), r"tokenizer\.json: the tokenizer cannot be read"),
        (
            lambda d: edit_config(d, model_type="bert"),
            "model_type 'bert' is not supported; supported are 'llada', 'Dream', 'sdar'",
        ),
        (
            lambda d: edit_config(d, mask_token_id=None),
            r"neither config\.json \(mask_token_id\) nor the tokenizer .* pass mask_id=\.\.\.",
        ),
        (lambda d: edit_config(d, mask_token_id=264), "mask_id 264 is no token of the vocabulary"),
        (lambda d: edit_config(d, eos_token_id=-1), "eos_ids -1 is no token of the vocabulary"),
        (lambda d: edit_config(d, pad_token_id="x"), "pad_token_id 'x' is no token"),
    ],
)
def test_damage_is_named(llada_directory, damage, words):
    damage(llada_directory)
    with pytest.raises(ValueError, match=words) as caught:
        load(llada_directory)
    assert str(llada_directory) in str(caught.value)


SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def edit_index(change):
    def apply(directory):
        index = json.loads((directory / INDEX).read_text())
        change(index["weight_map"])
        (directory / INDEX).write_text(json.dumps(index))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut(SECOND, 9_000), rf"{SECOND} is no complete safetensors file .*truncated"),
        (remove(SECOND), rf"{SECOND} is missing, but {INDEX} lists it"),
        (edit_index(lambda m: m.pop(LAST)), rf"{SECOND} holds tensor '{LAST}', which {INDEX} does"),
        (edit_index(lambda m: m.update(new=SECOND)), rf"{SECOND} lacks tensor 'new'"),
        (edit_index(lambda m: m.update({WTE: "../other.safetensors"})), "must name .safetensors"),
        (edit_index(lambda m: m.update({WTE: "model.bin"})), "must name .safetensors files beside"),
        (edit_index(lambda m: m.clear()), "weight_map must name"),
        (write(INDEX, "{}"), rf"{INDEX}: no weight_map"),
        (write(INDEX, '{"weight_map": {"a": 3}}'), rf"{INDEX}: no weight_map"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, words):
    directory = write_llada_directory(tmp_path / "sharded", shards=2)
    damage(directory)
    with pytest.raises(ValueError, match=words) as caught:
        load(directory)
    assert str(directory) in str(caught.value)


def test_wrong_arguments_are_named(tmp_path, llada_directory):
    with pytest.raises(ValueError, match=r"is no directory; give the folder .*hf download"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"dtype must be one of float64, .*, got 'fp8'"):
        load(llada_directory, dtype="fp8")
    with pytest.raises(TypeError, match='takes width, seed for the built-in model "tiny" only'):
        load(llada_directory, width=3, seed=1)


def test_loading_draws_nothing_from_the_global_generator(llada_directory):
    before = torch.random.get_rng_state()
    load(llada_directory)
    load("tiny")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_loading_is_lazy_about_memory(tmp_path):
    """Construction allocates nothing: a network of 2 GB with a wrong file fails in a moment."""
    wide = write_llada_directory(tmp_path / "wide")
    edit_config(wide, n_layers=200, mlp_hidden_size=80_000)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="lacks tensor"):
        load(wide)
    assert time.perf_counter() - start < 20


def test_attention_never_sees_another_sequence(llada_directory):
    policy = load(llada_directory, dtype="float64")
    parts = [policy.encode(text, chat=False) for text in ("abc", "de", "fghij")]
    lengths = [len(p) for p in parts]
    packed = policy.logits(torch.cat(parts), Visibility.full(lengths)).split(lengths)
    for part, found in zip(parts, packed, strict=True):
        torch.testing.assert_close(found, policy.logits(part[None])[0], rtol=0, atol=1e-12)
