"""Final answers: where they are found, and which of them are equal."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dlm_fast.tasks.answer_text import boxes
from dlm_fast.tasks.math_answer import MAX_ANSWER, Marks, final_answer
from dlm_fast.tasks.math_equality import Equality, plain_verdict
from dlm_fast.tasks.math_numbers import canonical, values
from dlm_fast.tasks.math_text import normal

DEFAULT = Marks(boxed=True, answer_tags=True, hashes=True, last_number=False)
EVERY = Marks(boxed=True, answer_tags=True, hashes=True, last_number=True)


def found(text, marks=DEFAULT):
    answer = final_answer(text, marks)
    return None if answer is None else (answer.text, answer.mark)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{18}", "18"),
        (r"so \boxed{\frac{1}{2}} or \boxed{\sqrt{2}}.", r"\sqrt{2}"),
        (r"\boxed{\boxed{\frac{1}{5}}}", r"\frac{1}{5}"),
        (r"\boxed{5} eggs</answer>", "5"),
        (r"<answer>\boxed {5}</answer>", "5"),
        (r"<answer>boxed{27}</answer>", "27"),
        (r"\.boxed{18}", "18"),
        (r"\fbox{3}", "3"),
        ("\\boxed{78\n</answer>", "78"),
        ("\\boxed{120\n</answer}", "120"),
        ("\\boxed{\n(-1, -29)\n}", "(-1, -29)"),
        (r"\boxed{70\text{ minutes></answer>", r"70\text{ minutes>"),
        (r"\boxed{x < 3}", "x < 3"),
        (r"\boxed{5} and then \boxed{}", "5"),
        (r"\boxed{5} and then \boxed{...}", "5"),
        (r"\boxed{12}. Check: \boxed{1", "12"),  # the end of the text cut the last one off
        (r"nothing else: \boxed{34", "34"),
        (r"\boxed{5}<|eot_id|>\boxed{6}", "5"),
        ("\\boxed{12}\n\\boxed{7\nmore", "7"),  # closed by its line
    ],
)
def test_boxes_are_read_as_models_write_them(text, answer):
    assert found(text) == (answer, "boxed")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>5 changes/day</answer>", ("5 changes/day", "answer_tag")),
        ("<answer>\n\\boxed{}32\n</answer>", ("32", "answer_tag")),
        ("<answer>\\boxed{}</answer>", None),
        ("<answer>\\boxed{...}\n</answer>", None),
        ("</reasoning><answer>7.", ("7.", "answer_tag")),
        ("2 + 2 = 4\n#### 4\n", ("4", "hashes")),
        ("#### 4 #### 5 # 6", ("5 # 6", "hashes")),
        ("####", None),
        ("so it is 81 families", None),
        ("", None),
        (r"\boxed{" + "1" * (MAX_ANSWER + 1) + "}", None),
    ],
)
def test_other_marks(text, expected):
    assert found(text) == expected


def test_each_mark_can_be_switched_off():
    text = "<answer>1</answer> \\boxed{2}\n#### 3\nthat is 4."
    off = {"boxed": False, "answer_tags": False, "hashes": False, "last_number": False}
    for name, answer in (
        ("boxed", "2"),
        ("answer_tags", "1"),
        ("hashes", "3"),
        ("last_number", "4"),
    ):
        assert found(text, Marks(**(off | {name: True}))) == (
            answer,
            name.removesuffix("s") if name == "answer_tags" else name,
        )
    assert found(text, Marks(**off)) is None
    assert found(text, EVERY) == ("2", "boxed")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 81 families.", "81"),
        ("that is $1,200.50.", "1,200.50"),
        ("-3 degrees", "-3"),
        ("first 5, then 7, ", "7"),
        ("20%", "20%"),
        ("none", None),
    ],
)
def test_the_last_number_when_it_counts(text, number):
    answer = final_answer(text, EVERY)
    assert (answer.text if answer else None) == number


@given(text=st.lists(st.sampled_from([*"{}\\ \n<>", "boxed", r"\boxed{", "</", "5"])).map("".join))
def test_boxes_stay_inside_the_text(text):
    for box in boxes(text):
        assert box.content in text
        assert box.content.strip() == box.content != ""


EQUAL = [
    ("18", "18"),
    ("18.0", "18"),
    ("6,277", "6277"),
    (r"32,\!348", "32348"),
    (r"\$32{,}348", "32348"),
    ("$4", "4"),
    (r"\$ 250", "250"),
    ("£10", "10"),
    (r"20\%", "20"),
    (r"20\%", r"20\%"),
    ("20", r"20\%"),
    ("20 percent", "20"),
    ("0.2", r"20\%"),
    (r"\frac{1}{5}", r"20\%"),
    ("5 changes/day", "5"),
    ("20 white hats", "20"),
    ("330 miles", "330"),
    ("50 mph", "50"),
    ("12cm", "12"),
    (r"72 \text{ cubic inches}", "72"),
    (r"72 \text{ cubic inches}", r"72 \mbox{ inches}^3"),
    ("15", r"15\mbox{ cm}^2"),
    (r"120\text{ minutes}", "120"),
    ("70\\text{ minutes>", "70"),
    ("2:00 pm", "2"),
    ("Juice Box C is 2 dollars more than Juice Box B.", "2"),
    (r"76^\circ", "76"),
    (r"76^{\circ}", r"76^\circ"),
    ("76°", "76"),
    (r"\tfrac12", "1/2"),
    (r"\frac 59", r"\dfrac{5}{9}"),
    (r"\frac9{19}", "9/19"),
    ("0.5", r"\frac{1}{2}"),
    (".5", "0.50"),
    ("-1/2", r"-\frac{1}{2}"),
    (r"\frac{-1}{2}", r"-\frac12"),
    (r"\frac{3}{24}", r"\frac{1}{8}"),
    ("15.975", r"\frac{639}{40}"),
    (r"1\frac{4}{5}", "9/5"),
    ("1 4/5", "1.8"),
    (r"6.02 \times 10^{3}", "6020"),
    ("1.5e3", "1500"),
    ("9 + 9 = 18", "18"),
    ("x = 2", "2"),
    ("x = y = 2", "2"),
    ("Total cost = 2", "2"),
    (r"\frac{4}{2} \times 1 = 2", "2"),
    ("2", "x = 2"),
    (r"f(x) = 2x + 1", "2x+1"),
    ("y = 2x + 3", "2x+3"),
    ("[-2, 7]", r"x \in [-2,7]"),
    ("3, 7, 5", "3, 5, 7"),
    ("-2 and 1", "1,-2"),
    (r"1 \text{ or } -2", "1,-2"),
    (r"\{1, 2\}", "2, 1"),
    ("(3, 1/2)", r"\left( 3, \frac12 \right)"),
    (r"(0,9) \cup (9,36)", r"(9, 36) \cup (0, 9)"),
    (r"(5,\infty)", r"(5, \infty)"),
    (r"\text{Evelyn}", "Evelyn"),
    ("evelyn", r"\text{Evelyn}"),
    ("C", r"\text{(C)}"),
    (r"x = \text{Evelyn}", r"\text{Evelyn}"),
    ("p-q", "p - q"),
    (r"72\text{ cm}\text{ long}", "72"),
    (r"72\text{ cm}^2\%", "72"),
    ("(C)", "C"),
    ("2k+2", "2k + 2"),
    ("(a+5)(b+2)", "(a + 5)(b + 2)"),
    (r"\sqrt3", r"\sqrt{3}"),
    ("x^{2}", "x^2"),
    (r"2\cdot x", r"2 \times x"),
    ("\N{MINUS SIGN}3", "-3"),
    (r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("5.", "5"),
    (r"\(5\)", "5"),
    (r"\[ 5 \]", "5"),
    ("4210_5", "4210_{5}"),
]
DIFFERENT = [
    ("17", "18"),
    ("18.1", "18"),
    (r"\frac{2}{3}", "2"),
    ("16200", "162000"),
    (r"20\%", "8"),
    (r"1.2\%", "12"),
    ("1/3", "0.3"),
    ("0.33", "1/3"),
    ("86, 42", "128"),
    ("1, 2, 3", "2"),  # one of several is no answer
    (r"\{1, 2\}", "2"),
    ("17 or 18", "18"),
    ("2 of 3 boxes", "2"),
    ("x - 5 apples", "5"),
    ("not 5 apples", "5"),
    ("no 5 apples", "5"),
    ("18 (or 17)", "18"),
    ("18|17", "18"),
    (r"x \in \{17, 18\}", "18"),
    (r"\pm 18", "18"),
    (r"\ge 18", "18"),
    ("17 < 18", "18"),
    ("18 hours 30 minutes", "18"),
    ("5 hundred", "5"),
    ("2 pi", "2"),
    ("2 sqrt 3", "2"),
    ("18 = 17", "18"),
    ("0", "5x - 7y + 11z + 4 = 0"),
    ("0=0", "5x - 7y + 11z + 4 = 0"),
    ("2", "x + y = 2"),
    ("(0, 1)", "(0, 1]"),
    ("(1, 2)", "(2, 1)"),
    ("1, 1, 2", "1, 2"),
    ("Vanin", r"\text{Navin}"),
    ("odd", r"\text{even}"),
    ("D", r"\text{(C)}"),
    ("52_8", "52"),
    ("52", "52_8"),
    ("52_9", "52_8"),
    ("five", "5"),
    ("5x", "5"),
    ("5 x", "5"),
    (r"\sqrt{5}", "5"),
    ("2:30", "2"),
    ("-5", "5"),
    ("1,234", "1.234"),
    ("", "5"),
    ("1e9999", "5"),
    ("9" * 100, "5"),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_equal_without_math_verify(answer, reference):
    verdict = plain_verdict(answer, reference)
    assert verdict is not None
    assert verdict.equal


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different_with_and_without_math_verify(answer, reference, equality):
    verdict = plain_verdict(answer, reference)
    assert verdict is None or not verdict.equal
    if answer:
        assert not equality.verdicts([(answer, reference)])[0].equal


@pytest.fixture(scope="module")
def equality():
    pytest.importorskip("math_verify", reason="needs the extra math")
    equality = Equality(symbolic=True, seconds=20, workers=2)
    yield equality
    equality.close()


EQUAL_EXPRESSIONS = [
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"7! \times 2!", r"10,\!080"),
    ("7i - 2", "-2 + 7i"),
    ("-q+p", "p - q"),
    ("ba", "ab"),
    ("(b+2)(a+5)", "(a+5)(b+2)"),
    (r"x^2 + 2x + 1", "(x+1)^2"),
    (r"\log_2 8", "3"),
    (r"\begin{pmatrix} 2/4 \\ 1 \end{pmatrix}", r"\begin{pmatrix} 1/2 \\ 1 \end{pmatrix}"),
    ("2^{10}", "1024"),
    (r"3 \cdot 6", "18"),
]
DIFFERENT_EXPRESSIONS = [
    (r"\frac{\sqrt{3}}{2}", r"\frac{1}{\sqrt{3}}"),
    ("x^2 + 2x - 1", "(x+1)^2"),
    ("7i + 2", "-2 + 7i"),
    (r"\pi", "3.14"),
    ("x = 2, x = 3", "2"),
    (r"2 \text{ or } 2^2", "2"),
    ("y", "x+1"),
    (r"(-\infty, \infty)", r"(0, \pi)"),
    ("x", r"\pi"),
    (r"\infty", "5"),
]


def test_expressions_by_math_verify(equality):
    pairs = EQUAL_EXPRESSIONS + DIFFERENT_EXPRESSIONS
    expected = [True] * len(EQUAL_EXPRESSIONS) + [False] * len(DIFFERENT_EXPRESSIONS)
    verdicts = equality.verdicts(pairs)
    assert [verdict.equal for verdict in verdicts] == expected
    assert all(verdict.by == "symbolic" for verdict in verdicts[: len(EQUAL_EXPRESSIONS)])
    # Without it they stay open, which counts as wrong.
    without = Equality(symbolic=False, seconds=1, workers=1)
    for verdict in without.verdicts(EQUAL_EXPRESSIONS):
        assert (verdict.equal, verdict.by) == (False, "open")


integers = st.integers(-(10**9), 10**9)


@given(top=integers, bottom=st.integers(1, 10**6))
def test_values_of_all_writings(top, bottom):
    value = Fraction(top, bottom)
    sign = "-" if top < 0 else ""
    writings = [
        f"{top}/{bottom}",
        f"{sign}\\frac{{{abs(top)}}}{{{bottom}}}",
        f"\\dfrac{{{top}}}{{ {bottom} }}",
        f"x = {top}/{bottom}",
        f"{sign}{abs(top) // bottom} {abs(top) % bottom}/{bottom}",
    ]
    for text in writings:
        assert values(text) == {value}
        assert canonical(text) == str(value)
    assert values(f"{top:,}") == {top}
    assert values(f"\\${top}.00") == {top}
    assert values(f"{top}\\%") == {Fraction(top), Fraction(top, 100)}


SIGNS = r"0123456789xyz+-*/^_{}()[],.=%$ |<>!\ "
COMMANDS = [r"\frac", r"\sqrt", r"\text{", r"\left", r"\cup", r"\{", r"\}", r"\infty", "\\\\"]
WORDS = [" cm", " and ", "\x00", "\ud800", "\N{VULGAR FRACTION ONE HALF}", "\n"]
latex = st.lists(st.sampled_from([*SIGNS, *COMMANDS, *WORDS]), max_size=30).map("".join)


@given(answer=latex, reference=latex)
def test_any_text_gets_a_plain_verdict(answer, reference):
    verdict = plain_verdict(answer, reference)
    assert verdict is None or isinstance(verdict.equal, bool)
    assert isinstance(canonical(answer), str)
    again = plain_verdict(answer, answer)
    assert again is None or again.equal or normal(answer) == ""


UNITS = [
    r"\text{a}",
    r" \text{a}",
    r"\text{",
    "1,234",
    " 1",
    "1/2 ",
    "= ",
    r"\in",
    "and ",
    " cm",
    "e9",
]


@pytest.mark.parametrize("first", UNITS)
@pytest.mark.parametrize("second", ["", *UNITS])
def test_repetitions_keep_no_pattern_busy(first, second):
    """A pattern that backtracks would need ages for one of these; the time-out would end it."""
    for end in ("", "x", "}", "^2"):
        text = (first + second) * (MAX_ANSWER // len(first + second)) + end
        verdict = plain_verdict(text, "5")
        assert verdict is None or not verdict.equal
        canonical(text)


def test_verdicts_are_remembered_up_to_a_bound(monkeypatch):
    from dlm_fast.tasks import math_equality

    monkeypatch.setattr(math_equality, "CACHED", 10)
    equality = Equality(symbolic=False, seconds=1, workers=1)
    pairs = [(str(n), "5") for n in range(30)]
    assert [v.equal for v in equality.verdicts(pairs)] == [n == 5 for n in range(30)]
    assert list(equality._known) == pairs[-10:]
    equality.verdicts(pairs[-10:-9])
    assert next(reversed(equality._known)) == pairs[-10]
