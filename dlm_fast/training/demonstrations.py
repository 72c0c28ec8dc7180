"""Which demonstrations of a data file are worth imitating: short enough, and right.

Source: IGPO, arXiv 2509.10396, section 3.3: fine-tuning on solutions as long as those that the
model will be asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from dlm_fast.tasks import score_batch
from dlm_fast.training.run_config import TrainConfig

logger = logging.getLogger(__name__)


def worth_imitating(
    examples: Sequence[Any], source: Any, task: Any, policy: Any, config: TrainConfig
) -> Sequence[Any]:
    """The examples of a run, without those that its options leave out; generated ones all stay."""
    max_tokens, only_right = config.max_demonstration_tokens, config.only_right_demonstrations
    if source is None or not (max_tokens or only_right):
        return examples
    return keep_demonstrations(examples, task, policy, max_tokens=max_tokens, only_right=only_right)


def keep_demonstrations(
    examples: Sequence[Any], task: Any, policy: Any, *, max_tokens: int, only_right: bool
) -> Sequence[Any]:
    """Examples whose demonstration has at most ``max_tokens`` tokens (0: any number) and, if
    ``only_right``, is right for the task's own checker; how many were left out is logged.

    ValueError if none is left.
    """
    texts = [task.demonstration(example) for example in examples]
    fits = [
        not max_tokens or int(policy.encode(text, chat=False).numel()) <= max_tokens
        for text in texts
    ]
    kept = [i for i, short in enumerate(fits) if short]
    too_long, wrong = len(examples) - len(kept), 0
    if only_right and kept:
        scores = score_batch(task, [texts[i] for i in kept], [examples[i] for i in kept])
        right = [i for i, score in zip(kept, scores, strict=True) if score.correct]
        kept, wrong = right, len(kept) - len(right)
    what = (
        f"{len(examples)} demonstrations: {too_long} have more than {max_tokens} tokens, "
        f"{wrong} of the others are wrong"
    )
    if not kept:
        raise ValueError(
            f"{what}; none is left. Raise train.max_demonstration_tokens or turn off "
            "train.only_right_demonstrations"
        )
    if len(kept) < len(examples):
        logger.warning("%s; these are left out, %d stay", what, len(kept))
    return [examples[i] for i in kept]
