"""1,000 verdicts on mathematical answers: by texts and numbers, by math-verify in workers.

Run: python -m pytest benches/bench_math_answers.py --benchmark-enable
Baseline: math-verify in this process, one answer after the other, without protection. Every round
starts with an empty memory of verdicts; the workers are running, as they are in the midst of a run.
"""

from __future__ import annotations

import pytest

from dlm_fast import tasks
from dlm_fast.tasks import math_numbers, math_text

CACHES = (
    math_text.clean,
    math_text.normal,
    math_text.without_unit,
    math_numbers.values,
    math_numbers.value_in_words,
)
COUNT = 1000
WORKERS = 2


def completions(kind: str) -> tuple[list[str], list[dict[str, str]]]:
    """Half right, half wrong; no answer stands twice."""
    answers, references = [], []
    for n in range(COUNT):
        wrong = n % 2
        if kind == "numbers":
            answers.append(rf"\frac{{{2 * n + 1}}}{{4}} \text{{ miles}}")
            references.append(f"{(2 * n + 1) / 4 + wrong}")
        else:
            answers.append(rf"{n + 2} + x\sqrt{{3}}")
            references.append(rf"\sqrt{{3}} x + {n + 2 + wrong}")
    texts = [f"<answer>\n\\boxed{{{answer}}}\n</answer>" for answer in answers]
    return texts, [{"question": "?", "answer": reference} for reference in references]


@pytest.mark.parametrize("kind", ["numbers", "expressions"])
def test_workers(benchmark, kind):
    task = tasks.get("math", workers=WORKERS)
    texts, examples = completions(kind)
    expressions = completions("expressions")
    task.score_many(*([x[:4] for x in expressions]))  # starts the workers
    benchmark.group = f"{COUNT} verdicts, {kind}"

    def verdicts() -> int:
        task._equality.forget()
        for function in CACHES:
            function.cache_clear()
        return sum(score.correct for score in task.score_many(texts, examples))

    assert benchmark.pedantic(verdicts, rounds=3) == COUNT // 2
    task.close()


@pytest.mark.parametrize("kind", ["numbers", "expressions"])
def test_math_verify_alone(benchmark, kind):
    math_verify = pytest.importorskip("math_verify")
    texts, examples = completions(kind)
    benchmark.group = f"{COUNT} verdicts, {kind}"

    def verdicts() -> int:
        return sum(
            math_verify.verify(
                math_verify.parse(f"${example['answer']}$", parsing_timeout=None),
                math_verify.parse(text, parsing_timeout=None),
                timeout_seconds=None,
            )
            for text, example in zip(texts, examples, strict=True)
        )

    assert benchmark.pedantic(verdicts, rounds=1) > 0
