"""Calls between the tests' process and the snippet's, over two pipes, of plain values alone.

A function or an object that is no plain value stays where it is; the other side holds a `Remote`.
Its operations run where the object lives and give plain values or further `Remote`s. Comparing is
not among them: `==` on a `Remote` is identity, whatever `__eq__` a snippet's class defines.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

from . import wire

MAX_TEXT = 1000
LOAD, NAMESPACE = 0, 1
"""what the tests' side knows from the start: the function that runs the snippet, its module"""


class Remote:
    """Something that lives in the other process."""

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_link", link)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._link.request(self._number, "call", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.request(self._number, "get", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.request(self._number, "set", (name, value))

    def __iter__(self) -> Any:
        return self._link.request(self._number, "iter")

    def __next__(self) -> Any:
        return self._link.request(self._number, "next")

    def __getitem__(self, key: Any) -> Any:
        return self._link.request(self._number, "item", (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._link.request(self._number, "set_item", (key, value))

    def __bool__(self) -> bool:
        return self._link.request(self._number, "bool") is True

    def __contains__(self, value: Any) -> bool:
        # compared here: the object's own word would be worth nothing
        return any(item is value or item == value for item in self)

    def __len__(self) -> int:
        length = self._link.request(self._number, "len")
        return length if type(length) is int and length >= 0 else 0

    def __str__(self) -> str:
        return str(self._link.request(self._number, "str"))

    __repr__ = __str__


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, *args, **kwargs: target(*args, **kwargs),
    "get": getattr,
    "set": setattr,
    "iter": iter,
    "next": next,
    "item": lambda target, key: target[key],
    "set_item": lambda target, key, value: target.__setitem__(key, value),
    "bool": bool,
    "len": len,
    "str": str,
}
OF_SNIPPET = tuple(OPERATIONS)
# No attributes: one leads to the globals of the tests.
OF_TESTS = ("call", "iter", "next")


class Link:
    """One end; `operations` are what the other end may ask for."""

    def __init__(self, read_fd: int, write_fd: int, operations: tuple[str, ...]) -> None:
        self.raised: BaseException | None = None
        """the last error that came from the other process"""
        self.broken = False
        """whether the other process has left or has sent what is no message"""
        self._fds = (read_fd, write_fd)
        self._operations = operations
        self._shown: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}
        self._remotes: dict[int, Remote] = {}

    def show(self, value: Any) -> int:
        """The number under which the other end may use an object of this one; always >= 0."""
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._shown)
            self._shown[number] = value
        return number

    def request(
        self, target: int, operation: str, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """The other end's answer; meanwhile it may call back. Its errors are raised here."""
        self._send(("ask", target, operation, args, kwargs or {}))
        while True:
            message = self._receive()
            if message[0] == "ask":
                self._answer(*message[1:])
            elif message[0] == "value" and len(message) == 3:
                _write_back(args, message[2])
                return message[1]
            elif message[0] == "error" and len(message) == 3:
                self.raised = _error(message[1], message[2])
                if isinstance(self.raised, StopIteration) and operation != "next":
                    # An iteration over calls, as all(map(f, values)), would take it for its end.
                    self.raised = RuntimeError("StopIteration out of a call")
                raise self.raised
            else:
                raise wire.WireError("not an answer")

    def serve(self) -> None:
        """Answers until the other end is gone."""
        while True:
            message = self._receive()
            if message[0] != "ask":
                raise wire.WireError("not a question")
            self._answer(*message[1:])

    def _answer(self, target: Any, operation: Any, args: Any, kwargs: Any) -> None:
        try:
            if operation not in self._operations or type(target) is not int:
                raise wire.WireError("an operation that is not offered")
            value = OPERATIONS[operation](self._shown[target], *args, **kwargs)
            # Functions that work in place give None. Others may not change what a test holds, or
            # `assert f(values) == sorted(values)` would be won by emptying the list.
            in_place = value is None and operation == "call" and any(map(_is_mutable, args))
            changed = list(args) if in_place else None
            self._send(("value", value, changed))
        except (EOFError, BrokenPipeError):
            raise
        except BaseException as error:
            # a SystemExit too: it ends the call, not the process that answers
            self._send(("error", _names_of(error), _message_of(error)))

    def _send(self, message: tuple[Any, ...]) -> None:
        data = wire.encode(message, self._export)
        try:
            wire.send(self._fds[1], data)
        except OSError:
            self.broken = True
            raise

    def _receive(self) -> Any:
        try:
            message = wire.decode(wire.receive(self._fds[0]), self._resolve)
            if type(message) is not tuple or len(message) < 3:
                raise wire.WireError("not a message")
            if message[0] == "ask" and len(message) != 5:
                raise wire.WireError("not a question")
        except BaseException:
            self.broken = True
            raise
        return message

    def _export(self, value: Any) -> int:
        if isinstance(value, Remote):
            return -1 - value._number
        if self._operations is OF_TESTS and not (callable(value) or hasattr(value, "__next__")):
            raise wire.NotPlain(f"a {type(value).__name__} of the tests cannot be handed over")
        return self.show(value)

    def _resolve(self, number: int) -> Any:
        if number < 0:
            return self._shown[-1 - number]
        return self._remotes.setdefault(number, Remote(self, number))


def _is_mutable(value: Any) -> bool:
    return isinstance(value, list | dict | set | bytearray)


def _write_back(args: tuple[Any, ...], changed: Any) -> None:
    if changed is None:
        return
    if type(changed) is not list or len(changed) != len(args):
        raise wire.WireError("not the arguments")
    for old, new in zip(args, changed, strict=True):
        _overwrite(old, new)


def _overwrite(old: Any, new: Any) -> None:
    """Makes a container equal another, keeping the identity of what is inside as far as it goes."""
    if type(old) is not type(new):
        return
    if isinstance(old, list):
        kept = [_kept(a, b) for a, b in zip(old, new, strict=False)]
        old[:] = kept + new[len(kept) :]
    elif isinstance(old, dict):
        items = {key: _kept(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(items)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new


def _kept(old: Any, new: Any) -> Any:
    if type(old) is type(new) and _is_mutable(old):
        _overwrite(old, new)
        return old
    return new


def _names_of(error: BaseException) -> list[str]:
    kinds = type(error).__mro__
    return [kind.__name__ for kind in kinds if kind.__module__ == "builtins"][:20]


def _message_of(error: BaseException) -> str:
    try:
        return str(error)[:MAX_TEXT]
    except BaseException:  # an error of the snippet's, whose __str__ may do anything
        return ""


def _error(names: Any, text: Any) -> Exception:
    """A built-in exception by the first of the names that is one; never an exit or interrupt."""
    for name in names if isinstance(names, list) else []:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(str(text)[:MAX_TEXT])
            except TypeError:  # it wants more arguments, as UnicodeDecodeError does
                continue
    return Exception(f"{names!r:.100}: {text!r:.100}")
