"""Finding the program in a completion: fenced blocks, markers, bodies of functions.

A completion is hostile text: it is read line by line once, without patterns, and never parsed here.
"""

from __future__ import annotations

from .answer_text import before_end_of_turn

PYTHON = ("python", "py", "python3")
DONE = "[DONE]"


def find_code(completion: str, *, unfenced: bool = False) -> str | None:
    """The last fenced block of Python, the last block without a language where there is none.

    A last block that is never closed reaches to the end. With `unfenced` a text without any fence
    is a program itself, up to `[DONE]`. None where there is nothing.

    >>> find_code("First:\\n```python\\nx = 1\\n```\\nor\\n```python\\nx = 2\\n```\\n")
    'x = 2\\n'
    """
    text = before_end_of_turn(completion)
    blocks = _blocks(text)
    for languages in (PYTHON, ("",)):
        found = [code for language, code in blocks if language in languages and code.strip()]
        if found:
            return found[-1]
    if not unfenced or blocks:
        return None
    code = text.partition(DONE)[0].removeprefix("[BEGIN]\n")
    return _body(code) if code.strip() else None


def normal_code(code: str) -> str:
    """Code without blank lines and white space at the ends of lines: equal answers, equal texts."""
    lines = (line.rstrip() for line in code.splitlines())
    return "\n".join(line for line in lines if line)


def _blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block, without the indentation of its fence."""
    blocks: list[tuple[str, str]] = []
    fence, language, indent = "", "", ""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        bare = line.strip()
        if not fence:
            if bare.startswith("```"):
                fence = "`" * (len(bare) - len(bare.lstrip("`")))
                words = bare.lstrip("`").split()
                language, lines = words[0].lower() if words else "", []
                indent = line[: len(line) - len(line.lstrip())]
        elif bare.startswith(fence) and not bare.strip("`"):
            blocks.append((language, "".join(lines)))
            fence = ""
        else:
            lines.append(line.removeprefix(indent))
    if fence:
        blocks.append((language, "".join(lines)))
    return blocks


def _body(code: str) -> str:
    """A function's body alone where the text begins as one: it ends with the indentation."""
    lines = code.splitlines(keepends=True)
    first = next(line for line in lines if line.strip())
    if not first.startswith((" ", "\t")):
        return code
    count = 0
    for line in lines:
        if line.strip() and not line.startswith((" ", "\t")):
            break
        count += 1
    return "".join(lines[:count])
