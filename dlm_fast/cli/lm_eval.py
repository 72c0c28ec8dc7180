"""``dlm-fast lm-eval``: the Language Model Evaluation Harness with this project's model."""

from __future__ import annotations

import sys


def run(argv: list[str]) -> int:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise ValueError(
            "dlm-fast lm-eval needs the package lm-eval: pip install 'dlm_fast[eval]'"
        ) from None
    from dlm_fast.integrations.lm_eval import register

    register()
    # the harness reads its words from here alone
    sys.argv = ["lm-eval", *argv]
    cli_evaluate()
    return 0
