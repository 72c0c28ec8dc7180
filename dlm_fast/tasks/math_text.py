r"""One way of writing for mathematical answers: texts that mean the same become equal.

Follows the conventions of the answers in the MATH data set (Hendrycks et al., arXiv:2103.03874),
whose own check is equality of texts after such steps: sizes of brackets and fractions, spacing,
units, signs of money, percent and degrees, and a name in front of "=" do not count.
Texts are at most `math_answer.MAX_ANSWER` characters long; every pattern is a single pass.
"""

from __future__ import annotations

import re
from functools import lru_cache


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SIGNS = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{DIVISION SIGN}": r"\div ",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{INFINITY}": r"\infty ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{SQUARE ROOT}": r"\sqrt",
    "\N{SUPERSCRIPT TWO}": "^2",
    "\N{SUPERSCRIPT THREE}": "^3",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{UNION}": r"\cup ",
    "\N{NO-BREAK SPACE}": " ",
}
_TRANSLATION = str.maketrans(_SIGNS)

# The first alternative keeps \\, the end of a matrix row, from being read as half a command.
_LAYOUT = re.compile(
    r"(\\\\)"
    r"|\\!|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\(?:displaystyle|limits|[Bb]ig[gG]?[lr]?)(?![a-zA-Z])"
    r"|\\[()\[\]]|\\?\$|[£€¥]"
)
_SPACES = re.compile(r"(\\\\)|(?:\\[,;: ]|\\q?quad(?![a-zA-Z])|~|\\hspace\{[^{}]*\}|\s)+")
_COMMA = re.compile(r"\{,\}")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_ROMAN = re.compile(
    r"\\(?:mbox|mathrm|textbf|textit|textrm|textnormal|mathbf|mathit|operatorname)\s*\{"
)
_DEGREES = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degrees?(?![a-zA-Z])")
_PERCENT = re.compile(r"\\?%|(?<![a-zA-Z])per ?cent(?![a-zA-Z])")
_SYNONYMS = {
    r"\leq": r"\le",
    r"\geq": r"\ge",
    r"\neq": r"\ne",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\cdot": "*",
    r"\times": "*",
    r"\infinity": r"\infty",
}
_SYNONYM = re.compile(r"\\(?:leq|geq|neq|lbrace|rbrace|cdot|times|infinity)(?![a-zA-Z])")
_MATRICES = re.compile(r"\{[bvpBV]matrix\}|\{smallmatrix\}")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
# Of an answer's end; what stands before it is the value.
_UNIT_TEXT = re.compile(
    r"(?<=[^\s=,(\[]) ?\\text ?\{[^{}]*(?:\}|$) ?(?:\^ ?(?:\{ ?[0-9] ?\}|[0-9]))? ?(?:\\?%)?$"
)
_POWER = r"(?:\^ ?(?:\{ ?[0-9] ?\}|[0-9]))?"
_TAIL = re.compile(rf"(?<=[0-9}})\]])( ?)([a-zA-Z][a-zA-Z' /-]*?){_POWER}$")
_WORD = re.compile(r"[a-zA-Z']+")
# Units that may touch their number or have fewer than three letters.
SHORT_UNITS = _words(
    """m mm cm dm km ft yd mi in g mg kg lb lbs oz t s sec secs min mins h hr hrs L l ml mL am pm
    AM PM mph kph kmh kmph fps sq cu inch inches feet miles meters metres hours minutes seconds
    days dollars cents degrees units deg rad"""
)
# Words that belong to the value.
VALUE_WORDS = _words(
    """pi sqrt root sin cos tan cot sec csc log ln exp squared cubed half third quarter twice minus
    negative plus times over divided hundred thousand million billion dozen infinity or and not no
    mod choose factorial"""
)
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|ell"
_NAME = re.compile(
    rf"(?:[a-zA-Z]|\\(?:{_GREEK}))(?:_(?:[a-zA-Z0-9]|\{{[a-zA-Z0-9]*\}}))?"
    r"(?:\([a-zA-Z]\))?(?:=|\\in(?![a-zA-Z]))"
)
_SHORT_LEFT_SIDE = re.compile(r"[^=<>]{1,2}=(?!=)")
_LOOSE_FRACTION = re.compile(r"\\frac([0-9a-zA-Z])([0-9a-zA-Z])")
_LOOSE_TOP = re.compile(r"\\frac([0-9a-zA-Z])(?=\{)")
_LOOSE_BOTTOM = re.compile(r"(\\frac\{[^{}]*\})([0-9a-zA-Z])")
_LOOSE_ROOT = re.compile(r"\\sqrt([0-9a-zA-Z])")
_SPACED_EQUALS = re.compile(r" ?= ?")
_SLASH = re.compile(r"(-?)([0-9]+)/([0-9]+)")
_BARE_POINT = re.compile(r"(?<![0-9])\.(?=[0-9])")
_SHORT_SCRIPT = re.compile(r"([\^_])\{([0-9a-zA-Z])\}")
WORDS = re.compile(r"[a-zA-Z][a-zA-Z'.]+(?: [a-zA-Z'.]+|-[a-zA-Z']{2,})*")
_CHOICE = re.compile(r"\(([a-zA-Z])\)")


