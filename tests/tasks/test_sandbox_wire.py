"""Plain values between two processes: what travels, what hostile bytes and objects may do."""

import collections
import decimal
import fractions
import os
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast.tasks.sandbox.inside import wire
from dlm_fast.tasks.sandbox.inside.link import LOAD, NAMESPACE, OF_SNIPPET, OF_TESTS, Link, Remote

atoms = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary()
)
values = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.sets(st.integers(), max_size=4),
    ),
    max_leaves=12,
)


@given(value=values)
@settings(max_examples=200)
def test_plain_values_arrive_as_they_are(value):
    back = wire.decode(wire.encode(value))
    assert back == value
    assert repr(type(back)) == repr(type(value))


@pytest.mark.parametrize(
    "value",
    [
        -(2**4000), 2**63, -1, True, 1.5, float("inf"), 2 - 3j, "\ud800\x00ä", b"\x00\xff",
        bytearray(b"ab"), frozenset({1, (2,)}), {(1, "a"): {2: [None]}}, range(3, -4, -2), ...,
        list(range(-50, 50)), tuple(map(float, range(9))), set(range(20)), [2**63] * 9, [True] * 9,
        [0.5, 1] * 9, len, int, sorted, decimal.Decimal("1.10"), fractions.Fraction(-3, 7),
    ],
)  # fmt: skip
def test_further_values(value):
    back = wire.decode(wire.encode(value))
    assert back == value
    assert type(back) is type(value)


