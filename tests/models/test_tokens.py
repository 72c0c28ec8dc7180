"""Tokenizers of checkpoints: end, padding and mask tokens, chat turns, rows without a token."""

import json
import logging

import pytest
import torch
from family_directories import edit_config
from family_directories import write_family_directory as write
from llada_directory import BYTES, CHAT_TEMPLATE, EMBEDDING_ROWS, SPECIAL, VOCABULARY

from dlm_fast import SamplerConfig, load, sample

END, TURN = VOCABULARY["<|endoftext|>"], VOCABULARY["<|eot_id|>"]
MASK = VOCABULARY["<|mdm_mask|>"]
PADDED = tuple(range(len(VOCABULARY), EMBEDDING_ROWS))


def edit_tokenizer(directory, without=(), **changes):
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in without}))


def write_vocabulary(directory):
    """As Dream is published: a vocabulary, and the name of a tokenizer class in its own code."""
    (directory / "tokenizer.json").unlink()
    words = [*BYTES, "he", "Ġt", "Ġthe"]
    (directory / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\nh e\nĠ t\nĠt he\n")
    special = dict(enumerate(SPECIAL, len(words)))
    added = {
        str(index): {"content": token, "special": True, "lstrip": False, "rstrip": False}
        for index, token in special.items()
    }
    edit_tokenizer(
        directory,
        tokenizer_class="DreamTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        added_tokens_decoder=added,
        mask_token="<|mdm_mask|>",
    )
    (directory / "tokenization_dream.py").write_text("raise RuntimeError('executed')\n")
    return {token: index for index, token in special.items()}


def test_a_vocabulary_with_foreign_code_is_read_without_the_code(tmp_path):
    directory = write(tmp_path / "model", "Dream", vocab_size=272)
    ids = write_vocabulary(directory)
    edit_config(directory, ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"))
    policy = load(directory)
    assert policy.family.mask_id == ids["<|mdm_mask|>"]
    assert policy.family.eos_ids == (ids["<|endoftext|>"], ids["<|eot_id|>"])
    assert policy.family.pad_id == ids["<|endoftext|>"]
    text = "the the héllo<|eot_id|>"
    found = policy.encode(text, chat=False).tolist()
    assert policy.tokenizer.convert_ids_to_tokens(found)[:3] == ["t", "he", "Ġthe"]
    assert found[-1] == ids["<|eot_id|>"]
    assert policy.decode(found) == text.removesuffix("<|eot_id|>")
    assert policy.tokenizer.decode(policy.encode("hi")).startswith("<|startoftext|><|start_header")
    policy.save(tmp_path / "saved")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenization_dream.py"):
        assert (tmp_path / "saved" / name).read_bytes() == (directory / name).read_bytes()
    assert torch.equal(load(tmp_path / "saved").encode(text), policy.encode(text))
    (directory / "merges.txt").unlink()
    with pytest.raises(ValueError, match=r"merges\.txt is missing beside vocab\.json"):
        load(directory)


def test_the_end_is_what_any_file_calls_the_end(tmp_path):
    directory = write(tmp_path / "model", "Dream", eos_token_id=[1, 2])
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    assert load(directory).family.eos_ids == (1, 2, 3, END, TURN)
    (directory / "generation_config.json").write_text('{"eos_token_id": 4}')
    edit_config(directory, eos_token_id=None)
    assert load(directory).family.eos_ids == (4, END, TURN)
    assert load(directory, eos_ids=[7, 7]).family.eos_ids == (7,)


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (CHAT_TEMPLATE, True),
        (CHAT_TEMPLATE.replace("<|eot_id|>", ""), False),
        (CHAT_TEMPLATE.replace("<|eot_id|>", "\n"), False),
        ("{% for m in messages %}{{ m['content'] }}\n\n<|eot_id|>\n{% endfor %}", True),
        ("{{ raise_exception('only the system speaks') }}", False),
        ("{% for m in messages %}{{ m['nothing']['deep'] }}{% endfor %}", False),
        (None, False),
    ],
)
def test_the_end_of_a_chat_turn_follows_from_the_template(tmp_path, template, found):
    directory = write(tmp_path / "model", "Dream")
    edit_tokenizer(directory, chat_template=template)
    assert load(directory).family.eos_ids == ((END, TURN) if found else (END,))


def test_a_chat_template_may_have_a_file_of_its_own(tmp_path):
    directory = write(tmp_path / "model", "sdar")
    edit_tokenizer(directory, without=("chat_template",))
    assert load(directory).tokenizer.chat_template is None
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    policy = load(directory)
    assert policy.tokenizer.decode(policy.encode("hi")).startswith("<|startoftext|><|start_header")
    assert TURN in policy.family.eos_ids
    policy.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_padding_falls_back_to_the_tokenizer(tmp_path):
    directory = write(tmp_path / "model", "Dream", pad_token_id=5)
    assert load(directory).family.pad_id == 5
    edit_config(directory, pad_token_id=None)
    assert load(directory).family.pad_id == END


