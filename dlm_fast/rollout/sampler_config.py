"""How a denoising loop decodes: sizes, schedule, unmasking rule, temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

BOUND_MEANINGS = {
    "dynamic": "positions above it are revealed together; TraceRL uses 0.9",
    "threshold": "positions at or above it are revealed together; Fast-dLLM uses 0.9",
    "factor": "how much doubt a set of parallel reveals may hold; often 1.0",
    "entropy_sum": "in nats; the entropies of one step's reveals add up to less",
    "eb": "in nats; the EB-sampler's gamma",
}
"""rules that need ``rollout.bound``"""

ENTROPY_RULES = ("entropy_sum", "eb")
"""rules that rank by entropy, whatever ``rollout.confidence`` says"""

QUOTA_RULES = ("top_k", "dynamic", "random", "sequential")
"""rules that follow the schedule of ``rollout.steps``"""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Sampling from a diffusion language model, block after block.

    Causal models decode token after token: block_size, steps and the options of blocks have no
    meaning for them, a response ends with an end-of-text token, and the cache is none or tree.
    """

    max_new_tokens: int = 256
    """length of the response window in tokens"""
    block_size: int = 32
    """tokens decoded together; blocks are finished from left to right. The last block of the window
    may be shorter. Block models fix it: it must be the model's own"""
    steps: int = 128
    """denoising steps over the whole window, shared out to the blocks by their length; a block with
    m masked tokens and s steps reveals m // s tokens a step and one more in the first m % s steps.
    The rules threshold, factor, entropy_sum and eb take as many steps as they need instead"""
    temperature: float = 0.0
    """temperature of the Gumbel-max draw of tokens; 0 takes the most likely token"""
    top_k: int = 0
    """draw among the k most likely tokens only; 0: no limit"""
    top_p: float = 1.0
    """draw among the most likely tokens that hold this share of the tempered probability; 1: all"""
    rule: Literal[
        "top_k", "dynamic", "threshold", "factor", "entropy_sum", "eb", "random", "sequential"
    ] = "top_k"
    """which tokens a step reveals. top_k: the scheduled number, most confident first. dynamic: all
    above the bound, but at least the scheduled number. threshold: all from the bound on, at least
    one. factor, entropy_sum, eb: as many as the bound allows, at least one. random, sequential: the
    scheduled number, anywhere or from the left"""
    confidence: Literal["probability", "margin", "entropy"] = "probability"
    """what ranks the positions: the untempered probability of the drawn token, the lead of the most
    likely token over the second, or low entropy. The rules dynamic, threshold and factor compare it
    with the bound and need probability or margin; entropy_sum and eb always rank by entropy"""
    bound: float | None = None
    """limit of the rules dynamic, threshold, factor, entropy_sum and eb; the others take none"""
    cache: Literal["none", "block", "prefix", "dual", "tree"] = "none"
    """keys and values kept between steps. none: all are computed anew (exact). block: those of
    finished blocks are kept (exact, block models only). prefix: those before the current block,
    dual: all but the current block's, from the block's first step (approximate, models that see the
    whole sequence). tree: those of all paths, common beginnings once (exact; causal models, and
    trees of rollouts; flat rollouts of block models take it as block)"""
    cache_page: int = 0
    """tokens of a page of the cache; 0: one block, cache tree: 16. There it is a power of two"""
    cache_pages: int | None = None
    """most pages of the cache held at once; rows wait until theirs are free. none: no limit"""
    fused_commit: bool = True
    """cache block: a finished block goes through the network together with the first step of the
    next one; false: by itself. The results are the same"""
    prefix_horizon: int | None = None
    """cache prefix: tokens behind the current block that its later steps still see; none: all"""
    early_stop: bool = True
    """a row whose finished block holds only end-of-text tokens has the rest of its window filled
    with them and leaves the batch; filled tokens have step 0 and log-probability 0, as they were
    not drawn"""
    stop_at_eos: bool = False
    """a row ends with the first block that it decoded an end-of-text token in: its response ends
    with that token, what else the block holds behind it becomes the trajectory's tail, and the rest
    of the window is left out. early_stop then has nothing to fill"""
    forbid_eos_confidence: bool = False
    """give drawn end-of-text tokens the lowest confidence, so that they are revealed last; usual in
    evaluation, not in training"""
    forbid_ids: tuple[int, ...] = ()
    """token ids never drawn, besides the mask id and ids that the tokenizer has no token for"""
    record_confidence: bool = False
    """keep the confidence of every revealed token in its trajectory"""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_draw()
        self._check_rule()
        self._check_cache()

    def _check_cache(self) -> None:
        if self.cache not in ("none", "block", "prefix", "dual", "tree"):
            raise ValueError(
                f"rollout.cache={self.cache!r} is not available: choose none, block (block "
                "models), prefix or dual (approximate), or tree (causal models, trees)"
            )
        if self.cache == "tree" and self.cache_page & (self.cache_page - 1):
            raise ValueError(
                f"rollout.cache_page must be a power of two for rollout.cache=tree, got "
                f"{self.cache_page}"
            )
        for name, least in (("cache_page", 0), ("cache_pages", 1), ("prefix_horizon", 0)):
            value = getattr(self, name)
            if value is None and name != "cache_page":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"rollout.{name} must be a whole number from {least} on, got {value!r}"
                )
        if self.prefix_horizon is not None and self.cache != "prefix":
            raise ValueError(
                f"rollout.prefix_horizon has no meaning for rollout.cache={self.cache}; leave it "
                "out or set rollout.cache=prefix"
            )

    def _check_sizes(self) -> None:
        for name in ("max_new_tokens", "block_size", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"rollout.{name} must be a positive integer, got {value!r}")
        window = self.max_new_tokens
        for name in ("block_size", "steps"):
            if getattr(self, name) > window:
                raise ValueError(
                    f"rollout.{name} must not exceed rollout.max_new_tokens={window}, "
                    f"got {getattr(self, name)}"
                )
        if self.steps < self.num_blocks:
            raise ValueError(
                f"rollout.steps={self.steps} leaves some of the {self.num_blocks} blocks without a "
                f"step; raise it to at least {self.num_blocks} or enlarge rollout.block_size"
            )

    def _check_draw(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"rollout.temperature must be a finite number from 0 on, got {self.temperature}"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"rollout.top_k must be 0 (off) or positive, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"rollout.top_p must lie above 0 and up to 1, got {self.top_p}")
        bad = [i for i in self.forbid_ids if isinstance(i, bool) or not isinstance(i, int) or i < 0]
        if bad:
            raise ValueError(f"rollout.forbid_ids must be token ids from 0 on, got {bad}")

    def _check_rule(self) -> None:
        rules = (*QUOTA_RULES, *(rule for rule in BOUND_MEANINGS if rule not in QUOTA_RULES))
        if self.rule not in rules:
            raise ValueError(f"rollout.rule must be one of {', '.join(rules)}, got {self.rule!r}")
        if self.confidence not in ("probability", "margin", "entropy"):
            raise ValueError(
                f"rollout.confidence must be probability, margin or entropy, "
                f"got {self.confidence!r}"
            )
        if self.rule not in BOUND_MEANINGS:
            if self.bound is not None:
                raise ValueError(
                    f"rollout.bound={self.bound} has no meaning for rollout.rule={self.rule}; "
                    f"leave it out or choose one of {', '.join(BOUND_MEANINGS)}"
                )
            return
        if self.bound is None:
            raise ValueError(
                f"rollout.rule={self.rule} needs rollout.bound ({BOUND_MEANINGS[self.rule]})"
            )
        if not self.bound >= 0:
            raise ValueError(f"rollout.bound must be a number from 0 on, got {self.bound}")
        if self.rule in ("dynamic", "threshold", "factor") and self.confidence == "entropy":
            raise ValueError(
                f"rollout.rule={self.rule} compares a probability with rollout.bound; set "
                f"rollout.confidence to probability or margin, got entropy"
            )

    @property
    def num_blocks(self) -> int:
        """Blocks of the window when it begins on the block grid."""
        return -(-self.max_new_tokens // self.block_size)

    def never_drawn(self, family: Any) -> tuple[int, ...]:
        """Ids that no draw from a model of ``family`` gives, each once."""
        mask = () if family.mask_id is None else (family.mask_id,)
        return tuple(dict.fromkeys((*mask, *family.unused_ids, *self.forbid_ids)))
