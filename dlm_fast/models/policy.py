"""The model that is sampled and trained: a backbone, a head and their requests in one forward.

T packed rows, B sequences, S sequence length, N selected rows, P prompt tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dlm_fast.models import text
from dlm_fast.models.backbone import refuse_mask, set_checkpointing
from dlm_fast.models.family import Family
from dlm_fast.models.head import Head
from dlm_fast.models.lora import Adapters, adapters_off, merged_state, save_adapters
from dlm_fast.models.requests import LogitsRequest, ScoreRequest, StatsRequest
from dlm_fast.models.save import save_checkpoint
from dlm_fast.models.source import Source
from dlm_fast.models.tree_rows import KeptRows
from dlm_fast.ops import Rng, TokenStats
from dlm_fast.ops.visibility import Visibility

Pattern = Visibility | KeptRows
"""who sees whom: all keys are rows of the same pack, or some are kept"""


class Policy(nn.Module):
    """Everything goes through ``forward``: wrappers for several processes see nothing else."""

    backbone: PreTrainedModel
    lm_head: Head

    def __init__(
        self,
        backbone: PreTrainedModel,
        lm_head: Head,
        family: Family,
        source: Source,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.lm_head = lm_head
        self.family = family
        self.source = source
        self.tokenizer = tokenizer
        self.adapters: Adapters | None = None
        """low-rank adapters, where ``load`` was given ``lora``: they alone are trained"""

    def forward(
        self,
        input_ids: Tensor | None = None,
        visibility: Pattern | None = None,
        *,
        score: ScoreRequest | None = None,
        stats: StatsRequest | None = None,
        logits: bool = False,
        hidden: Tensor | None = None,
        idle: bool = False,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """Answers exactly one request.

        ``input_ids`` int64 [T] is a pack under ``visibility``; [B, S] needs none, its rows are then
        sequences under the family's own attention. Rows of a request count the flattened input.
        Under ``KeptRows`` the input is the new tokens alone, and nothing has a gradient.

        ``score`` gives ``ScoreOutput``, ``stats`` ``TokenStats``, ``logits=True`` the logits as the
        network emits them [T, V] or [B, S, V], ``hidden`` int [N] the last hidden states, after the
        final norm, of these rows [N, D]. ``idle=True`` takes no input: a scalar 0 whose
        gradient is zero in every parameter, for a process that has nothing left to train on while
        the others do. ``attention_mask`` exists to be refused.
        """
        refuse_mask(attention_mask)
        asked = [score is not None, stats is not None, bool(logits), hidden is not None, bool(idle)]
        if sum(asked) != 1:
            names = ("score", "stats", "logits", "hidden", "idle")
            given = [name for name, is_given in zip(names, asked, strict=True) if is_given]
            raise ValueError(
                f"a forward pass answers one request of {', '.join(names)}; got {given or 'none'}"
            )
        if idle:
            return self._idle()
        if input_ids is None:
            raise ValueError("input_ids is missing; only idle=True goes without")
        hidden_TD = self._hidden(input_ids, visibility)
        if hidden is not None:
            return hidden_TD.index_select(0, hidden.to(hidden_TD.device).long())
        if logits:
            # shaped before the product: sharding wrappers mistrust outputs that are views
            return self.lm_head(hidden_TD.view(*input_ids.shape, -1), LogitsRequest())
        return self.lm_head(hidden_TD, score if score is not None else stats)

    def stats(
        self,
        input_ids: Tensor,
        visibility: Pattern | None = None,
        *,
        rows: Tensor,
        targets: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        forbid_ids: Sequence[int] = (),
        rng: Rng | None = None,
    ) -> TokenStats:
        """Tokens drawn at ``rows`` and their statistics, without gradient."""
        request = StatsRequest(
            rows=rows,
            targets=targets,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            forbid_ids=forbid_ids,
            rng=rng,
        )
        with torch.no_grad():
            return self(input_ids, visibility, stats=request)

    def logits(
        self, input_ids: Tensor, visibility: Pattern | None = None, aligned: bool = True
    ) -> Tensor:
        """[T, V] or [B, S, V] like ``input_ids``.

        ``aligned``: row i predicts token i, and the first token of a sequence, which a family with
        a logit shift cannot predict, has NaN. False: rows as the network emits them.
        """
        emitted = self(input_ids, visibility, logits=True)
        if not aligned or self.family.logit_shift == 0:
            return emitted
        pred_T = self._visibility(input_ids, visibility).pred.to(emitted.device)
        emitted_TV = emitted.view(-1, emitted.shape[-1]).index_select(0, pred_T.clamp(min=0))
        aligned_TV = emitted_TV.masked_fill((pred_T < 0)[:, None], float("nan"))
        return aligned_TV.view(emitted.shape)

    def predicting_rows(self, rows: Tensor, visibility: Pattern) -> Tensor:
        """int32 [N]: the rows whose hidden states predict the tokens at ``rows``."""
        if rows.numel() and rows.device.type == "cpu":
            low, high = (int(bound) for bound in rows.aminmax())
            if low < 0 or high >= visibility.num_queries:
                raise ValueError(
                    f"rows holds {low if low < 0 else high}, but the pack has "
                    f"{visibility.num_queries} rows"
                )
        if self.family.logit_shift == 0:
            return rows.to(torch.int32)
        pred_N = visibility.pred.to(rows.device)[rows.long()]
        if pred_N.device.type == "cpu" and bool((pred_N < 0).any()):
            row = int(rows[pred_N < 0][0])
            raise ValueError(
                f"row {row} is the first token of its sequence, which {self.family.model_type} "
                "cannot predict; start the prompt with at least one token"
            )
        return pred_N

    def encode(self, prompt: str, chat: bool = True) -> Tensor:
        """int64 [P] on the CPU; ``chat`` applies the tokenizer's chat template if it has one."""
        return text.encode(self.tokenizer, prompt, chat, self.family)

    def decode(self, token_ids: Tensor | Sequence[int]) -> str:
        """Text up to the first end-of-sequence token, without special tokens."""
        return text.decode(self.tokenizer, token_ids, self.family.eos_ids)

    def save(
        self,
        path: str | Path,
        *,
        dtype: str | None = None,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Writes a directory that loads where the source did: its config, names, tokenizer, code.

        ``dtype`` None writes parameters as they are, so nothing is rounded; "source" writes each
        tensor in the type the source had; or a name like "bfloat16". ``state_dict`` replaces the
        parameters where they are sharded over processes and were gathered by the caller. Adapters
        are merged into the weights, and written by themselves into ``adapter/`` inside.
        """
        state = self.state_dict() if state_dict is None else state_dict
        if self.adapters is not None:
            plain = merged_state(state, self.adapters)
            save_checkpoint(Path(path), plain, self.source, dtype)
            self.save_adapter(Path(path) / "adapter", state_dict=state)
        else:
            save_checkpoint(Path(path), state, self.source, dtype)

    def save_adapter(
        self, path: str | Path, *, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Writes the adapters alone in peft's format, for the source's own model class."""
        state = self.state_dict() if state_dict is None else state_dict
        save_adapters(Path(path), state, self._needed_adapters(), self.source.format.tensor_name)

    def reference(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy computes as it was before its adapters were trained."""
        self._needed_adapters()
        return adapters_off(self.backbone)

    def idle_loss(self) -> Tensor:
        """A scalar 0 whose gradient is zero in every parameter."""
        return self(idle=True)

    def set_block_size(self, block_size: int) -> None:
        """From now on a block model's own blocks, here and in what ``save`` writes."""
        if self.family.kind != "block":
            raise ValueError(
                f"model family {self.family.model_type!r} has no blocks, its attention is "
                f"{self.family.kind}; leave its block size alone"
            )
        if block_size < 1:
            raise ValueError(f"block_size must be a positive integer, got {block_size}")
        self.family = replace(self.family, block_size=block_size)
        self.source = self.source.with_config(block_size=block_size)

    def gradient_checkpointing_enable(self) -> None:
        """Keep one hidden state per layer for the backward pass and recompute the rest."""
        set_checkpointing(self.backbone, True)

    def gradient_checkpointing_disable(self) -> None:
        set_checkpointing(self.backbone, False)

    def tie_weights(self) -> None:
        """Wrappers that rebuild parameters call this to share a tied head again."""
        if self.source.tied_head:
            self.lm_head.weight = self._embedding.weight  # type: ignore[assignment]

    @property
    def config(self) -> PreTrainedConfig:
        """The backbone's configuration; wrappers read sizes from it."""
        return self.backbone.config

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def _no_split_modules(self) -> list[str]:
        """Layer classes that sharding wrappers wrap one by one."""
        return list(self.backbone._no_split_modules or ())

    @property
    def _embedding(self) -> nn.Embedding:
        embedding = self.backbone.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        return embedding

    def _needed_adapters(self) -> Adapters:
        if self.adapters is None:
            raise ValueError(
                "this policy has no adapters: its own weights are trained; load it with "
                "lora=LoraOptions(rank=16), or load the checkpoint a second time as a reference"
            )
        return self.adapters

    def _idle(self) -> Tensor:
        token_1 = torch.zeros(1, dtype=torch.int64, device=self.device)
        hidden_TD = self._hidden(token_1[None], None)
        request = ScoreRequest(token_1.to(torch.int32), token_1, weights=torch.zeros(1))
        return self.lm_head(hidden_TD, request).objective

    def _hidden(self, input_ids: Tensor, visibility: Pattern | None) -> Tensor:
        """[T, D], after the final norm."""
        visibility = self._visibility(input_ids, visibility)
        if input_ids.device.type == "cpu" and input_ids.numel():
            low, high = (int(bound) for bound in input_ids.aminmax())
            rows = self._embedding.num_embeddings
            if low < 0 or high >= rows:
                raise ValueError(
                    f"input_ids holds {low if low < 0 else high}, outside the vocabulary of {rows}"
                )
        ids_BS = input_ids if input_ids.dim() == 2 else input_ids[None]
        self._check_positions(visibility)
        visibility = visibility.to(ids_BS.device)
        hidden_BSD = self.backbone(
            input_ids=ids_BS,
            position_ids=visibility.position_ids.view(ids_BS.shape),
            visibility=visibility,
            use_cache=False,
        ).last_hidden_state
        return hidden_BSD.flatten(0, 1)

    def _check_positions(self, visibility: Pattern) -> None:
        position_ids, limit = visibility.position_ids, self.family.max_length
        if limit is None or position_ids.device.type != "cpu" or not position_ids.numel():
            return  # reading values elsewhere would wait for the device
        if (last := int(position_ids.max())) >= limit:
            raise ValueError(
                f"a sequence reaches position {last}, but the model was made for sequences of "
                f"{limit} tokens; shorten it, or load the model with max_length={last + 1}"
            )

    def _visibility(self, input_ids: Tensor, visibility: Pattern | None) -> Pattern:
        if input_ids.dim() not in (1, 2) or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be int64 [T] or [B, S], got {input_ids.dtype} "
                f"{list(input_ids.shape)}"
            )
        if visibility is None:
            return self._own_visibility(input_ids)
        rows = input_ids.numel()
        if isinstance(visibility, KeptRows):
            self._check_cached(input_ids, visibility)
        elif visibility.num_queries != rows or visibility.num_keys != rows:
            raise ValueError(
                f"input_ids has {rows} tokens, but visibility has {visibility.num_queries} query "
                f"rows and {visibility.num_keys} key rows"
            )
        return visibility

    def _check_cached(self, input_ids: Tensor, cached: KeptRows) -> None:
        if input_ids.shape != cached.position_ids.shape:
            raise ValueError(
                f"input_ids is {list(input_ids.shape)}, but the cached forward has "
                f"[{cached.num_queries}] new rows"
            )
        if torch.is_grad_enabled():
            raise ValueError(
                "kept keys and values carry no gradient: forward them under torch.no_grad(), or "
                "pass a Visibility over the whole sequence"
            )

    def _own_visibility(self, input_ids: Tensor) -> Visibility:
        if input_ids.dim() == 1:
            raise ValueError(
                f"input_ids [{input_ids.shape[0]}] is a pack and needs "
                "visibility=Visibility.full(lengths) or another; one sequence is input_ids[None]"
            )
        lengths = [input_ids.shape[1]] * input_ids.shape[0]
        if self.family.kind == "causal":
            return Visibility.causal(lengths)
        if self.family.kind == "block":
            assert self.family.block_size is not None
            return Visibility.block_causal(lengths, self.family.block_size)
        return Visibility.full(lengths)
