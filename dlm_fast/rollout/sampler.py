"""The denoising loop: prompts in, trajectories out.

Each step runs the network once over the live rows, draws a token at every masked position of each
row's current block, lets the unmasking rule choose positions, and writes their tokens. Rows are
packed one after the other, never padded; a row that is finished leaves the batch. Random numbers
are keyed by (seed, sequence id, position, step of the row), so a row does not depend on its
company.

Letters: ``R`` rows of the call, ``A`` rows of one forward, ``W`` positions of the window, ``T``
packed tokens of one forward, ``N`` positions with statistics, ``K`` positions revealed.
Sources: block-wise low-confidence decoding of LLaDA (arXiv 2502.09992); row-wise end-of-text and
hints as in IGPO (arXiv 2509.10396).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dlm_fast.ops import Rng, Stream
from dlm_fast.rollout.cached_network import CachedNetwork
from dlm_fast.rollout.causal import decode_rows
from dlm_fast.rollout.network import Forward, Network, Recompute
from dlm_fast.rollout.requests import (
    check_causal,
    check_family,
    check_fixed,
    check_max_batch,
    check_prompts,
    check_rule,
    check_sequence_ids,
)
from dlm_fast.rollout.sampler_config import SamplerConfig
from dlm_fast.rollout.trajectory import Trajectory
from dlm_fast.rollout.unmask import ConfiguredRule, Decision, UnmaskRule, check_finite, score_of
from dlm_fast.rollout.window import Windows

OnDone = Callable[[list[int], list[Trajectory]], None]


def sample(
    policy: Any,
    prompts: Sequence[Tensor | str],
    config: SamplerConfig,
    seed: int = 0,
    *,
    sequence_ids: Sequence[int] | Tensor | None = None,
    fixed_ids: Sequence[Tensor | None] | None = None,
    max_batch: int | None = None,
    forward: Forward | None = None,
    rule: UnmaskRule | None = None,
    on_done: OnDone | None = None,
) -> list[Trajectory]:
    """Decodes one response for every prompt; causal families token by token (``causal.py``).

    ``prompts``: texts (encoded with the chat template, if there is one) or id tensors [P].
    ``sequence_ids``: names of the random numbers, 0, 1, 2, ... by default.
    ``fixed_ids``: per prompt None or int64 [max_new_tokens] with given tokens (hints) and the mask
    id where free. Given tokens never change and have step 0 and log-probability 0.
    ``max_batch``: most rows in one forward; changes memory, not results.
    ``forward``: called in place of ``policy.stats``, with the same arguments.
    ``rule``: chooses positions in place of ``config.rule``.
    ``on_done``: called after each forward that finished rows, with their numbers and trajectories,
    while the other rows are still to be decoded.
    """
    check_family(policy, config)
    check_max_batch(max_batch)
    prompt_ids = check_prompts(policy, prompts, config.max_new_tokens)
    ids = check_sequence_ids(sequence_ids, len(prompt_ids))
    if policy.family.kind == "causal":
        check_causal(fixed_ids, rule)
        with torch.no_grad(), evaluating(policy):
            keys: dict[str, Any] = {"max_batch": max_batch, "forward": forward, "on_done": on_done}
            return decode_rows(policy, prompt_ids, config, seed, ids, **keys)
    if config.cache == "tree":  # of rows that never fork, prompts are all that is shared
        config = replace(config, cache="block")
    rule = rule if rule is not None else ConfiguredRule(config)
    check_rule(rule, config)
    fixed_RW = check_fixed(policy, fixed_ids, len(prompt_ids), config)
    family = policy.family
    with torch.no_grad(), evaluating(policy):
        windows = Windows(
            prompt_ids,
            config,
            mask_id=family.mask_id,
            eos_ids=family.eos_ids,
            on_grid=family.kind == "block",
            look_ahead=rule.whole_window,
            fixed_RW=fixed_RW,
            device=getattr(policy, "device", "cpu"),
        )
        network = _network(policy, forward or policy.stats, windows, config, max_batch)
        loop = _Loop(policy, network, windows, config, rule, seed, ids)
        record = partial(
            _trajectories, prompt_ids, windows, config, rule, family.eos_ids, seed, ids, fixed_RW
        )
        made: dict[int, Trajectory] = {}
        # hints may leave a row nothing to decode
        finished = (~windows.live_R).nonzero()[:, 0].tolist()
        while True:
            if finished:
                trajectories = record(finished)
                made |= zip(finished, trajectories, strict=True)
                if on_done is not None:
                    on_done(finished, trajectories)
                network.leave(finished)
            row_A = network.choose()
            if not row_A.numel():
                return [made[r] for r in range(len(prompt_ids))]
            loop.step(row_A)
            finished = row_A[~windows.live_R[row_A]].tolist()


def _network(
    policy: Any, forward: Forward, windows: Windows, config: SamplerConfig, max_batch: int | None
) -> Network:
    if config.cache == "none":
        return Recompute(policy, forward, windows, max_batch)
    return CachedNetwork(policy, forward, windows, config, max_batch)


class _Loop:
    """One call's fixed parts; ``step`` advances the rows it is given by one forward."""

    def __init__(
        self,
        policy: Any,
        network: Network,
        windows: Windows,
        config: SamplerConfig,
        rule: UnmaskRule,
        seed: int,
        sequence_ids: list[int],
    ) -> None:
        self.network, self.windows = network, windows
        self.config, self.rule = config, rule
        self.token_rng = Rng.of(seed, Stream.TOKEN, sequence_ids).to(windows.device)
        self.unmask_rng = Rng.of(seed, Stream.UNMASK, sequence_ids).to(windows.device)
        self.forbid_ids = config.never_drawn(policy.family)

    def step(self, row_A: Tensor) -> None:
        windows = self.windows
        pending_AW = windows.pending_RW[row_A]
        inside_AW = windows.block_RW[row_A] == windows.pointer_R[row_A][:, None]
        selectable_AW = pending_AW & inside_AW
        asked_AW = torch.ones_like(selectable_AW) if self.rule.whole_window else selectable_AW
        row_N, column_N = asked_AW.nonzero(as_tuple=True)
        draw = self._draw(row_A, row_N, column_N)
        stats = self.network.statistics(row_A, row_N, column_N, **draw)
        score_N = score_of(stats, self.config, windows.eos_ids)
        step_A = windows.step_R[row_A]
        decision = Decision(
            stats=stats,
            score_N=score_N,
            row_N=row_N,
            column_N=column_N,
            masked_AW=pending_AW,
            selectable_AW=selectable_AW,
            quota_A=windows.quota(row_A),
            step_A=step_A,
            block_step_A=windows.block_step_R[row_A],
            sequence_A=row_A,
            rng=self.unmask_rng.take(row_A).at(step=step_A),
        )
        chosen_AW = self.rule(decision)
        self._check_choice(chosen_AW, selectable_AW)
        chosen_K = chosen_AW[row_N, column_N].nonzero()[:, 0]
        check_finite(score_N[chosen_K])  # the rules pass NaN over while there is a number
        windows.count_step(row_A)
        windows.reveal(
            row_A[row_N[chosen_K]],
            column_N[chosen_K],
            stats.token[chosen_K],
            stats.logprob[chosen_K],
            score_N[chosen_K],
        )
        windows.advance(row_A, step_cap=self.rule.may_idle)

    def _draw(self, row_A: Tensor, row_N: Tensor, column_N: Tensor) -> dict[str, Any]:
        """How tokens are drawn at these positions."""
        windows, config = self.windows, self.config
        rng = None
        if config.temperature > 0:
            sequence_N = row_A[row_N]
            rng = self.token_rng.take(sequence_N).at(
                position=(windows.prompt_R[sequence_N] + column_N).to(torch.int32),
                step=windows.step_R[sequence_N],
            )
        return {
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
            "forbid_ids": self.forbid_ids,
            "rng": rng,
        }

    def _check_choice(self, chosen_AW: Tensor, selectable_AW: Tensor) -> None:
        if chosen_AW.dtype != torch.bool or chosen_AW.shape != selectable_AW.shape:
            raise ValueError(
                f"the unmasking rule must return bool {list(selectable_AW.shape)}, "
                f"got {chosen_AW.dtype} {list(chosen_AW.shape)}"
            )
        if bool((chosen_AW & ~selectable_AW).any()):
            raise ValueError(
                "the unmasking rule chose a position outside selectable_AW (already revealed, "
                "given, or of another block); return a subset of it"
            )
        if not self.rule.may_idle and not bool(chosen_AW.any(1).all()):
            raise ValueError(
                "the unmasking rule revealed nothing in a row, so decoding would not end; reveal "
                "at least one position of every row, or declare may_idle"
            )


