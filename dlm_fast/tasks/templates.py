"""Prompt templates as data: filling named fields, a user's own wording, few-shot examples.

A template is text in which `{name}` stands for a field and `{{`, `}}` for braces, as in
`str.format`, but with plain names alone: no index, no attribute, no format.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import hint
from .table import Row, read_table, shorten

TEXT_FILE = ".txt"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Template:
    """A text with named fields.

    >>> Template("{a} + {b} = {{", "sum.template").fill({"a": 1, "b": 2})
    '1 + 2 = {'
    """

    text: str
    option: str
    """dotted name of the option it comes from, for errors"""

    def fields(self) -> list[str]:
        """The names it asks for, in order; ValueError for a text that is no template."""
        return [name for _, name in self._parts() if name is not None]

    def check(self, known: Iterable[str]) -> Template:
        """Itself, if it asks for nothing but known fields; ValueError names the first other one."""
        known = list(known)
        for name in self.fields():
            if name not in known:
                raise ValueError(
                    f"{self.option} asks for the unknown field {{{name}}}; {hint(name, known)} "
                    "(braces that are no field are written {{ and }})"
                )
        return self

    def fill(self, values: Mapping[str, Any]) -> str:
        """The text with each field replaced by its value."""
        self.check(values)
        return "".join(
            literal + ("" if name is None else str(values[name])) for literal, name in self._parts()
        )

    def _parts(self) -> list[tuple[str, str | None]]:
        try:
            parts = list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise ValueError(
                f"{self.option} is not a template ({error}): a field is written {{name}}, braces "
                f"of the text are doubled; got {shorten(self.text)}"
            ) from None
        for _, name, form, conversion in parts:
            if name is not None and (not _NAME.fullmatch(name) or form or conversion):
                written = (
                    name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
                )
                raise ValueError(
                    f"{self.option}: {{{written}}} is not a field; a field is a plain name in "
                    "braces, and braces of the text are doubled"
                )
        return [(literal, name) for literal, name, _, _ in parts]


def own_or(own: str, text: str, option: str) -> Template:
    """The user's own template where there is one, else the task's.

    The option holds the text itself, or the name of a file that ends in .txt; the last line break
    of a file belongs to the file, not to the template.
    """
    if not own:
        return Template(text, option)
    if "\n" in own or not own.endswith(TEXT_FILE):
        return Template(own, option)
    path = Path(own)
    try:
        return Template(path.read_text(encoding="utf-8").removesuffix("\n"), f"{option} ({path})")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{option}: cannot read {path} ({error}); a text that ends in {TEXT_FILE} names a file"
        ) from None


def shot_rows(shots: str, option: str) -> list[Row]:
    """Few-shot examples: rows of a data file, or of a JSON list in the option itself."""
    if not shots:
        return []
    if not shots.lstrip().startswith("["):
        return read_table(shots)
    try:
        values = json.loads(shots)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{option} begins with [ but is no JSON list of examples ({error}); give such a list "
            "or the name of a data file"
        ) from None
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"{option}, item {number}: expected an object, got {shorten(value)}")
    return [Row(value, f"{option}, item {i}") for i, value in enumerate(values, start=1)]


def shots_text(shots: Iterable[tuple[str, str]]) -> str:
    """What stands before a prompt: each example's prompt and answer, then a blank line.

    >>> shots_text([("1+1=", "2"), ("1+2=", "3")])
    '1+1=2\\n\\n1+2=3\\n\\n'
    """
    return "".join(f"{prompt}{answer.rstrip()}\n\n" for prompt, answer in shots)
