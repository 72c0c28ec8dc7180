r"""Numbers in answers, exact, and lists, sets, tuples and intervals of them.

Nothing is evaluated: a text must match one of a few forms of bounded length, and its value is a
fraction of integers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

from .math_text import VALUE_WORDS, clean, normal, right_side, without_unit

MAX_DIGITS = 40
MAX_EXPONENT = 40
MAX_ITEMS = 32
MAX_DEPTH = 4

_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
_FRACTION = r"\\frac ?(?:\{ ?(-?UN) ?\}|([0-9])) ?(?:\{ ?(-?UN) ?\}|([0-9]))".replace(
    "UN", _UNSIGNED
)
_SIGN = r"([+-] ?)?"
_PERCENT = r"( ?\\?%| ?per ?cent)?"
_PLAIN = re.compile(rf"{_SIGN}({_UNSIGNED}){_PERCENT}")
_OVER = re.compile(rf"{_SIGN}({_UNSIGNED}) ?/ ?(-?{_UNSIGNED}){_PERCENT}")
_FRAC = re.compile(rf"{_SIGN}(?:([0-9]+) ?)?{_FRACTION}{_PERCENT}")
_MIXED = re.compile(rf"{_SIGN}([0-9]+) ([0-9]+)/([0-9]+){_PERCENT}")
_TEN_TO = r"[*x] ?10 ?\^ ?(?:\{ ?([+-]?[0-9]+) ?\}|([0-9]))"
_POWER = re.compile(rf"{_SIGN}({_UNSIGNED}) ?(?:{_TEN_TO}|[eE]([+-]?[0-9]+))")
_CLOCK = re.compile(r"([0-9]{1,2}):00 ?(?:[aApP]\.?[mM]\.?)?")
_NUMBER_IN_TEXT = re.compile(rf"(?<![0-9.])-?{_UNSIGNED}")
# Signs of a formula: then a number is a part of something.
_FORMULA = re.compile(
    r"[\\^_=+*<>{}\[\]()|!]|[0-9][a-zA-Z]|[0-9]/|/[0-9]| - |(?<![a-zA-Z])-(?![0-9])"
)
_PERCENT_SIGN = re.compile(r"\\?%")
_WORD = re.compile(r"[a-zA-Z]+")
_VARIABLE = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])|\\(?!text|frac|times|cdot|div|[%$])")
_CONJUNCTION = re.compile(
    r",? *(?:\\text ?\{ *(?:and|or) *\}|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])) *"
)
_BRACKETS = {"(": ")", "[": "]", r"\{": r"\}"}


@lru_cache(maxsize=4096)
def values(text: str) -> frozenset[Fraction]:
    r"""What a text can mean as a number; empty where it is not just a number.

    A percentage is both its number and a hundredth of it, since problems ask for either.

    >>> sorted(map(str, values(r"20\%"))), [str(v) for v in values(r"1\frac{4}{5}")]
    (['1/5', '20'], ['9/5'])
    >>> values("x + 1"), values("1, 2")
    (frozenset(), frozenset())
    """
    text = clean(text)
    for candidate in dict.fromkeys((text, without_unit(text), _last_side(text))):
        if found := _values(candidate):
            return found
    return frozenset()


@lru_cache(maxsize=4096)
def value_in_words(text: str) -> Fraction | None:
    r"""The one number that stands among words; None where there are several, or formulas.

    >>> str(value_in_words("Box C is 2 dollars more than box B")), value_in_words("2 of 3")
    ('2', None)
    """
    text = _PERCENT_SIGN.sub(" ", clean(text)).replace(r"\text{", " ").replace("}", " ")
    words = {word.lower() for word in _WORD.findall(text)}
    if _FORMULA.search(text) or words & VALUE_WORDS or not any(len(word) > 1 for word in words):
        return None
    numbers = _NUMBER_IN_TEXT.findall(text)
    return _decimal(numbers[0]) if len(numbers) == 1 else None


def canonical(text: str) -> str:
    """The text that stands for all writings of an answer: a fraction, else the normal text.

    >>> canonical("0.50"), canonical(r"\\frac{2}{4}"), canonical(r"20\\%"), canonical("2, 1")
    ('1/2', '1/2', '20', '1,2')
    """
    found = values(text)
    if found:
        return str(max(found, key=abs))
    if (value := value_in_words(text)) is not None:
        return str(value)
    key = _key(clean(text), MAX_DEPTH)
    return normal(text) if key is None else _written(key)


def same_collection(answer: str, reference: str) -> bool | None:
    r"""Whether two lists, sets, tuples or intervals agree; None where not both are such.

    Lists without brackets and sets are unordered.

    >>> same_collection("-2, 1", "1, -2"), same_collection("(0, 1/2]", r"(0, \frac12]")
    (True, True)
    >>> same_collection("(0, 1)", "(0, 1]"), same_collection("1, 2, 3", "2")
    (False, False)
    >>> same_collection("x", "y") is None
    True
    """
    keys = [_key(right_side(clean(text)).strip(), MAX_DEPTH) for text in (answer, reference)]
    if all(isinstance(key, tuple) for key in keys):
        if keys[0] == keys[1]:
            return True
        # Where items are not numbers, a different text may still mean the same.
        return False if all(map(_numeric, keys)) else None
    if isinstance(keys[0], tuple) and keys[0][0] == "list" and values(reference):
        return False
    return None


def _last_side(text: str) -> str:
    """The right side of a chain such as 9 + 9 = 18 or x = y = 5; an equation is no number."""
    *lefts, last = (part.strip() for part in text.split("="))
    for left in lefts:
        if _VARIABLE.search(left) and right_side(f"{left.replace(' ', '')}=1") != "1":
            return text
    return last


def _values(text: str) -> frozenset[Fraction]:
    for pattern, read in _FORMS:
        if match := pattern.fullmatch(text):
            value = read(match)
            if value is None:
                return frozenset()
            if "%" in text or "cent" in text:
                return frozenset((value, value / 100))
            return frozenset((value,))
    return frozenset()


def _plain(match: re.Match[str]) -> Fraction | None:
    return _signed(match[1], _decimal(match[2]))


def _over(match: re.Match[str]) -> Fraction | None:
    return _signed(match[1], _ratio(match[2], match[3]))


def _frac(match: re.Match[str]) -> Fraction | None:
    ratio = _ratio(match[3] or match[4], match[5] or match[6])
    if ratio is None or match[2] is None:
        return _signed(match[1], ratio)
    whole = _decimal(match[2])
    # Digits before a fraction are a mixed number, as in the data set.
    return None if whole is None or ratio < 0 else _signed(match[1], whole + ratio)


def _mixed(match: re.Match[str]) -> Fraction | None:
    whole, ratio = _decimal(match[2]), _ratio(match[3], match[4])
    return None if whole is None or ratio is None else _signed(match[1], whole + ratio)


def _power(match: re.Match[str]) -> Fraction | None:
    digits, exponent = _decimal(match[2]), match[3] or match[4] or match[5]
    if digits is None or len(exponent) > 4 or abs(int(exponent)) > MAX_EXPONENT:
        return None
    return _signed(match[1], digits * Fraction(10) ** int(exponent))


def _clock(match: re.Match[str]) -> Fraction | None:
    return _decimal(match[1])


_FORMS = (
    (_PLAIN, _plain),
    (_OVER, _over),
    (_FRAC, _frac),
    (_MIXED, _mixed),
    (_POWER, _power),
    (_CLOCK, _clock),
)


def _signed(sign: str | None, value: Fraction | None) -> Fraction | None:
    return -value if value is not None and sign and "-" in sign else value


def _ratio(top: str, bottom: str) -> Fraction | None:
    above, below = _decimal(top), _decimal(bottom)
    return None if above is None or not below else above / below


def _decimal(text: str) -> Fraction | None:
    digits = text.replace(",", "")
    return Fraction(digits) if len(digits) <= MAX_DIGITS else None


def _key(text: str, depth: int) -> tuple | str | None:
    """A collection as (kind, items), an item as its value or normal text; None if too large."""
    if depth == 0:
        return None
    unions = [part.strip() for part in text.split(r"\cup")]
    if len(unions) > 1:
        return _collected("union", unions, depth)
    for opening in _BRACKETS:
        if text.startswith(opening):
            for closing in _BRACKETS.values():
                inside = text[len(opening) : -len(closing)]
                if text.endswith(closing) and len(text) > len(opening) and _balanced(inside):
                    return _collected(opening + closing, list(_items(inside)), depth)
    items = list(_items(_CONJUNCTION.sub(",", text)))
    if len(items) > 1 and not values(text):
        return _collected("list", items, depth)
    found = values(text)
    return str(max(found, key=abs)) if found else normal(text)


def _collected(kind: str, items: list[str], depth: int) -> tuple | None:
    if len(items) > MAX_ITEMS or (len(items) == 1 and kind != r"\{\}"):
        return None
    keys = [_key(item.strip(), depth - 1) for item in items]
    if any(key is None for key in keys):
        return None
    if kind in ("list", "union", r"\{\}"):
        keys.sort(key=repr)
    # A set in braces and a list without them are two ways of listing solutions.
    return ("list" if kind == r"\{\}" else kind, *keys)


def _items(text: str) -> Iterator[str]:
    """The parts between commas outside all brackets."""
    depth, start = 0, 0
    for at, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            yield text[start:at]
            start = at + 1
    yield text[start:]


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _numeric(key: tuple | str | None) -> bool:
    if isinstance(key, tuple):
        return all(_numeric(item) for item in key[1:])
    return key is not None and bool(re.fullmatch(r"-?[0-9]+(?:/[0-9]+)?|-?\\infty", key))


def _written(key: tuple | str) -> str:
    if isinstance(key, str):
        return key
    kind, *items = key
    inside = (r"\cup" if kind == "union" else ",").join(map(_written, items))
    return inside if kind in ("list", "union") else f"{kind[0]}{inside}{kind[-1]}"
