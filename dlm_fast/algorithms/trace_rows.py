"""From recorded rollouts to the rows of forward passes: what was visible when a token was revealed.

A full-attention model needs a sequence of its own for each (merged) step: tokens of earlier steps
visible, the others masked. A block-causal one needs one pack for the whole group
(``ops.trace_pack``). The baselines put random masks where the trace puts steps.
Source: TraceRL, arXiv 2509.06949, sections 4.1 and 4.2.

Letters: ``n`` tokens of a response, its tail included, ``C`` recorded or drawn orders, ``T`` rows,
``U`` target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from dlm_fast.ops import (
    Rng,
    Stream,
    TraceNode,
    TracePack,
    Visibility,
    fill_bins,
    join_packs,
    mix64,
    philox_uniform,
    trace_pack,
)
from dlm_fast.rollout.trajectory import Trajectory

NEVER = 1 << 30
"""step of a token that was never visible: masked in every state, never a target"""

Estimator = Literal["trace", "random_masking", "coupled"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Traced:
    """A response as it will be scored."""

    trajectory: Trajectory
    ids: Tensor
    """int64 [n], response and tail as far as a model may have seen them"""
    step: Tensor
    """int32 [C, n]; 0: given, ``NEVER``: never visible"""
    trainable: Tensor
    """bool [C, n]"""
    is_recorded: bool = True
    """the steps are those of decoding; False: masks were drawn"""

    @property
    def num_targets(self) -> int:
        return int(self.trainable.sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetRows:
    """One forward pass and its targets."""

    input_ids: Tensor
    """int64 [T]"""
    visibility: Visibility
    rows: Tensor
    """int32 [U], rows of the target tokens; ``policy.predicting_rows`` says which predict them"""
    targets: Tensor
    """int64 [U]"""
    response: Tensor
    """int64 [U], index into the responses that the rows were made from"""
    copy: Tensor
    """int64 [U], which order"""
    token: Tensor
    """int64 [U], index in the response"""
    step: Tensor
    """int64 [U], after merging"""

    def to(self, device: torch.device | str) -> TargetRows:
        """For a model on ``device``."""
        moved = {name: value.to(device) for name, value in vars(self).items()}
        return TargetRows(**moved)


def traced(
    trajectory: Trajectory,
    *,
    kind: str,
    eos_ids: Sequence[int],
    block_size: int,
    num_pads: int = 0,
    window: int = 0,
) -> Traced:
    """What a rollout recorded, as far as it counts.

    Targets are drawn tokens up to the first end of text, and ``num_pads`` behind it. Tokens that
    were filled in and not drawn were masks to the model; a block model never came to their blocks.
    Blocks that are larger than those decoded, which they must be made of, end in masks where
    decoding ended inside of one, up to a response of ``window`` tokens.
    """
    if trajectory.step_map is None:
        raise ValueError(
            "a rollout has no step_map, the order in which its tokens were revealed; TraceRL needs "
            "sampled rollouts, not demonstrations"
        )
    ids = torch.cat([trajectory.response_ids, trajectory.tail_ids])
    step = _checked_steps(trajectory, ids, eos_ids)
    if kind == "block":
        _check_blocks(trajectory, block_size)
        _check_block_order(step, trajectory.prompt_length, trajectory.block_size or block_size)
    is_drawn = step > 0
    # nothing is filled into a tail: what was not drawn there was given
    is_given = ~is_drawn & (torch.arange(len(ids)) >= trajectory.response_length)
    if trajectory.hint_mask is not None:
        is_given[: trajectory.response_length] = trajectory.hint_mask
    step[~is_drawn & ~is_given] = NEVER
    length = length_to_end(trajectory, eos_ids)
    if length and int(trajectory.response_ids[length - 1]) in eos_ids:
        length += num_pads
    trainable = is_drawn & (torch.arange(len(ids)) < length)
    count = len(ids)
    if kind == "block":
        last = int(is_drawn.nonzero().max()) if bool(is_drawn.any()) else -1
        prompt = trajectory.prompt_length
        end = max(0, -(-(prompt + last + 1) // block_size) * block_size - prompt)
        count = min(end, max(count, window))
    # any id will do: rows of tokens that were never visible hold the mask
    missing = max(0, count - len(ids))
    return Traced(
        trajectory=trajectory,
        ids=pad(ids[:count], (0, missing)),
        step=pad(step[None, :count], (0, missing), value=NEVER),
        trainable=pad(trainable[None, :count], (0, missing)),
    )


def _checked_steps(trajectory: Trajectory, ids: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """int32 [n]: a copy of the recorded steps, one of each token."""
    assert trajectory.step_map is not None
    for name, recorded in (
        ("step_map", trajectory.step_map),
        ("logp_rollout", trajectory.logp_rollout),
    ):
        if recorded is not None and recorded.shape != ids.shape:
            raise ValueError(
                f"a rollout's {name} has shape {list(recorded.shape)} for "
                f"{trajectory.response_length} response and {trajectory.tail_ids.numel()} tail "
                "tokens; it must hold one number of each, in their order"
            )
    step = trajectory.step_map.to(torch.int32).clone()
    length = trajectory.response_length
    is_named = step[:length] > 0
    is_named |= torch.isin(trajectory.response_ids, torch.tensor(list(eos_ids), dtype=torch.int64))
    if trajectory.hint_mask is not None:
        is_named |= trajectory.hint_mask
    wrong = torch.cat([~is_named, torch.zeros(len(ids) - length, dtype=torch.bool)]) | (step < 0)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        raise ValueError(
            f"a rollout's step_map says {int(step[token])} at token {token}; steps count from 1, "
            "and 0 is for given tokens (hint_mask) and end of text that was filled in"
        )
    return step


def _check_block_order(step: Tensor, prompt: int, block_size: int) -> None:
    """A block is finished before the next one begins."""
    drawn = (step > 0).nonzero()[:, 0]
    blocks, of_drawn = ((prompt + drawn) // block_size).unique(return_inverse=True)
    first = torch.full((len(blocks),), NEVER, dtype=torch.int32)
    first = first.scatter_reduce(0, of_drawn, step[drawn], "amin")
    last = torch.zeros_like(first).scatter_reduce(0, of_drawn, step[drawn], "amax")
    early = (last[:-1] >= first[1:]).nonzero()[:, 0]
    if early.numel():
        i = int(early[0])
        raise ValueError(
            f"a rollout's step_map reveals tokens of block {int(blocks[i + 1])} at step "
            f"{int(first[i + 1])} and still some of block {int(blocks[i])} at step {int(last[i])}; "
            f"blocks of {block_size} tokens from position 0 finish one after the other, so it was "
            "sampled with other blocks"
        )


def length_to_end(trajectory: Trajectory, eos_ids: Sequence[int]) -> int:
    """Tokens of the response up to its first end of text, which counts."""
    is_end = torch.isin(trajectory.response_ids, torch.tensor(list(eos_ids), dtype=torch.int64))
    if bool(is_end.any()):
        return int(is_end.nonzero()[0, 0]) + 1
    return trajectory.response_length


def _check_blocks(trajectory: Trajectory, block_size: int) -> None:
    decoded = trajectory.block_size
    if decoded and block_size % decoded:
        raise ValueError(
            f"a rollout was decoded in blocks of {decoded} tokens, which blocks of {block_size} "
            f"would cut; train in blocks of a multiple of {decoded}"
        )


def randomly_masked(
    response: Traced,
    *,
    estimator: Estimator,
    num_masks: int,
    low: float,
    high: float,
    block_size: int | None,
    seed: int,
    offset: int | None = None,
) -> Traced:
    """The same response with drawn masks in place of its trace: masked tokens are targets.

    A copy's rate of masking is uniform between ``low`` and ``high``; where ``block_size`` is given
    each block has a rate of its own. ``offset`` is the place of the response's first token on the
    grid of blocks, by default its position in the sequence. ``coupled`` draws ``num_masks`` / 2
    masks, each followed by its complement. Tokens that are never targets keep their place in the
    trace if they were known, and are masked otherwise.
    """
    may_train = response.trainable[0]
    count = len(response.ids)
    offset = response.trajectory.prompt_length if offset is None else offset
    draws = num_masks // 2 if estimator == "coupled" else num_masks
    masks = []
    rng = Rng.of(seed, Stream.MASK, [response.trajectory.sequence_id])
    rate_rng = Rng.of(mix64(seed, 1), Stream.MASK, [response.trajectory.sequence_id])
    group = (
        torch.zeros(count, dtype=torch.int64)
        if block_size is None
        else (torch.arange(count) + offset) // block_size - offset // block_size
    )
    for draw in range(draws):
        uniform = philox_uniform(rng.at(draw=draw), max(1, count))[0, :count]
        rate = philox_uniform(rate_rng.at(draw=draw), int(group.max()) + 1 if count else 1)[0]
        masked = uniform < low + (high - low) * rate[group]
        masks += [masked, ~masked] if estimator == "coupled" else [masked]
    masked_Cn = torch.stack(masks) if masks else torch.zeros(0, count, dtype=torch.bool)
    target_Cn = masked_Cn & may_train
    known = response.step[0] == 0
    step_Cn = torch.where(target_Cn, 2, torch.where(may_train | known, 1, NEVER))
    step_Cn = torch.where(known, 0, step_Cn).to(torch.int32)
    return Traced(
        trajectory=response.trajectory,
        ids=response.ids,
        step=step_Cn,
        trainable=target_Cn,
        is_recorded=False,
    )


def rows_of_slices(
    responses: Sequence[Traced], *, mask_id: int, shrink: int, row_budget: int
) -> Iterator[TargetRows]:
    """Full attention: a sequence per response, order and step, in packs of ``row_budget``."""
    slices = [
        (index, copy, step, members)
        for index, response in enumerate(responses)
        for copy in range(len(response.step))
        for step, members in _slices(response.step[copy], response.trainable[copy], shrink)
    ]
    sizes = [
        responses[index].trajectory.prompt_length + len(responses[index].ids)
        for index, *_ in slices
    ]
    for members in fill_bins(sizes, row_budget):
        yield _pack_slices(responses, [slices[i] for i in members], mask_id)


def _slices(step: Tensor, trainable: Tensor, shrink: int) -> Iterator[tuple[int, Tensor]]:
    """(merged step, merged steps of all tokens) of each slice that has a target."""
    if not bool(trainable.any()):
        return
    groups = step[(step > 0) & (step < NEVER)].unique().split(shrink)
    merged = step.clone()
    for group in groups:
        merged[torch.isin(step, group)] = group[-1]
    for value in (int(group[-1]) for group in groups):
        if bool((trainable & (merged == value)).any()):
            yield value, merged


def _pack_slices(
    responses: Sequence[Traced], slices: Sequence[tuple[int, int, int, Tensor]], mask_id: int
) -> TargetRows:
    ids: list[Tensor] = []
    rows: list[Tensor] = []
    names: list[Tensor] = []
    lengths: list[int] = []
    for index, copy, step, merged in slices:
        response = responses[index]
        prompt = response.trajectory.prompt_length
        token = (response.trainable[copy] & (merged == step)).nonzero()[:, 0]
        rows.append(sum(lengths) + prompt + token)
        name = torch.tensor([[index, copy, step]]).expand(len(token), -1)
        names.append(torch.cat([name, token[:, None], response.ids[token, None]], dim=1))
        ids += [
            response.trajectory.prompt_ids,
            torch.where(merged >= step, mask_id, response.ids),
        ]
        lengths.append(prompt + len(response.ids))
    response_U, copy_U, step_U, token_U, target_U = torch.cat(names).unbind(1)
    return TargetRows(
        input_ids=torch.cat(ids),
        visibility=Visibility.full(lengths),
        rows=torch.cat(rows).to(torch.int32),
        targets=target_U,
        response=response_U,
        copy=copy_U,
        token=token_U,
        step=step_U,
    )


def rows_of_blocks(
    responses: Sequence[Traced], *, block_size: int, mask_id: int, shrink: int, row_budget: int
) -> Iterator[TargetRows]:
    """Block-causal attention: responses to one prompt behind it, in packs of ``row_budget``."""

    def pack(members: Sequence[int]) -> TracePack:
        nodes = _nodes([responses[i] for i in members])
        return trace_pack(nodes, block_size=block_size, mask_id=mask_id, shrink=shrink)

    by_prompt: dict[tuple[int, bytes], list[int]] = {}
    for index, response in enumerate(responses):
        prompt = response.trajectory.prompt_ids
        key = (response.trajectory.group_id, prompt.numpy().tobytes())
        by_prompt.setdefault(key, []).append(index)
    stars: list[list[int]] = []
    for members in by_prompt.values():
        prompt = responses[members[0]].trajectory.prompt_ids
        shared = len(prompt) // block_size * block_size
        own = [pack([i]).num_rows - shared for i in members]
        fits = fill_bins(own, max(1, row_budget - shared))
        stars += [[members[i] for i in chosen] for chosen in fits]
    made = [(star, pack(star)) for star in stars]
    # drawn masks may leave a response without a target
    stars = [star for star, packed in made if packed.rows.numel()]
    packs = [packed for _, packed in made if packed.rows.numel()]
    for chosen in fill_bins([p.num_rows for p in packs], row_budget):
        joined = join_packs([packs[i] for i in chosen])
        place = torch.tensor(
            [index for i in chosen for index in stars[i]], dtype=torch.int64
        )  # response of (tree, node), trees one after the other
        first = torch.tensor([0, *(len(stars[i]) for i in chosen)]).cumsum(0)
        yield TargetRows(
            input_ids=joined.input_ids,
            visibility=joined.visibility,
            rows=joined.rows,
            targets=joined.targets,
            response=place[first[joined.tree.long()] + joined.node.long() - 1],
            copy=joined.copy.long(),
            token=joined.token.long(),
            step=joined.step.long(),
        )


def _nodes(responses: Sequence[Traced]) -> list[TraceNode]:
    prompt = responses[0].trajectory.prompt_ids
    copies = len(responses[0].step)
    root = TraceNode(parent=-1, ids=prompt, step=torch.zeros(copies, len(prompt)).int())
    return [
        root,
        *(
            TraceNode(parent=0, ids=r.ids, step=r.step.contiguous(), trainable=r.trainable)
            for r in responses
        ),
    ]


def slice_index(
    rows: TargetRows, responses: Sequence[Traced], *, kind: str, block_size: int
) -> Tensor:
    """int64 [U]: the forward pass in which a trainer with one pass per slice scores each target.

    Full models: the rank of its step in the response; block models: the rank of its round in its
    block, since the blocks' rounds share the passes.
    """
    prompt = torch.tensor([r.trajectory.prompt_length for r in responses])[rows.response]
    block = (prompt + rows.token) // block_size if kind == "block" else torch.zeros_like(rows.token)
    keys = torch.stack([rows.response, rows.copy, block, rows.step], dim=1)
    distinct, of_target = keys.unique(dim=0, return_inverse=True)
    starts = torch.ones(len(distinct), dtype=torch.bool)
    starts[1:] = (distinct[1:, :3] != distinct[:-1, :3]).any(1)
    index = torch.arange(len(distinct))
    first = torch.where(starts, index, 0).cummax(0).values
    copies = int(rows.copy.max()) + 1 if rows.copy.numel() else 1
    return ((index - first) * copies)[of_target] + rows.copy
