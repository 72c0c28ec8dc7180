r"""Symbolic equality by math-verify; runs in a worker process and imports nothing of the package.

math-verify's own time limits are signals with Python handlers, which a long integer operation never
lets run; they are off here, and the worker's limits hold instead.
"""

from __future__ import annotations

import logging

from math_verify import LatexExtractionConfig, parse, verify

logging.disable(logging.CRITICAL)

# No search for numbers in what does not parse: an answer is equal as a whole or not at all.
FORMS = (LatexExtractionConfig(),)


def same(answer: str, reference: str) -> bool:
    """Whether two LaTeX expressions without delimiters are equal."""
    gold, found = (
        parse(f"${text}$", extraction_config=FORMS, parsing_timeout=None)
        for text in (reference, answer)
    )
    return bool(gold and found) and verify(gold, found, timeout_seconds=None)