def test_the_mask_comes_from_config_then_tokenizer_then_the_caller(tmp_path, caplog):
    directory = write(tmp_path / "model", "sdar")
    edit_config(directory, without=("mask_token_id",))
    with pytest.raises(ValueError, match=r"names the mask token.*pass mask_id=\.\.\. to load"):
        load(directory)
    edit_tokenizer(directory, mask_token="<|mdm_mask|>")
    assert load(directory).family.mask_id == MASK
    assert load(directory, mask_id=9).family.mask_id == 9
    with caplog.at_level(logging.WARNING, "dlm_fast"):
        assert load(directory).family.mask_id == MASK
        assert not caplog.messages
        edit_config(directory, mask_token_id=8)
        assert load(directory).family.mask_id == 8
    assert "mask_token_id 8, the tokenizer 261" in caplog.text


def test_causal_models_have_no_mask(tmp_path):
    directory = write(tmp_path / "model", "qwen2")
    edit_tokenizer(directory, mask_token="<|mdm_mask|>")
    assert load(directory).family.mask_id is None
    assert load(directory, mask_id=3).family.mask_id == 3


def test_rows_without_a_token_are_never_drawn(tmp_path):
    directory = write(tmp_path / "model", "Dream")
    policy = load(directory)
    assert policy.family.unused_ids == PADDED
    hole = load(write(tmp_path / "bare", "Dream", tokenizer=False))
    assert hole.family.unused_ids == ()
    assert load(directory, mask_id=PADDED[1]).family.unused_ids == PADDED[:1]
    settings = SamplerConfig(max_new_tokens=16, block_size=16, steps=2, temperature=1.0)
    with torch.no_grad():  # these rows would win everywhere
        for rows in (policy, hole):
            rows.lm_head.weight[list(PADDED)] *= 1000
    prompts = [torch.tensor([5, 6, 7])] * 4
    drawn = [
        torch.cat([t.response_ids for t in sample(each, prompts, settings, seed=1)])
        for each in (policy, hole)
    ]
    padded = torch.tensor(PADDED)
    assert not torch.isin(drawn[0], padded).any()
    assert torch.isin(drawn[1], padded).any()


def test_tokens_beyond_the_model_are_refused_where_they_are_needed(tmp_path, caplog):
    directory = write(tmp_path / "model", "qwen3", vocab_size=260, tie_word_embeddings=True)
    with caplog.at_level(logging.WARNING, "dlm_fast"):
        policy = load(directory)
    assert "2 tokens of the tokenizer have ids beyond the model's vocabulary of 260" in caplog.text
    assert policy.encode("fine", chat=False).numel() == 4
    with pytest.raises(ValueError, match=r"writes '<\|eot_id\|>' as 260, .* has 260 rows"):
        policy.encode("a<|eot_id|>", chat=False)
    edit_tokenizer(directory, eos_token="<|mdm_mask|>")
    with pytest.raises(ValueError, match="eos_ids 261 is no token of the vocabulary of 260"):
        load(directory)


def test_sequences_longer_than_the_model_are_refused(tmp_path):
    directory = write(tmp_path / "model", "Dream", max_position_embeddings=16)
    policy = load(directory)
    settings = SamplerConfig(max_new_tokens=8, block_size=8, steps=8)
    sample(policy, [torch.arange(8)], settings)
    with pytest.raises(ValueError, match="9 tokens plus 8 new ones exceeds the model's 16"):
        sample(policy, [torch.arange(9)], settings)
    with pytest.raises(ValueError, match=r"position 16, .* made for sequences of 16.*max_length"):
        policy.logits(torch.zeros(1, 17, dtype=torch.int64))
    longer = load(directory, max_length=32)
    assert longer.logits(torch.zeros(1, 17, dtype=torch.int64)).shape[1] == 17
    sample(longer, [torch.arange(9)], settings)
    with pytest.raises(ValueError, match="max_length must be a positive integer, got -1"):
        load(directory, max_length=-1)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("generation_config.json", '{"eos_token_id": [[1]]}', r"eos_ids \[1\] is no token"),
        ("generation_config.json", '{"eos_token_id": "2"}', r"eos_ids '2' is no token"),
        ("generation_config.json", '{"eos_token_id": true}', "eos_ids True is no token"),
        ("generation_config.json", '{"eos_token_id": 1e3}', r"eos_ids 1000\.0 is no token"),
        ("generation_config.json", "[" * 100_000, r"generation_config\.json is not JSON"),
        ("generation_config.json", "\udcff", r"generation_config\.json is not JSON"),
    ],
)
def test_ids_of_the_wrong_kind_are_named(tmp_path, file, content, words):
    directory = write(tmp_path / "model", "Dream")
    (directory / file).write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=words) as caught:
        load(directory)
    assert str(directory) in str(caught.value)


def test_a_vocabulary_of_another_size_is_named_at_once(tmp_path):
    directory = write(tmp_path / "model", "Dream")
    edit_config(directory, vocab_size=10**13)
    with pytest.raises(ValueError, match="the tokenizer has 262 tokens: they belong to different"):
        load(directory)
    for key in ("mask_token_id", "pad_token_id"):
        edit_config(directory, vocab_size=EMBEDDING_ROWS, **{key: [1]})
        with pytest.raises(ValueError, match=r"(mask_id|pad_token_id) \[1\] is no token"):
            load(directory)
        edit_config(directory, **{key: 5})
