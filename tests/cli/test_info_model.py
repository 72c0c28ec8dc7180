"""``dlm-fast info MODEL`` says what a checkpoint is, and reads no weights for it."""

import json

import pytest
import torch
from family_directories import FAMILIES
from family_directories import write_family_directory as write

from dlm_fast.cli.main import main


def told(capsys, model):
    assert main(["info", str(model), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_told(tmp_path, capsys, model_type):
    found = told(capsys, write(tmp_path / "model", model_type, shards=2, dtype=torch.bfloat16))
    attention = {"Dream": "full", "sdar": "block-causal, blocks of 4"}
    assert found["family"] == model_type
    assert found["attention"] == attention.get(model_type, "causal")
    assert found["predicted by"].startswith("the token" if model_type == "sdar" else "the row bef")
    masked = model_type in attention
    assert found["mask token"] == ("261 <|mdm_mask|>" if masked else "none")
    assert found["end tokens"] == "257 <|endoftext|>, 260 <|eot_id|>"
    assert found["vocabulary"] == "264 rows, 2 without a token"
    assert found["chat template"] == "yes"
    assert "files, model-00001-of-0000" in found["files"]
    assert found["files"].endswith("bfloat16")


def test_sizes_are_right_and_weights_are_not_read(tmp_path, capsys, monkeypatch):
    directory = write(tmp_path / "model", "qwen2", tokenizer=False, tie_word_embeddings=True)

    def refuse(self, tensor):
        raise AssertionError(f"{tensor} was read")

    monkeypatch.setattr("dlm_fast.models.safetensors_files.TensorFiles.read", refuse)
    found = told(capsys, directory)
    layer = 32 * (2 * 32 + 2 * 16 + 3 * 48) + 32 + 2 * 16 + 2 * 32
    assert found["parameters"] == f"{264 * 32 + 2 * layer + 32:,}, the head is the embedding"
    assert found["end tokens"] == "257"
    assert found["tokenizer"] == "none: token ids only"


def test_runs_and_the_built_in_model_are_told(small_run, capsys):
    for model in ("tiny", small_run):
        assert main(["info", str(model)]) == 0
        out = capsys.readouterr().out
        assert "dlm_fast_tiny" in out
        assert "98 ⟨mask⟩" in out


def test_what_cannot_be_loaded_is_said(tmp_path, capsys):
    assert main(["info", str(tmp_path / "nowhere")]) == 2
    assert "is no directory" in capsys.readouterr().err
    directory = write(tmp_path / "model", "llama")
    (directory / "model.safetensors").write_bytes(b"")
    assert main(["info", str(directory)]) == 2
    assert "no complete safetensors file" in capsys.readouterr().err
