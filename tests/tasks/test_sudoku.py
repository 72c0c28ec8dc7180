"""Sudoku: grids, hold-out, prompts, rewards of known answers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast import tasks
from dlm_fast.tasks import sudoku_grid

PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"
EXAMPLE = {"puzzle": PUZZLE, "solution": SOLUTION}
GRIDS = sudoku_grid.all_grids()
EMPTY = [at for at in range(16) if PUZZLE[at] == "0"]


@st.composite
def puzzles(draw):
    solution = draw(st.sampled_from(GRIDS))
    empty = draw(st.sets(st.integers(0, 15), min_size=1))
    puzzle = "".join("0" if at in empty else solution[at] for at in range(16))
    return {"puzzle": puzzle, "solution": solution}


def score(text, example=EXAMPLE, **options):
    return tasks.get("sudoku", **options).score(text, example)


def test_there_are_288_grids_and_each_is_valid():
    assert len(set(GRIDS)) == 288
    assert all(sudoku_grid.is_valid_grid(grid) for grid in GRIDS)
    assert list(GRIDS) == sorted(GRIDS)


@pytest.mark.parametrize(
    "grid",
    [
        "1234341221434322",  # a row
        "1234341212343412",  # columns
        "1234234134124123",  # rows and columns right, boxes wrong
        "123434122143432",
        "12343412214343210",
        "1234341221430321",
    ],
)
def test_wrong_grids_are_not_valid(grid):
    assert not sudoku_grid.is_valid_grid(grid)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("test_grids", [1, 48, 287])
def test_splits_share_no_grid_and_cover_all(seed, test_grids):
    split = sudoku_grid.split_grids(test_grids, seed)
    assert len(split["test"]) == test_grids
    assert not set(split["test"]) & set(split["train"])
    assert {*split["test"], *split["train"]} == set(GRIDS)


def test_generated_examples_keep_their_splits_grids():
    task = tasks.get("sudoku", num_train=3000, num_test=400, seed=3)
    train, test = task.load(None, "train"), task.load(None, "test")
    assert (len(train), len(test)) == (3000, 400)
    train_grids, test_grids = ({e["solution"] for e in examples} for examples in (train, test))
    assert (len(train_grids), len(test_grids)) == (240, 48)
    assert not train_grids & test_grids
    for example in [*train[:300], *test]:
        assert sudoku_grid.is_valid_grid(example["solution"])
        assert sudoku_grid.keeps_clues(example["solution"], example["puzzle"])
        assert 8 <= example["puzzle"].count("0") <= 12
    assert {e["puzzle"].count("0") for e in train} == {8, 9, 10, 11, 12}


def test_generated_examples_depend_on_the_seed_and_nothing_else():
    first = tasks.get("sudoku", seed=1).load(None, "train")
    again = tasks.get("sudoku", seed=1, num_train=50).load(None, "train")
    other = tasks.get("sudoku", seed=2).load(None, "train")
    assert again[:] == first[:50]
    assert first[-1] == first[len(first) - 1]
    assert [e["puzzle"] for e in first[:20]] != [e["puzzle"] for e in other[:20]]
    assert len({e["puzzle"] for e in first[:1000]}) > 950
    with pytest.raises(IndexError):
        again[50]


def test_generation_does_not_touch_the_global_generator():
    import random

    random.seed(5)
    expected = random.random()
    random.seed(5)
    task = tasks.get("sudoku", demonstration_noise=0.5)
    task.demonstration(task.load(None, "train")[7])
    assert random.random() == expected


@given(example=puzzles())
def test_the_solution_earns_everything(example):
    for text in (example["solution"], f"<answer>\n{example['solution']}\n</answer>"):
        result = score(text, example)
        assert (result.reward, result.correct) == (1.0, True)
        both = score(text, example, cell_weight=0.5, solved_weight=0.5, template="plain")
        assert (both.reward, both.correct) == (1.0, True)


@given(example=puzzles(), data=st.data())
def test_each_corrupted_cell_costs_its_share(example, data):
    empty = [at for at in range(16) if example["puzzle"][at] == "0"]
    wrong = data.draw(st.sets(st.sampled_from(empty), min_size=1))
    answer = list(example["solution"])
    for at in wrong:
        answer[at] = data.draw(st.sampled_from([d for d in "01234" if d != answer[at]]))
    result = score("".join(answer), example)
    assert result.reward == pytest.approx(1 - len(wrong) / len(empty), abs=1e-12)
    # Several wrong cells may form another solution; a single one never does.
    assert result.correct == ("".join(answer) in sudoku_grid.solutions(example["puzzle"]))
    halves = score("".join(answer), example, cell_weight=0.5, solved_weight=0.5)
    assert halves.reward == pytest.approx(0.5 * result.reward + 0.5 * result.correct)


@given(example=puzzles())
@settings(max_examples=50)
def test_demonstrations_solve_the_puzzle(example):
    for template in ("d1", "plain"):
        task = tasks.get("sudoku", template=template)
        assert task.score(task.demonstration(example), example).correct
    assert tasks.get("sudoku", template="plain").demonstration(example) == example["solution"]


def test_noise_hits_the_asked_share_of_empty_cells_only():
    task = tasks.get("sudoku", template="plain", demonstration_noise=0.4, num_train=1500)
    changed = empty = 0
    for example in task.load(None, "train"):
        noisy = task.demonstration(example)
        assert noisy == task.demonstration(example)
        assert sudoku_grid.keeps_clues(noisy, example["puzzle"])
        assert set(noisy) <= set("1234")
        empty += example["puzzle"].count("0")
        changed += sum(a != b for a, b in zip(noisy, example["solution"], strict=True))
    # A random digit is the right one in a quarter of the cells; 15,000 cells: sd 0.004.
    assert changed / empty == pytest.approx(0.4 * 0.75, abs=0.016)


def test_any_solution_of_an_ambiguous_puzzle_is_correct():
    puzzle = "1234341200000000"
    found = sudoku_grid.solutions(puzzle)
    assert len(found) == 4
    for grid in found[1:]:
        result = score(grid, {"puzzle": puzzle, "solution": found[0]})
        assert result.correct
        assert result.reward < 1


def test_a_valid_grid_against_the_clues_is_not_correct():
    other = next(grid for grid in GRIDS if not sudoku_grid.keeps_clues(grid, PUZZLE))
    result = score(other)
    assert result.detail["valid"]
    assert not result.correct


def right(digits):
    return sum(d == SOLUTION[at] for at, d in enumerate(digits[:16]) if at in EMPTY) / len(EMPTY)


@pytest.mark.parametrize(
    ("text", "digits"),
    [
        ("<answer>3142 2431\n4213 | 1324</answer>", SOLUTION),
        ("<answer>[[3,1,4,2],[2,4,3,1],[4,2,1,3],[1,3,2,4]]</answer>", SOLUTION),
        ("1 is the digit <answer>314224</answer>", "314224"),  # padded
        (f"<answer>{SOLUTION}4321</answer>", SOLUTION),  # cut
        (f"<answer>1111</answer> no: <answer>{SOLUTION}</answer>", SOLUTION),
        (f"<answer>{SOLUTION}</answer><answer></answer>", SOLUTION),
        (f"<answer>{SOLUTION}<|eot_id|>1111", SOLUTION),  # never closed
        (f"16 cells </answer>\n{SOLUTION}", SOLUTION),
        (f"row 1: 3142. So {SOLUTION} it is", SOLUTION),
        (f"{PUZZLE} becomes {SOLUTION}", SOLUTION),
        ("3142\n2431\n42", "3142243142"),
        ("the answer is 3142", ""),  # words and no tag
        ("<answer>\u0663\u0661\u0664\u0662</answer>", ""),  # Arabic digits are not 1-4
        ("<answer></answer>", ""),
        ("", ""),
    ],
)
def test_answers_are_found_where_models_put_them(text, digits):
    result = score(text)
    assert result.reward == pytest.approx(right(digits))
    assert result.detail["parsed"] == bool(digits)
    assert result.correct == (result.detail["complete"] and digits == SOLUTION)


def test_too_long_an_answer_is_no_solution():
    result = score(f"<answer>{SOLUTION}4</answer>")
    assert (result.reward, result.correct) == (1.0, False)


def test_plain_reads_digits_among_letters():
    text = f"x{SOLUTION[:8]} y {SOLUTION[8:]}"
    assert score(text, template="plain").correct
    assert score(text, template="d1").reward == 0


def test_prompts_ask_for_what_is_scored():
    prompt = tasks.get("sudoku").prompt(EXAMPLE)
    for part in (PUZZLE, "<reasoning>", "</reasoning>", "<answer>", "</answer>"):
        assert part in prompt
    assert SOLUTION not in prompt
    assert tasks.get("sudoku", template="plain").prompt(EXAMPLE) == PUZZLE + "="


def test_a_trace_becomes_the_reasoning():
    shown = tasks.get("sudoku").demonstration(EXAMPLE | {"trace": "row 1 lacks 4"})
    assert shown == f"<reasoning>\nrow 1 lacks 4\n</reasoning>\n<answer>\n{SOLUTION}\n</answer>"


def test_metrics_are_means_of_details():
    task = tasks.get("sudoku")
    scores = [task.score(text, EXAMPLE) for text in (SOLUTION, "<answer>1</answer>", "none")]
    means = task.metrics(scores)
    assert means["complete"] == pytest.approx(1 / 3)
    assert means["parsed"] == pytest.approx(2 / 3)
    assert means["cells"] == pytest.approx(sum(s.reward for s in scores) / 3)
    assert task.metrics([]) == {"cells": 0.0, "parsed": 0.0, "complete": 0.0}


def test_published_test_puzzles(shared_data):
    task = tasks.get("sudoku")
    examples = task.load(str(shared_data / "sudoku_4x4_test.csv"), "test")
    assert len(examples) == 500
    assert examples[0] == {"puzzle": "3102200002100320", "solution": "3142243142131324"}
    assert examples[1]["puzzle"].startswith("0")
    counts = [len(sudoku_grid.solutions(example["puzzle"])) for example in examples]
    assert min(counts) == 1
    assert sum(count > 1 for count in counts) == 124
    for example in examples:
        for grid in sudoku_grid.solutions(example["puzzle"]):
            assert task.score(grid, example).correct


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"template": "d2"}, "template"),
        ({"min_empty": 0}, "min_empty"),
        ({"min_empty": 9, "max_empty": 8}, "min_empty"),
        ({"max_empty": 17}, "max_empty"),
        ({"test_grids": 288}, "test_grids"),
        ({"num_train": 0}, "num_train"),
        ({"num_test": -1}, "num_test"),
        ({"cell_weight": -0.1}, "cell_weight"),
        ({"solved_weight": float("nan")}, "solved_weight"),
        ({"demonstration_noise": 1.1}, "demonstration_noise"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        tasks.get("sudoku", **options)


def test_bad_examples_are_named():
    task = tasks.get("sudoku")
    with pytest.raises(ValueError, match="'puzzle'"):
        task.prompt({"solution": SOLUTION})
    with pytest.raises(ValueError, match="strings of 16 digits"):
        task.score(SOLUTION, {"puzzle": 102, "solution": SOLUTION})
    with pytest.raises(ValueError, match="split"):
        task.load(None, "validation")
