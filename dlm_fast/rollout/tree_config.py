"""How a tree of rollouts grows: segments, branching, budgets, fallback, rules that end a path."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

BUDGETS = ("fixed", "random", "step_tokens", "response_tokens")
FALLBACK_ORDERS = (
    "answer_or_eos",
    "weighted",
    "longest",
    "random",
    "answer_min_blocks",
    "strict",
    "none",
)
CUTS = ("random", "min_logprob_token", "block", "inverse_block", "from_start")
SPLITTING_CUTS = ("min_logprob_token", "block", "inverse_block")
"""cuts that may fall inside a segment"""
BLOCK_CUT = 128
"""tokens of a block of the cuts ``block`` and ``inverse_block``"""


@dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """Tree rollouts: paths that share their beginnings, decoded segment by segment.

    Stands as the group ``tree`` inside the options that use it (``--algorithm.tree.leaves 16``).
    How tokens are drawn, the longest response and the pages of keys belong to ``SamplerConfig``.
    Source: TreePO, arXiv 2508.17445, whose launch settings are the defaults here.
    """

    leaves: int = 16
    """finished paths of a tree (w)"""
    segment: int = 512
    """tokens of a segment (l): a path is looked at, and may fork, at its end. Block models take a
    multiple of their block"""
    max_depth: int = 14
    """most segments of a path (D)"""
    branch: int = 2
    """copies of a path at a fork (b), while the budget lasts; also of a fallback"""
    first_branch: int = 2
    """copies of the prompt (b0)"""
    first_branch_max: int | None = None
    """copies of the prompt are drawn between first_branch and this, each prompt its own; none:
    always first_branch"""
    budget: Literal["fixed", "random", "step_tokens", "response_tokens"] = "fixed"
    """what limits the copies of a step. fixed: branch copies of each path of the step before, so
    finished paths pass their share on, up to the leaves. random: branch is drawn between branch and
    branch_max for each step. step_tokens: tokens of one step over all trees (token_budget).
    response_tokens: tokens of a tree's responses (token_budget), which then replaces leaves"""
    branch_max: int | None = None
    """budget random: upper end of the draw"""
    token_budget: int | None = None
    """tokens of the budgets step_tokens and response_tokens"""
    min_width: int = 1
    """budget response_tokens: fewest leaves"""
    max_width: int = 64
    """budget response_tokens: most leaves"""
    share: Literal["even", "logprob"] = "even"
    """who gets the copies of a step: all paths alike, or by their log-probability"""
    share_prefer: Literal["low", "high"] = "low"
    """share logprob: which paths get more"""
    share_score: Literal["sum", "mean", "segment"] = "mean"
    """share logprob: sum or mean over the path, or mean over its last segment. Block models: of
    the confidence"""
    share_temperature: float = 2.0
    """share logprob: temperature of the softmax (tau), at the start of the training"""
    share_temperature_end: float | None = None
    """the same at its end, reached along half a sine wave; none: it stays"""
    fallback: Literal[
        "answer_or_eos",
        "weighted",
        "longest",
        "random",
        "answer_min_blocks",
        "strict",
        "none",
    ] = "answer_or_eos"
    """which finished paths are cut and continued when all are finished before the budget is.
    answer_or_eos: those that ended by themselves, shuffled. weighted: at random by how they ended,
    answers most. longest: at random by length. random: any. answer_min_blocks: answers of at least
    fallback_min_blocks cut_windows. strict: answers first, repetitions last. none: the tree stays
    smaller"""
    fallback_min_blocks: int = 2
    """of fallback answer_min_blocks"""
    cut: Literal["random", "min_logprob_token", "block", "inverse_block", "from_start"] = "random"
    """where. random: 1 .. max_back windows before the end. min_logprob_token: before the least
    likely token. block, inverse_block: before a block of 128 tokens drawn by its low, or high, mean
    log-probability. from_start: at the prompt, once for each time all paths are finished"""
    cut_window: int | None = None
    """tokens of a window of the cut random; none: a segment"""
    max_back: int | None = None
    """most windows that the cut random takes away; none: all"""
    allow_split: bool = False
    """cuts may fall inside a segment, which is then split"""
    answer: Literal["boxed_and_eos", "boxed_as_eos", "none"] = "boxed_and_eos"
    """what counts as an answer: a closed \\boxed{} and the end of text; a closed \\boxed{} alone,
    which then ends the path; or nothing (answers end as end of text)"""
    repetition: Literal["text", "token", "none"] = "text"
    """what ends a path that repeats itself: a window of 32 characters, or of 16 tokens, that occurs
    8 times in one segment"""
    repetition_first: bool = True
    """look for repetitions before answers and end of text"""
    min_finished_tokens: int = 0
    """finished paths with fewer tokens are dropped and replaced; after 4 rounds without a new leaf
    they are kept"""
    max_prompt: int = 1024
    """longest prompt in tokens"""
    long_prompt: Literal["error", "truncate_left", "drop"] = "error"
    """what happens to a longer one; drop: its tree has no leaves"""
    sync: Literal["tree", "global", "path"] = "tree"
    """who waits at the end of a segment: the paths of one tree for each other, those of all trees,
    or nobody"""
    compat: bool = False
    """as the paper's code: the last path gets what even sharing leaves over, and only the text of
    the new segment is searched for an answer"""

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_budget()
        self._check_sharing()
        self._check_fallback()
        for name, known in (
            ("answer", ("boxed_and_eos", "boxed_as_eos", "none")),
            ("repetition", ("text", "token", "none")),
            ("long_prompt", ("error", "truncate_left", "drop")),
            ("sync", ("tree", "global", "path")),
        ):
            self._check_choice(name, known)

    def _check_sizes(self) -> None:
        for name in (
            "leaves",
            "segment",
            "max_depth",
            "branch",
            "first_branch",
            "min_width",
            "max_width",
            "fallback_min_blocks",
            "max_prompt",
        ):
            self._check_whole(name, 1)
        self._check_whole("min_finished_tokens", 0)
        for name in ("first_branch_max", "branch_max", "token_budget", "cut_window", "max_back"):
            if getattr(self, name) is not None:
                self._check_whole(name, 1)
        widest = self.max_width if self.budget == "response_tokens" else self.leaves
        for name in ("first_branch", "first_branch_max"):
            value = getattr(self, name)
            # a tree of one leaf is a flat rollout: the default of two copies is no mistake there
            if value is not None and value > widest and (name, value, widest) != (*_DEFAULT, 1):
                raise ValueError(
                    f"tree.{name}={value} starts more paths than the tree has leaves ({widest}); "
                    f"set it to at most {widest}"
                )
        if self.first_branch_max is not None and self.first_branch_max < self.first_branch:
            raise ValueError(
                f"tree.first_branch_max={self.first_branch_max} lies below "
                f"tree.first_branch={self.first_branch}; set it to at least that"
            )
        if self.max_width < self.min_width:
            raise ValueError(
                f"tree.max_width={self.max_width} lies below tree.min_width={self.min_width}"
            )

    def _check_budget(self) -> None:
        self._check_choice("budget", BUDGETS)
        for name, kinds in (
            ("branch_max", ("random",)),
            ("token_budget", ("step_tokens", "response_tokens")),
        ):
            value = getattr(self, name)
            if (value is not None) != (self.budget in kinds):
                verb = "needs" if value is None else "takes no"
                raise ValueError(f"tree.budget={self.budget} {verb} tree.{name}, got {value}")
        if self.branch_max is not None and self.branch_max < self.branch:
            raise ValueError(
                f"tree.branch_max={self.branch_max} lies below tree.branch={self.branch}; set it "
                "to at least that"
            )
        if self.budget == "step_tokens" and self.sync != "global":
            raise ValueError(
                "tree.budget=step_tokens shares the tokens of one step over all trees, so they "
                f"have to step together; set tree.sync=global, got {self.sync}"
            )

    def _check_sharing(self) -> None:
        self._check_choice("share", ("even", "logprob"))
        self._check_choice("share_prefer", ("low", "high"))
        self._check_choice("share_score", ("sum", "mean", "segment"))
        for name in ("share_temperature", "share_temperature_end"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"tree.{name} must be a finite number above 0, got {value}")
        if self.share == "logprob" and self.sync == "path":
            raise ValueError(
                "tree.share=logprob compares the paths of a step, but with tree.sync=path each "
                "forks by itself; set tree.sync to tree or global"
            )

    def _check_fallback(self) -> None:
        self._check_choice("fallback", FALLBACK_ORDERS)
        self._check_choice("cut", CUTS)
        window = self.window
        if self.allow_split:
            return
        if window % self.segment and self.segment % window:
            raise ValueError(
                f"tree.cut_window={window} is neither a divisor nor a multiple of "
                f"tree.segment={self.segment}, so cuts fall inside segments; change it or set "
                "tree.allow_split=true"
            )
        if self.cut in SPLITTING_CUTS:
            raise ValueError(
                f"tree.cut={self.cut} falls inside segments; set tree.allow_split=true"
            )

    def _check_whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"tree.{name} must be a whole number from {least} on, got {value!r}")

    def _check_choice(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise ValueError(f"tree.{name} must be one of {', '.join(known)}, got {value!r}")

    @property
    def window(self) -> int:
        """Tokens of a window of the cut."""
        return self.segment if self.cut_window is None else self.cut_window


_DEFAULT = ("first_branch", 2)