@contextmanager
def evaluating(policy: Any) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode afterwards."""
    training = [m for m in policy.modules() if m.training] if isinstance(policy, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _trajectories(
    prompt_ids: list[Tensor],
    windows: Windows,
    config: SamplerConfig,
    rule: UnmaskRule,
    eos_ids: Sequence[int],
    seed: int,
    sequence_ids: list[int],
    fixed_RW: Tensor | None,
    rows: list[int],
) -> list[Trajectory]:
    """The record of finished rows (A of them)."""
    row_A = torch.tensor(rows, device=windows.device)
    ids_AW = windows.ids_of(row_A).cpu()
    decoded, responses = windows.decoded_R[row_A].tolist(), windows.response_R[row_A].tolist()
    forwards = windows.step_R[row_A].tolist()
    step_map_AW, logprob_AW = windows.step_map_RW[row_A].cpu(), windows.logprob_RW[row_A].cpu()
    confidence_AW = windows.confidence_RW[row_A].cpu() if config.record_confidence else None
    eos = torch.tensor(list(eos_ids), dtype=torch.int64)
    made = []
    for a, r in enumerate(rows):
        ids_W, response, end = ids_AW[a, : decoded[a]], responses[a], decoded[a]
        if not rule.may_idle and bool((ids_W == windows.mask_id).any()):
            raise RuntimeError(
                "a mask token was left in a finished window; this is a bug of the sampler"
            )
        # clones: a view would keep, and save, the tensors of all these rows
        made.append(
            Trajectory(
                prompt_ids=prompt_ids[r].clone(),
                response_ids=ids_W[:response].clone(),
                tail_ids=ids_W[response:].clone(),
                step_map=step_map_AW[a, :end].clone(),
                logp_rollout=logprob_AW[a, :end].clone(),
                confidence=None if confidence_AW is None else confidence_AW[a, :end].clone(),
                hint_mask=None if fixed_RW is None else fixed_RW[r, :response] != windows.mask_id,
                sequence_id=sequence_ids[r],
                seed=seed,
                block_size=config.block_size,
                finish_reason="eos" if bool(torch.isin(ids_W, eos).any()) else "length",
                num_forwards=forwards[a],
            )
        )
    return made
