"""Data files: formats, column names, and errors that name file and line."""

import gzip
import json
import sys

import pytest

from dlm_fast import tasks
from dlm_fast.tasks import table

PUZZLE, SOLUTION = "0140432014020000", "2143432114323214"
GOOD = {"puzzle": PUZZLE, "solution": SOLUTION}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8", newline="")
        return str(path)

    return write


def load(path, name="sudoku", **options):
    return tasks.get(name, **options).load(path, "train")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", f"Puzzle,Solution\n{PUZZLE},{SOLUTION}\n"),
        ("a.csv", f"\ufeffPuzzle,Solution\r\n\r\n{PUZZLE},{SOLUTION}\r\n\r\n"),
        ("a.CSV", f'"solution", "id" ,puzzle\n{SOLUTION},7,"{PUZZLE}"'),
        ("a.csv", f"input,output\n{PUZZLE.replace('0', '.')},{SOLUTION}\n"),
        ("a.jsonl", json.dumps(GOOD)),
        ("a.jsonl", f"\ufeff\n{json.dumps(GOOD)}\n  \n"),
        ("a.jsonl", json.dumps({"Puzzle": PUZZLE, "Solution": SOLUTION, "more": [1]}) + "\r\n"),
        ("a.json", json.dumps([GOOD], indent=2)),
    ],
)
def test_formats_and_known_columns(write, name, content):
    assert load(write(name, content)) == [GOOD]


def test_csv_keeps_leading_zeros(write):
    path = write("a.csv", f"puzzle,solution\n{PUZZLE},{SOLUTION}\n")
    assert load(path)[0]["puzzle"] == PUZZLE
    assert table.read_table(path)[0].values == GOOD


def test_named_columns_and_traces(write):
    row = {"question": PUZZLE, "grid": SOLUTION, "puzzle": "not this one", "trace": "think"}
    path = write("a.jsonl", json.dumps(row))
    columns = {"puzzle": "question", "solution": "grid"}
    assert load(path, columns=columns) == [GOOD | {"trace": "think"}]


@pytest.mark.parametrize(
    "row",
    [
        {"input": "30,100,93", "output": "23"},
        {"input": " 30, 100 ,93 ", "output": 23},
        {"nums": [30, 100, 93], "target": 23},
        {"numbers": "[30, 100, 93]", "target": "23"},
        {"Numbers": ["30", "100", "93"], "Target": 23},
    ],
)
def test_countdown_columns(write, row):
    path = write("a.jsonl", json.dumps(row))
    assert load(path, "countdown") == [{"numbers": [30, 100, 93], "target": 23}]


def test_countdown_csv(write):
    path = write("a.csv", 'input,output\n"30,100,93",23\n')
    assert load(path, "countdown") == [{"numbers": [30, 100, 93], "target": 23}]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"puzzle": PUZZLE[:15], "solution": SOLUTION}, "puzzle must be a string of 16"),
        ({"puzzle": int(PUZZLE), "solution": SOLUTION}, "leading zeros"),
        ({"puzzle": PUZZLE.replace("3", "5"), "solution": SOLUTION}, "puzzle must be"),
        ({"puzzle": None, "solution": SOLUTION}, "NoneType"),
        ({"puzzle": PUZZLE, "solution": PUZZLE}, "solution must be"),
        ({"puzzle": PUZZLE, "solution": "1" * 16}, "repeats a digit"),
        ({"puzzle": "3" + PUZZLE[1:], "solution": SOLUTION}, "contradicts the clues"),
        ({"puzzle": SOLUTION, "solution": SOLUTION}, "no empty cell"),
        ({"puzzle": PUZZLE}, "no column for 'solution'"),
        ({}, "the row has no columns"),
    ],
)
def test_bad_sudoku_rows_name_file_and_line(write, row, what):
    path = write("rows.jsonl", f"{json.dumps(GOOD)}\n\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=what) as error:
        load(path)
    assert "rows.jsonl, line 3" in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"numbers": "30;100", "target": 3},
        {"numbers": [30, 1.5], "target": 3},
        {"numbers": [30, -1], "target": 3},
        {"numbers": [30, True], "target": 3},
        {"numbers": [30, "1_0"], "target": 3},
        {"numbers": [30, "\u0663"], "target": 3},
        {"numbers": [30, 10**12], "target": 3},
        {"numbers": [30], "target": 3},
        {"numbers": 30, "target": 3},
        {"numbers": [30, 1], "target": None},
        {"numbers": [30, 1], "target": "many"},
        {"numbers": [30, 1]},
    ],
)
def test_bad_countdown_rows_name_file_and_line(write, row):
    good = json.dumps({"numbers": [1, 2], "target": 3})
    path = write("rows.jsonl", f"{good}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2.*(numbers|target)"):
        load(path, "countdown")


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("x.jsonl", "", "has no rows"),
        ("x.jsonl", "\n \n", "has no rows"),
        ("x.json", "", "has no rows"),
        ("x.json", "[]", "has no rows"),
        ("x.csv", "", "has no rows"),
        ("x.csv", "puzzle,solution\n", "has no rows"),
        ("x.jsonl", '{"a": 1}\n{"a": \n', r"x\.jsonl, line 2: not valid JSON"),
        ("x.jsonl", '{"a": 1}\n[1]\n', r"x\.jsonl, line 2: expected a JSON object"),
        ("x.jsonl", "[" * 100_000, r"x\.jsonl, line 1: not valid JSON"),
        ("x.json", '{"a": 1}', "JSON list"),
        ("x.json", '[{"a": 1}, 3]', r"x\.json, item 2"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"x\.jsonl, line 2: not UTF-8"),
        ("x.csv", b"a,b\n1,\xff\n", r"x\.csv, line 2: not UTF-8"),
        ("x.csv", "a,b\n1,2\n\n1,2,3\n", r"x\.csv, line 4: 3 values for the 2 columns"),
        ("x.csv", "a,b\n1\n", r"x\.csv, line 2: 1 values"),
        ("x.csv", 'a,b\n"1,2\n3,4\n', r"x\.csv, line 2: not valid CSV"),
        ("x.parquet", "not parquet", r"x\.parquet: not a readable parquet file|needs pyarrow"),
        ("x.txt", "a", "suffix must be one of .jsonl, .jsonl.gz, .json, .csv, .parquet"),
        ("x", "a", "suffix must be one of"),
    ],
)
def test_unreadable_files(write, name, content, what):
    with pytest.raises(ValueError, match=what):
        table.read_table(write(name, content))


