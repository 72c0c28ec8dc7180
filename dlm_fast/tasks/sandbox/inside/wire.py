"""Plain values as bytes, for two processes one of which is hostile.

Every value is one tag byte and what belongs to it; lengths are 4 bytes, big-endian. Reading builds
built-in types alone, names no class that the bytes could choose, and is bounded in depth by
`MAX_DEPTH` and in everything else by the length of the bytes. Values of classes outside this list
are the caller's word: `export` turns them into a number, `resolve` back into something.
"""

from __future__ import annotations

import builtins
import os
import struct
from collections.abc import Callable
from typing import Any

MAX_DEPTH = 200
MAX_MESSAGE = 16_000_000

_EXACT = {None: b"N", True: b"T", False: b"F"}
_CONSTANTS = {b"N": None, b"T": True, b"F": False, b".": Ellipsis}
# In this order: a bool is an int, and subclasses count as their base.
_TEXTS = ((bytes, b"b"), (bytearray, b"a"))
_SEQUENCES = ((list, b"l"), (tuple, b"t"), (set, b"e"), (frozenset, b"z"))
_BUILD: dict[bytes, Any] = {tag: kind for kind, tag in _SEQUENCES}
# Functions and types a test may hand over or a snippet may return, by name.
# fmt: off
NAMED = frozenset((
    "abs", "all", "any", "bin", "bool", "bytes", "bytearray", "chr", "complex", "dict",
    "divmod", "enumerate", "filter", "float", "frozenset", "hash", "hex", "int",
    "isinstance", "iter", "len", "list", "map", "max", "min", "next", "oct", "ord", "pow",
    "print", "range", "repr", "reversed", "round", "set", "slice", "sorted", "str", "sum",
    "tuple", "zip", "object", "type",
))
# fmt: on
_NAMES = {id(getattr(builtins, name)): name for name in NAMED}


class WireError(Exception):
    """Bytes that are no value, or a value that has no bytes."""


class NotPlain(WireError):
    """A value of a kind that does not travel."""


def encode(value: Any, export: Callable[[Any], int] | None = None) -> bytes:
    """The bytes of a value; WireError for what cannot travel.

    >>> decode(encode({"a": [1, 2.5, None, (True, "x")]}))
    {'a': [1, 2.5, None, (True, 'x')]}
    """
    out = bytearray()
    _write(value, out, export, 0)
    return bytes(out)


def decode(data: bytes, resolve: Callable[[int], Any] | None = None) -> Any:
    """The value of bytes; WireError for anything that `encode` does not write."""
    try:
        value, end = _read(data, 0, resolve, 0)
    except (LookupError, struct.error, ValueError, TypeError, ArithmeticError) as error:
        raise WireError(f"not a value: {type(error).__name__}") from None
    if end != len(data):
        raise WireError("bytes behind the value")
    return value


def _sized(tag: bytes, data: bytes) -> bytes:
    if len(data) > MAX_MESSAGE:
        raise WireError(f"a value of more than {MAX_MESSAGE} bytes")
    return tag + struct.pack(">I", len(data)) + data