def test_nan_and_subclasses_become_what_they_are_made_of():
    nan = wire.decode(wire.encode(float("nan")))
    assert nan != nan

    class Odd(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    assert type(wire.decode(wire.encode(Odd(3)))) is int
    assert wire.decode(wire.encode(collections.Counter("aab"))) == {"a": 2, "b": 1}
    assert wire.decode(wire.encode(collections.namedtuple("P", "x y")(1, 2))) == (1, 2)


@given(data=st.binary(max_size=60))
@settings(max_examples=400)
def test_any_bytes_are_a_value_or_an_error(data):
    try:
        value = wire.decode(data)
    except wire.WireError:
        return
    assert wire.decode(wire.encode(value)) == value or value != value or "nan" in repr(value)


def test_what_does_not_travel():
    for value in (object(), lambda: 0, print.__self__, iter([])):
        with pytest.raises(wire.NotPlain):
            wire.encode(value)
    endless = []
    endless.append(endless)
    with pytest.raises(wire.WireError, match="deeper than"):
        wire.encode(endless)
    with pytest.raises(wire.WireError, match="more than"):
        wire.encode("a" * (wire.MAX_MESSAGE + 1))
    with pytest.raises(wire.WireError, match="larger than"):
        wire.encode([b"a" * 1_000_000] * 20)
    with pytest.raises(wire.WireError, match="deeper than"):
        wire.decode(b"l\x00\x00\x00\x01" * 1000 + b"N")
    for name in (b"eval", b"exec", b"open", b"getattr", b"__import__", b"\xff"):
        with pytest.raises(wire.WireError):
            wire.decode(b"n" + len(name).to_bytes(4, "big") + name)


def test_messages_have_a_length():
    read, write = os.pipe()
    wire.send(write, b"abc")
    assert wire.receive(read) == b"abc"
    os.write(write, b"\xff\xff\xff\xff")
    with pytest.raises(wire.WireError):
        wire.receive(read)
    os.write(write, b"\x00\x00\x00\x09abc")
    os.close(write)
    with pytest.raises(EOFError):
        wire.receive(read)
    os.close(read)
    with pytest.raises(wire.WireError):
        wire.send(-1, b"a" * (wire.MAX_MESSAGE + 1))


@contextmanager
def ends(namespace):
    """The tests' end of a link whose other end shows a module of these names, in a thread."""
    there_read, write = os.pipe()
    read, there_write = os.pipe()

    class Module:
        pass

    module = Module()
    vars(module).update(namespace)
    snippet = Link(there_read, there_write, OF_SNIPPET)
    assert snippet.show(lambda: list(namespace)) == LOAD
    assert snippet.show(module) == NAMESPACE

    def serve():
        try:
            snippet.serve()
        except EOFError:
            os.close(there_write)

    thread = threading.Thread(target=serve)
    thread.start()
    link = Link(read, write, OF_TESTS)
    try:
        yield link, lambda name: link.request(NAMESPACE, "get", (name,))
    finally:
        os.close(write)
        thread.join()
        for fd in (read, there_read):
            os.close(fd)


def test_calls_errors_and_callbacks():
    def fail():
        raise KeyError("gone")

    def leave():
        raise SystemExit(0)

    def odd():
        raise UnicodeDecodeError("utf-8", b"", 0, 1, "reason")

    names = {"add": lambda a, *, b: a + b, "fail": fail, "leave": leave, "odd": odd}
    names["twice"] = lambda function, value: function(function(value))
    names["total"] = lambda values: sum(values)
    with ends(names) as (link, get):
        assert set(link.request(LOAD, "call")) == set(names)
        assert get("add")(1, b=2) == 3
        with pytest.raises(KeyError, match="gone") as caught:
            get("fail")()
        assert link.raised is caught.value
        with pytest.raises(Exception, match="SystemExit") as caught:
            get("leave")()
        assert type(caught.value) is Exception
        with pytest.raises(ValueError):
            get("odd")()
        with pytest.raises(TypeError):
            get("add")(1)
        assert get("twice")(lambda v: v + 1, 3) == 5
        with pytest.raises(ZeroDivisionError):
            get("twice")(lambda v: 1 // 0, 3)
        assert get("total")(v * v for v in range(4)) == 14
        assert not link.broken


def test_an_end_of_iteration_ends_no_iteration_of_the_tests():
    def stop(value):
        raise StopIteration

    def numbers():
        yield 1

    with ends({"stop": stop, "numbers": numbers}) as (link, get):
        with pytest.raises(RuntimeError, match="StopIteration out of a call"):
            assert list(map(get("stop"), [1, 2])) != []
        generator = get("numbers")()
        assert next(generator) == 1
        with pytest.raises(StopIteration):
            next(generator)
        assert link.raised is not None


def test_only_functions_that_give_none_change_their_arguments():
    def sort(values):
        values.sort()

    def clear(values):
        values.clear()
        return 0

    def nested(values):
        values["a"][0] = 5
        values["b"].add(2)

    with ends({"sort": sort, "clear": clear, "nested": nested}) as (_, get):
        values = [3, 1, 2]
        assert get("sort")(values) is None
        assert values == [1, 2, 3]
        assert get("clear")(values) == 0
        assert values == [1, 2, 3]
        inner = [1]
        get("nested")(values := {"a": inner, "b": {1}})
        assert (values, inner) == ({"a": [5], "b": {1, 2}}, [5])


def test_objects_stay_where_they_are_and_compare_by_identity():
    class Equal:
        size = 3

        def __init__(self, value=0):
            self.value = value

        def __eq__(self, other):
            return True

        def __hash__(self):
            return 0

        def __len__(self):
            return 2

        def __contains__(self, value):
            return True

        def __iter__(self):
            return iter([7, 8])

        def __getitem__(self, key):
            return key * 2

    def give():
        return Equal()

    with ends({"give": give, "Equal": Equal, "queue": collections.deque([1, 2])}) as (_, get):
        thing = get("give")()
        assert isinstance(thing, Remote)
        assert [thing != 0, thing == 0, 9 in thing, 8 in thing] == [True, False, False, True]
        assert get("Equal")(7).value == 7
        thing.value = [1]
        assert thing.value == [1]
        assert (thing.size, len(thing), thing[4], bool(thing)) == (3, 2, 8, True)
        assert list(get("queue")) == [1, 2]
        assert 2 in get("queue")
        get("queue")[0] = 9
        assert str(get("queue")) == "deque([9, 2])"
        with pytest.raises(AttributeError):
            _ = thing.__globals__


def test_the_tests_end_offers_calls_alone():
    secret = "hidden"

    def callback(value):
        return value if secret else None

    stolen = []

    def steal(remote):
        for operation in ("get", "set", "item", "str", "len", "no such"):
            try:
                stolen.append(remote._link.request(remote._number, operation, ("__closure__",)))
            except Exception as error:
                assert "not offered" in str(error)
        return remote(1)

    with ends({"steal": steal}) as (_, get):
        assert get("steal")(callback) == 1
        with pytest.raises(wire.NotPlain, match="cannot be handed over"):
            get("steal")(object())
    assert not stolen