def test_a_quoted_line_break_keeps_the_count_of_lines(write):
    path = write("x.csv", 'a,b\n"1\n1",2\n3,4,5\n')
    with pytest.raises(ValueError, match="line 4: 3 values"):
        table.read_table(path)


def test_unusual_separators_do_not_split_json_lines(write):
    path = write("x.jsonl", json.dumps({"a": "1\u20282\x85"}, ensure_ascii=False) + "\n")
    assert table.read_table(path)[0].values == {"a": "1\u20282\x85"}


@pytest.mark.parametrize("column", ["id", "unique_id", "task_id", "question_id"])
def test_duplicate_ids_name_both_lines(write, column):
    rows = [GOOD | {column: name} for name in ("a", "b", "a")]
    path = write("x.jsonl", "\n\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"x\.jsonl, line 5: \w*id 'a' stands already at .*line 1"):
        load(path)
    assert len(table.read_table(path, repeated_ids=True)) == 3
    some = [GOOD | {column: "a"}, GOOD | {column: "a"}, GOOD]
    path = write("y.jsonl", "\n".join(map(json.dumps, some)))
    assert len(load(path)) == 3, "a column that a row lacks is no id"
    path = write("z.jsonl", "\n".join(json.dumps(GOOD | {column: name}) for name in ("1", 1)))
    assert len(load(path)) == 2, "a number and a text are different ids"


def test_gzip(write):
    lines = f"{json.dumps(GOOD)}\n{json.dumps(GOOD)}\n".encode()
    assert len(load(write("x.jsonl.gz", gzip.compress(lines)))) == 2
    for content in (lines, gzip.compress(lines)[:-9], gzip.compress(lines)[:12] + b"?" * 30):
        with pytest.raises(ValueError, match=r"x\.jsonl\.gz: not a whole gzip file"):
            load(write("x.jsonl.gz", content))
    with pytest.raises(ValueError, match=r"x\.jsonl\.gz, line 2: not valid JSON"):
        load(write("x.jsonl.gz", gzip.compress(f"{json.dumps(GOOD)}\n{{".encode())))


def test_published_answers_hold_their_examples(write):
    """Rows in which the question stands in words, as published evaluations write them."""
    row = {"question": f"Solve the following Sudoku puzzle: {PUZZLE}\n", "answer": SOLUTION}
    assert load(write("x.jsonl", json.dumps(row))) == [GOOD]
    row = {"question": "Numbers: [30, 100, 93]\nTarget: 23", "answer": [[30, 100, 93], 23]}
    path = write("x.jsonl", json.dumps(row))
    assert load(path, "countdown") == [{"numbers": [30, 100, 93], "target": 23}]


def test_missing_files_and_directories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl does not exist"):
        load(str(tmp_path / "absent.jsonl"))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        load(str(tmp_path / "folder.csv"))


def test_wrong_column_mappings(write):
    path = write("a.jsonl", json.dumps(GOOD))
    with pytest.raises(ValueError, match=r"maps 'puzle'.*puzzle, solution"):
        load(path, columns={"puzle": "x"})
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no column for 'puzzle'.*looked for x"):
        load(path, columns={"puzzle": "x"})


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the optional reader pyarrow is absent")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "x.parquet")
    columns = {"nums": [[30, 100, 93], [1, 2, 3]], "target": [23, 6]}
    parquet.write_table(pyarrow.table(columns), path)
    examples = load(path, "countdown")
    assert examples[0] == {"numbers": [30, 100, 93], "target": 23}
    assert len(examples) == 2
    parquet.write_table(pyarrow.table({"nums": [[1, 2], [1]], "target": [1, 1]}), path)
    with pytest.raises(ValueError, match=r"x\.parquet, row 2: numbers must be"):
        load(path, "countdown")


def test_parquet_without_its_extra(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"dlm_fast\[datasets\]"):
        table.read_table(write("x.parquet", "PAR1"))