def _write(value: Any, out: bytearray, export: Callable[[Any], int] | None, depth: int) -> None:
    if depth > MAX_DEPTH or len(out) > MAX_MESSAGE:
        raise WireError(f"a value deeper than {MAX_DEPTH} or larger than {MAX_MESSAGE} bytes")
    atom = _atom(value)
    if atom is not None:
        out += atom
    elif isinstance(value, dict):
        out += b"d" + struct.pack(">I", len(value))
        for key, item in list(value.items()):
            _write(key, out, export, depth + 1)
            _write(item, out, export, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        items = list(value)
        tag = next(tag for kind, tag in _SEQUENCES if isinstance(value, kind))
        packed = _packed(items)
        if packed is not None:
            out += packed[0] + tag + struct.pack(">I", len(items)) + packed[1]
            return
        out += tag + struct.pack(">I", len(items))
        for item in items:
            _write(item, out, export, depth + 1)
    else:
        parts = _parts(value)
        if parts is not None:
            out += parts[0]
            _write(parts[1], out, export, depth + 1)
        elif export is not None:
            out += b"h" + struct.pack(">q", export(value))
        else:
            raise NotPlain(f"a {type(value).__name__} cannot travel")


def _packed(items: list[Any]) -> tuple[bytes, bytes] | None:
    """Many numbers of one kind in one piece, a hundred times faster than one by one."""
    kinds = set(map(type, items)) if len(items) > 8 else None
    try:
        if kinds == {int}:
            return b"q", struct.pack(f">{len(items)}q", *items)
        if kinds == {float}:
            return b"g", struct.pack(f">{len(items)}d", *items)
    except struct.error:  # some do not fit into 64 bits
        pass
    return None


def _atom(value: Any) -> bytes | None:
    if value is None or value is True or value is False:
        return _EXACT[value]
    if value is Ellipsis:
        return b"."
    if isinstance(value, int):
        number = int(value)
        return _sized(b"i", number.to_bytes(number.bit_length() // 8 + 1, "big", signed=True))
    if isinstance(value, float):
        return b"f" + struct.pack(">d", value)
    if isinstance(value, complex):
        return b"c" + struct.pack(">dd", value.real, value.imag)
    if isinstance(value, str):
        return _sized(b"s", str(value).encode("utf-8", "surrogatepass"))
    for kind, tag in _TEXTS:
        if isinstance(value, kind):
            return _sized(tag, bytes(value))
    name = _NAMES.get(id(value))
    return None if name is None else _sized(b"n", name.encode())


def _parts(value: Any) -> tuple[bytes, tuple[Any, ...]] | None:
    # By the class's name, so that neither module is imported before it is needed.
    kind = type(value)
    where = (getattr(kind, "__module__", ""), kind.__name__)
    if isinstance(value, range):
        return b"r", (value.start, value.stop, value.step)
    if where[0] == "numpy" and hasattr(value, "item"):  # its numbers, which equal Python's
        item = value.item() if getattr(value, "ndim", 1) == 0 else None
        return None if item is None or type(item).__module__ == "numpy" else (b"x", (item,))
    if where == ("decimal", "Decimal"):
        return b"D", (str(value),)
    if where == ("fractions", "Fraction"):
        return b"Q", (value.numerator, value.denominator)
    return None


def _read(
    data: bytes, at: int, resolve: Callable[[int], Any] | None, depth: int
) -> tuple[Any, int]:
    if depth > MAX_DEPTH:
        raise WireError(f"a value deeper than {MAX_DEPTH}")
    tag, at = data[at : at + 1], at + 1
    if tag in _CONSTANTS:
        return _CONSTANTS[tag], at
    if tag == b"f":
        return struct.unpack_from(">d", data, at)[0], at + 8
    if tag == b"c":
        return complex(*struct.unpack_from(">dd", data, at)), at + 16
    if tag == b"h" and resolve is not None:
        return resolve(struct.unpack_from(">q", data, at)[0]), at + 8
    if tag in (b"r", b"D", b"Q", b"x"):
        parts, at = _read(data, at, resolve, depth + 1)
        return _from_parts(tag, parts), at
    if tag in (b"q", b"g"):
        build, size = _BUILD[data[at : at + 1]], struct.unpack_from(">I", data, at + 1)[0]
        form = f">{size}{'q' if tag == b'q' else 'd'}"
        return build(struct.unpack_from(form, data, at + 5)), at + 5 + 8 * size
    if not tag or tag not in b"isbanltezd":
        raise WireError("an unknown tag")
    size, at = struct.unpack_from(">I", data, at)[0], at + 4
    if tag in b"isban":
        if at + size > len(data):
            raise WireError("a value that ends early")
        return _from_bytes(tag, data[at : at + size]), at + size
    items = []
    for _ in range(2 * size if tag == b"d" else size):
        item, at = _read(data, at, resolve, depth + 1)
        items.append(item)
    if tag == b"d":
        return dict(zip(items[::2], items[1::2], strict=True)), at
    return _BUILD[tag](items), at


def _from_bytes(tag: bytes, data: bytes) -> Any:
    if tag == b"i":
        return int.from_bytes(data, "big", signed=True)
    if tag == b"s":
        return data.decode("utf-8", "surrogatepass")
    if tag == b"n":
        name = data.decode("ascii")
        if name not in NAMED:
            raise WireError("an unknown name")
        return getattr(builtins, name)
    return data if tag == b"b" else bytearray(data)


def _from_parts(tag: bytes, parts: Any) -> Any:
    if tag == b"r":
        return range(*parts)
    if tag == b"x":
        return parts[0]
    if tag == b"D":
        from decimal import Decimal

        return Decimal(*parts)
    from fractions import Fraction

    numerator, denominator = parts
    if type(numerator) is not int or type(denominator) is not int:
        raise WireError("a fraction of something else")
    return Fraction(numerator, denominator)


def send(fd: int, data: bytes) -> None:
    """One message: its length, then its bytes."""
    if len(data) > MAX_MESSAGE:
        raise WireError(f"a message of more than {MAX_MESSAGE} bytes")
    view = memoryview(struct.pack(">I", len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> bytes:
    """The next message; EOFError when the other side is gone, WireError for a wrong length."""
    size = struct.unpack(">I", _exactly(fd, 4))[0]
    if size > MAX_MESSAGE:
        raise WireError(f"a message of more than {MAX_MESSAGE} bytes")
    return _exactly(fd, size)


def _exactly(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError("the other side is gone")
        data += part
    return bytes(data)