@lru_cache(maxsize=4096)
def clean(text: str) -> str:
    r"""The LaTeX without what only concerns its looks, still LaTeX, with single spaces.

    >>> clean(r"\left( 3,\, \dfrac{\pi}{2} \right)."), clean(r"\$32,\!348"), clean("76^\\circ")
    ('( 3, \\frac{\\pi}{2} )', '32,348', '76')
    """
    text = text.translate(_TRANSLATION)
    if r"\begin" not in text:
        text = text.replace("\\\\", "\\")  # written through one layer of escapes too many
    text = _LAYOUT.sub(r"\1", text)
    text = _SPACES.sub(lambda match: match[1] or " ", text)
    text = _COMMA.sub(",", text)
    text = _FRACTIONS.sub(r"\\frac", text)
    text = _ROMAN.sub(r"\\text{", text)
    text = _DEGREES.sub("", text)
    text = _SYNONYM.sub(lambda match: _SYNONYMS[match[0]], text)
    return _trimmed(text)


@lru_cache(maxsize=4096)
def without_unit(text: str) -> str:
    r"""A cleaned text without the unit at its end, in \text{} or in plain words.

    >>> without_unit(r"864 \text{ inches}^2"), without_unit("20 white hats"), without_unit("2 x")
    ('864', '20', '2 x')
    """
    shorter = text
    for _ in range(3):  # such as \text{ cm}\text{ long}
        shorter = _trimmed(_UNIT_TEXT.sub("", shorter))
    tail = _TAIL.search(shorter)
    return (
        _trimmed(shorter[: tail.start()]) if tail and _is_unit(tail[2], bool(tail[1])) else shorter
    )


def _is_unit(words: str, apart: bool) -> bool:
    first, *rest = _WORD.findall(words)
    if first in SHORT_UNITS - VALUE_WORDS or (first in SHORT_UNITS and not rest):
        return True
    # Three letters and more behind a space: two would often be a product of two variables.
    return apart and len(first) >= 3 and not VALUE_WORDS & {first.lower(), *rest}


@lru_cache(maxsize=4096)
def normal(text: str) -> str:
    r"""The one way of writing; equal answers give equal texts.

    >>> normal(r"\tfrac12"), normal("1/2"), normal(r"x = \frac{1}{2} \text{ cm}")
    ('\\frac{1}{2}', '\\frac{1}{2}', '\\frac{1}{2}')
    >>> normal(r"\text{Evelyn}"), normal("evelyn."), normal(r"\text{(C)}"), normal("C")
    ('evelyn', 'evelyn', 'C', 'C')
    """
    text = without_unit(clean(text))
    text = _PERCENT.sub("", text)
    text = _TEXT.sub(lambda match: match[1], text)
    words = right_side(_SPACED_EQUALS.sub("=", text)).strip()
    if WORDS.fullmatch(words):
        return " ".join(words.casefold().split())
    text = _MATRICES.sub("{matrix}", text).replace(" ", "")
    text = right_side(right_side(text))
    text = _BARE_POINT.sub("0.", text)
    text = _LOOSE_FRACTION.sub(r"\\frac{\1}{\2}", text)
    text = _LOOSE_TOP.sub(r"\\frac{\1}", text)
    text = _LOOSE_BOTTOM.sub(r"\1{\2}", text)
    text = _LOOSE_ROOT.sub(r"\\sqrt{\1}", text)
    text = _SHORT_SCRIPT.sub(r"\1\2", text)
    text = _CHOICE.sub(r"\1", text) if _CHOICE.fullmatch(text) else text
    text = _trimmed(text)
    if slash := _SLASH.fullmatch(text):
        return rf"{slash[1]}\frac{{{slash[2]}}}{{{slash[3]}}}"
    return r"\frac{1}{2}" if text == "0.5" else text


def right_side(text: str) -> str:
    r"""What an answer says a name is equal to, or is in; the whole text where it says neither.

    >>> right_side("x=2"), right_side(r"x\in[-2,7]"), right_side("x+y=2")
    ('2', '[-2,7]', 'x+y=2')
    """
    if text.count("=") > 1:
        return text
    for pattern in (_NAME, _SHORT_LEFT_SIDE):
        match = pattern.match(text)
        if match and match.end() < len(text):
            return text[match.end() :]
    return text


def _trimmed(text: str) -> str:
    return text.strip().rstrip(".,;:").strip()
