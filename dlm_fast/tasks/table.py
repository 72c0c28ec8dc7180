"""Reading examples from JSONL, JSON, CSV or parquet files, with errors that name file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GZIP = ".gz"
ID_COLUMNS = ("id", "unique_id", "task_id", "question_id")
"""columns that name an example, as published data sets call them"""


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    values: dict[str, Any]
    """column name to value; CSV values are strings as they stand in the file"""
    where: str
    """file and line, for error messages"""


def read_table(path: str | Path, *, repeated_ids: bool = False) -> list[Row]:
    """All rows of a file; the suffix says the format. Blank lines and a byte-order mark are legal.

    An id that stands twice (columns `ID_COLUMNS`) is an error unless `repeated_ids`: the same
    example would count twice, or two would be taken for one. Errors are ValueError
    (FileNotFoundError for a missing file) and say where and what to do.
    """
    path = Path(path)
    name = path.name.lower()
    reader = next((READERS[end] for end in READERS if name.endswith(end)), None)
    if reader is None:
        raise ValueError(f"cannot read {path}: its suffix must be one of {', '.join(READERS)}")
    if path.is_dir():
        raise ValueError(f"cannot read {path}: it is a directory, not a file")
    if not path.exists():
        raise FileNotFoundError(f"data file {path} does not exist (looked in {Path.cwd()})")
    rows = list(reader(path))
    if not rows:
        raise ValueError(f"data file {path} has no rows")
    if not repeated_ids:
        _check_ids(rows)
    return rows


def _check_ids(rows: Sequence[Row]) -> None:
    """Raise if an id stands twice; a column that not every row fills is no id."""
    for column in ID_COLUMNS:
        values = [row.values.get(column) for row in rows]
        if any(value is None or value == "" for value in values):
            continue
        seen: dict[str, Row] = {}
        for row, value in zip(rows, values, strict=True):
            other = seen.setdefault(repr(value), row)
            if other is not row:
                raise ValueError(
                    f"{row.where}: {column} {shorten(value)} stands already at {other.where}; "
                    f"remove one of the rows, or rename the column if it is no id"
                )


def pick_fields(
    row: Row, known: Mapping[str, Sequence[str]], columns: Mapping[str, str], owner: str
) -> dict[str, Any]:
    """The task's fields of a row.

    A field's column is the one `columns` names, else the first of its known names that the row has
    (in any case of letters).
    """
    for name in columns:
        if name not in known:
            raise ValueError(
                f"{owner}.columns maps {name!r}, which is not a field of this task; "
                f"its fields are {', '.join(known)}"
            )
    lowered = {str(column).lower(): column for column in row.values}
    fields = {}
    for name, names in known.items():
        if name in columns:
            if columns[name] not in row.values:
                raise ValueError(_no_column(row, name, [columns[name]], owner))
            fields[name] = row.values[columns[name]]
            continue
        column = next((lowered[known] for known in names if known in lowered), None)
        if column is None:
            raise ValueError(_no_column(row, name, names, owner))
        fields[name] = row.values[column]
    return fields


def shorten(value: object, limit: int = 60) -> str:
    """A value for an error message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _no_column(row: Row, name: str, names: Sequence[str], owner: str) -> str:
    have = ", ".join(shorten(str(column)) for column in list(row.values)[:12])
    return (
        f"{row.where}: no column for {name!r} (looked for {', '.join(names)}); the row has "
        f"{have or 'no columns'}; name yours with {owner}.columns, e.g. {{{name!r}: 'my column'}}"
    )


def _text(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix.lower() == GZIP:
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}: not a whole gzip file ({error}); pack it anew") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); convert the file to UTF-8"
        ) from None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error}), got {shorten(text)}") from None


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f'{where}: expected a JSON object like {{"name": ...}}, {shorten(value)}')
    return Row(value, where)


def _read_jsonl(path: Path) -> Iterator[Row]:
    # Only "\n" ends a line: JSON strings may hold other separators that str.splitlines splits at.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield _object(_parse_json(line, where), where)


def _read_json(path: Path) -> Iterator[Row]:
    text = _text(path)
    if not text.strip():
        return
    values = _parse_json(text, str(path))
    if not isinstance(values, list):
        raise ValueError(f"{path}: expected a JSON list of objects; one object a line is .jsonl")
    for number, value in enumerate(values, start=1):
        where = f"{path}, item {number}"
        yield _object(value, where)


def _read_csv(path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header: list[str] | None = None
    while True:
        where = f"{path}, line {reader.line_num + 1}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{where}: not valid CSV ({error})") from None
        if not any(value.strip() for value in values):
            continue
        if header is None:
            header = [name.strip() for name in values]
            continue
        if len(values) != len(header):
            raise ValueError(
                f"{where}: {len(values)} values for the {len(header)} columns "
                f"{', '.join(header)}; got {shorten(values)}"
            )
        yield Row(dict(zip(header, values, strict=True)), where)


def _read_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f"reading {path} needs pyarrow: pip install 'dlm_fast[datasets]', or convert the file "
            "to JSONL or CSV"
        ) from None
    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a readable parquet file ({error})") from None
    for number, value in enumerate(values, start=1):
        yield Row(value, f"{path}, row {number}")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
