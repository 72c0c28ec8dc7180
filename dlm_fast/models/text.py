"""Between text and token ids, with a tokenizer that a checkpoint may or may not have."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from dlm_fast.models.family import Family

_TURN = "a turn of text"


def load_tokenizer(
    directory: Path, vocabulary_class: type[PreTrainedTokenizerBase] | None = None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, without its code and without the network; None if absent.

    ``vocabulary_class`` reads vocab.json and merges.txt where there is no tokenizer.json.
    """
    tokenizer_class: Any = AutoTokenizer
    if (directory / "tokenizer.json").is_file():
        # not AutoTokenizer: it would ask config.json, where families name code of their own
        tokenizer_class, files = PreTrainedTokenizerFast, "tokenizer.json"
    elif vocabulary_class is not None and (directory / "vocab.json").is_file():
        tokenizer_class, files = vocabulary_class, "vocab.json"
        if not (directory / "merges.txt").is_file():
            raise ValueError(
                f"{directory / 'merges.txt'} is missing beside vocab.json; copy or download it "
                "again, or remove vocab.json to work with token ids alone"
            )
    elif (directory / "tokenizer_config.json").is_file():
        files = "tokenizer_config.json"
    else:
        return None
    try:
        return tokenizer_class.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ValueError(
            f"{directory / files}: the tokenizer cannot be read ({error}); repair the file, or "
            "remove it to work with token ids alone"
        ) from error


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template writes after an answer, if it writes one."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": _TURN}, {"role": "assistant", "content": _TURN}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
        after = tokenizer(text.rpartition(_TURN)[2], add_special_tokens=False)["input_ids"]
    except Exception:  # templates are programs and may refuse any conversation
        return None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((token for token in after if token in special), None)


def tokenizer_from_files(files: dict[str, bytes]) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model that has no directory yet."""
    with tempfile.TemporaryDirectory() as directory:
        for name, content in files.items():
            (Path(directory) / name).write_bytes(content)
        return load_tokenizer(Path(directory))


def encode(
    tokenizer: PreTrainedTokenizerBase | None, prompt: str, chat: bool, family: Family
) -> Tensor:
    """int64 [P]."""
    tokenizer = _needed(tokenizer)
    try:
        if chat and tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            chat_text = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, tokenize=False
            )
            ids = tokenizer(str(chat_text), add_special_tokens=False)["input_ids"]
        else:
            ids = tokenizer(prompt)["input_ids"]
    except Exception as error:  # the tokenizers library raises bare Exception
        unknown = _unknown_character(tokenizer, prompt)
        raise ValueError(
            f"the tokenizer cannot encode {unknown or prompt!r} ({error}); replace it in the text"
        ) from error
    if family.mask_id is not None and family.mask_id in ids:
        mask = tokenizer.convert_ids_to_tokens(family.mask_id)
        raise ValueError(
            f"the prompt holds the mask token {mask!r}, which stands for text still to be decoded; "
            "remove it from the prompt"
        )
    beyond = next((token for token in ids if token >= family.vocab_size), None)
    if beyond is not None:
        raise ValueError(
            f"the tokenizer writes {tokenizer.convert_ids_to_tokens(beyond)!r} as {beyond}, but "
            f"the model's vocabulary has {family.vocab_size} rows: the tokenizer was extended "
            "without the model; use the model's own, or remove that token from the text"
        )
    return torch.tensor(ids, dtype=torch.int64)


def decode(
    tokenizer: PreTrainedTokenizerBase | None,
    token_ids: Tensor | Sequence[int],
    eos_ids: Sequence[int],
) -> str:
    """Text before the first end-of-sequence token, without special tokens."""
    ids = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
    end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))
    return str(
        _needed(tokenizer).decode(
            ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    )


def _unknown_character(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """The first character that fails alone, as for tokenizers of characters."""
    for character in prompt:
        try:
            tokenizer(character)
        except Exception:
            return character
    return ""


def _needed(tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError(
            "this model has no tokenizer: put tokenizer.json and tokenizer_config.json into its "
            "directory, or pass token ids instead of text"
        )
    return tokenizer
