"""9x9 Sudoku: the solver, generated puzzles, hold-out, files, rewards."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlm_fast import tasks
from dlm_fast.tasks import sudoku_grid

# Wikipedia's example of a Sudoku, and 17 clues of G. Royle's list.
PUZZLE = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
SEVENTEEN = "000000010400000000020000000000050407008000300001090000300400200050100000000806000"
EXAMPLE = {"puzzle": PUZZLE, "solution": SOLUTION}


def get(**options):
    return tasks.get("sudoku", size=9, **options)


def test_known_puzzles_have_one_solution():
    assert sudoku_grid.solutions(PUZZLE) == [SOLUTION]
    (found,) = sudoku_grid.solutions(SEVENTEEN, 2)
    assert sudoku_grid.is_valid_grid(found)
    assert sudoku_grid.keeps_clues(found, SEVENTEEN)


def test_the_solver_agrees_with_the_list_of_all_4x4_grids():
    draw = random.Random(0)
    for _ in range(200):
        puzzle = "".join(draw.choice("000001234") for _ in range(16))
        expected = [g for g in sudoku_grid.all_grids() if sudoku_grid.keeps_clues(g, puzzle)]
        assert sudoku_grid.solutions(puzzle) == expected
        assert set(sudoku_grid.solutions(puzzle, 3)) <= set(expected)
        assert len(sudoku_grid.solutions(puzzle, 3)) == min(3, len(expected))


def test_puzzles_without_a_solution():
    assert sudoku_grid.solutions("55" + "0" * 79) == []
    assert sudoku_grid.solutions("123456780" + "000000009" + "0" * 63) == []


def test_every_corruption_of_a_grid_is_invalid():
    for at in range(81):
        for digit in "0123456789x":
            grid = SOLUTION[:at] + digit + SOLUTION[at + 1 :]
            assert sudoku_grid.is_valid_grid(grid) == (digit == SOLUTION[at])
    assert not sudoku_grid.is_valid_grid(SOLUTION[:-1])
    assert not sudoku_grid.is_valid_grid(SOLUTION[:16])


def test_generated_puzzles_of_both_splits_are_valid_and_share_no_grid():
    task = get(min_empty=30, max_empty=45, num_train=300, num_test=60, seed=4)
    grids = {}
    for split, length in (("train", 300), ("test", 60)):
        examples = task.load(None, split)
        assert len(examples) == length
        for example in examples:
            assert sudoku_grid.is_valid_grid(example["solution"])
            assert sudoku_grid.keeps_clues(example["solution"], example["puzzle"])
            assert 30 <= example["puzzle"].count("0") <= 45
            assert sudoku_grid.split_of(example["solution"]) == split
        grids[split] = {example["solution"] for example in examples}
        assert len(grids[split]) == length
    assert not grids["train"] & grids["test"]
    again = get(min_empty=30, max_empty=45, num_train=5, seed=4).load(None, "train")
    assert again[:] == task.load(None, "train")[:5]
    assert get(seed=5).load(None, "train")[0] != get(seed=4).load(None, "train")[0]


def test_renaming_digits_keeps_the_split():
    draw = random.Random(1)
    splits = set()
    for _ in range(100):
        grid = sudoku_grid.random_grid(draw, "train")
        digits = draw.sample("123456789", 9)
        renamed = grid.translate(str.maketrans("123456789", "".join(digits)))
        assert sudoku_grid.split_of(renamed) == sudoku_grid.split_of(grid) == "train"
        splits.add(sudoku_grid.split_of(next(sudoku_grid._search("0" * 81, draw))))
    assert splits == {"train", "test"}


@pytest.mark.parametrize(("size", "empty"), [(9, 30), (9, 52), (4, 8), (4, 11)])
def test_unique_puzzles_have_one_solution(size, empty):
    task = tasks.get("sudoku", size=size, unique=True, min_empty=empty, max_empty=empty)
    for example in task.load(None, "train")[:20]:
        assert example["puzzle"].count("0") == empty
        assert sudoku_grid.solutions(example["puzzle"], 2) == [example["solution"]]


def test_puzzles_need_not_be_unique():
    task = get(min_empty=60, max_empty=60)
    counts = [len(sudoku_grid.solutions(e["puzzle"], 2)) for e in task.load(None, "test")[:10]]
    assert 2 in counts


def test_too_many_empty_cells_for_one_solution_say_so():
    task = get(unique=True, min_empty=64, max_empty=64)
    with pytest.raises(ValueError, match=r"lower sudoku\.max_empty or turn sudoku\.unique off"):
        task.load(None, "train")[0]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"size": 6}, "sudoku.size must be 4 or 9"),
        ({"size": 9, "max_empty": 82}, "max_empty"),
        ({"size": 9, "max_empty": 65, "unique": True}, "max_empty"),
        ({"size": 4, "max_empty": 13, "unique": True}, "max_empty"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        tasks.get("sudoku", **options)


@pytest.mark.parametrize("template", ["d1", "plain"])
def test_the_solution_earns_everything(template):
    task = get(template=template, cell_weight=0.5, solved_weight=0.5)
    for text in (SOLUTION, f"<answer>\n{SOLUTION}\n</answer>", task.demonstration(EXAMPLE)):
        score = task.score(text, EXAMPLE)
        assert (score.reward, score.correct) == (1.0, True)
        assert score.detail["answer"] == SOLUTION


@given(data=st.data())
@settings(max_examples=50)
def test_each_corrupted_cell_costs_its_share(data):
    empty = [at for at in range(81) if PUZZLE[at] == "0"]
    wrong = data.draw(st.sets(st.sampled_from(empty), min_size=1, max_size=10))
    answer = list(SOLUTION)
    for at in wrong:
        answer[at] = data.draw(st.sampled_from([d for d in "0123456789" if d != answer[at]]))
    score = get().score(f"so <answer>{''.join(answer)}</answer>", EXAMPLE)
    assert score.reward == pytest.approx(1 - len(wrong) / len(empty), abs=1e-12)
    assert not score.correct


@pytest.mark.parametrize(
    ("text", "reward", "correct"),
    [
        ("\n".join(SOLUTION[i : i + 9] for i in range(0, 81, 9)), 1.0, True),
        (f"row by row it is {SOLUTION} as asked", 1.0, True),
        (f"<answer>{SOLUTION}5</answer>", 1.0, False),
        (f"<answer>{SOLUTION[:78]}</answer>", 50 / 51, False),
        (f"the 4x4 grid 1234341221434321 <answer>{SOLUTION}</answer>", 1.0, True),
        ("<answer>1234341221434321</answer>", None, False),
        ("", 0.0, False),
    ],
)
def test_answers_are_found_where_models_put_them(text, reward, correct):
    score = get().score(text, EXAMPLE)
    assert score.correct == correct
    if reward is not None:
        assert score.reward == pytest.approx(reward)
    assert score.detail["empty"] == 51


def test_another_solution_of_an_ambiguous_puzzle_is_correct():
    # Two rows of a band whose digits 1 and 2 may be exchanged in two columns.
    swap = next(
        (a, b, c, d)
        for a in range(81)
        for b in range(a + 1, 81)
        if a // 9 == b // 9
        for c, d in [(a + 27, b + 27), (a + 54, b + 54)]
        if d < 81 and SOLUTION[a] == SOLUTION[d] and SOLUTION[b] == SOLUTION[c]
        if a // 3 % 3 == b // 3 % 3
    )
    puzzle = "".join("0" if at in swap else digit for at, digit in enumerate(SOLUTION))
    first, second = sudoku_grid.solutions(puzzle)
    other = second if first == SOLUTION else first
    score = get().score(other, {"puzzle": puzzle, "solution": SOLUTION})
    assert score.correct
    assert score.reward == 0.0


def test_prompts_speak_of_nine(tmp_path):
    prompt = get().prompt(EXAMPLE)
    for part in (PUZZLE, "9x9", "81 characters", "3x3 box", "digits 1 to 9"):
        assert part in prompt
    assert "4x4" not in prompt
    assert "{" not in prompt
    own = get(prompt_template="{size}/{cells}/{box}: {puzzle}")
    assert own.prompt(EXAMPLE) == f"9/81/3: {PUZZLE}"
    assert get(template="plain").prompt(EXAMPLE) == PUZZLE + "="


def test_noise_uses_all_digits():
    task = get(template="plain", demonstration_noise=1.0, min_empty=60, max_empty=60)
    shown = "".join(task.demonstration(e) for e in task.load(None, "train")[:20])
    assert set(shown) == set("123456789")


def test_files_with_81_digits(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"quizzes,solutions\n{PUZZLE.replace('0', '.')},{SOLUTION}\n")
    assert get().load(str(path), "test") == [EXAMPLE]
    with pytest.raises(ValueError, match=r"line 2: puzzle must be .* 16 .*sudoku\.size 9 reads"):
        tasks.get("sudoku").load(str(path), "test")
    small = tmp_path / "b.csv"
    small.write_text("Puzzle,Solution\n3102200002100320,3142243142131324\n")
    with pytest.raises(ValueError, match=r"line 2: puzzle must be .* 81 .*sudoku\.size 4 reads"):
        get().load(str(small), "test")
    for puzzle, solution, message in (
        (SOLUTION, SOLUTION, "no empty cell"),
        (PUZZLE, SOLUTION[::-1], "contradicts the clues"),
        (PUZZLE, SOLUTION[:-2] + "97", "repeats a digit"),
        (PUZZLE[:-1] + "x", SOLUTION, "digits 0-9"),
    ):
        path.write_text(f"puzzle,solution\n{puzzle},{solution}\n")
        with pytest.raises(ValueError, match=f"line 2.*{message}"):
            get().load(str(path), "test")


def test_an_example_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"strings of 81 digits.*sudoku\.size is 9"):
        get().score("1", {"puzzle": "3102200002100320", "solution": "3142243142131324"})
    with pytest.raises(ValueError, match=r"strings of 16 digits.*sudoku\.size is 4"):
        tasks.get("sudoku").score("1", EXAMPLE)
