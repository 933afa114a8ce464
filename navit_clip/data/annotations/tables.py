"""Reads a CSV, TSV, JSON-lines or Parquet table of image paths and captions.

Rows that name the same image become one sample: many tables have one line per caption.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from navit_clip.data.annotations.arrow import ArrowFile
from navit_clip.data.annotations.class_names import index_of
from navit_clip.data.annotations.rows import ImageList, Row, merge_rows, to_text
from navit_clip.data.decode import IMAGE_EXTENSIONS
from navit_clip.errors import UserError
from navit_clip.files import reading

ARROW = (".parquet", ".arrow")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_FIELD = 1 << 24  # the csv module gives up at 128 kB, and alternative texts can be longer


def open_table(
    path: Path,
    images: Path,
    image_column: str,
    caption_columns: Sequence[str],
    label_column: str | None = None,
) -> ImageList:
    """Rows of a table.

    Args:
        path: A file that ends in ``.csv`` or ``.tsv`` (UTF-8, first line the columns' names),
            ``.jsonl`` (an object a line) or ``.parquet``.
        images: The folder that relative paths in the table begin at.
        image_column: Holds the path.
        caption_columns: Hold a caption each; in JSON and Parquet also a list of captions.
        label_column: Holds class indices; or names, which are numbered in sorted order.

    Raises:
        UserError: If the file cannot be read, lacks a column or has no row.
    """
    columns = [image_column, *([] if label_column is None else [label_column]), *caption_columns]
    suffix = path.suffix.lower()
    if suffix in _DELIMITERS:
        lines = _delimited(path, columns)
    elif suffix == ".jsonl":
        lines = _json_lines(path, columns)
    elif suffix in ARROW:
        lines = _arrow(path, columns)
    else:
        raise UserError(f"{path}: expected a name that ends in .csv, .tsv, .jsonl or .parquet")
    rows, labels = [], []
    # ValueError: a path with a zero byte.
    with reading(path, ValueError):
        for name, *values in lines:
            file = (to_text(name) or "").strip()
            # An empty path would become the folder; those rows are counted as skipped.
            found = os.path.normpath(file) if file and "\0" not in file else ""
            if label_column is not None:
                labels.append((to_text(values.pop(0)) or "").strip())
            rows.append(Row(found, tuple(to_texts(values))))
    classes: list[str] = []
    if label_column is not None:
        numbers, classes = _number_labels(labels)
        rows = [replace(row, label=label) for row, label in zip(rows, numbers, strict=True)]
    if not rows:
        raise UserError(f"{path} has no row below its columns' names")
    merged, notes = merge_rows(rows), []
    if len(merged) < len(rows):
        notes.append(
            f"{len(rows):,} rows are {len(merged):,} images: "
            "the captions of an image were put together"
        )
    return ImageList(images, merged, classes, notes)


def _number_labels(labels: Sequence[str]) -> tuple[list[int | None], list[str]]:
    """Class indices, and the classes' names if the labels are names; an empty label is none."""
    indices = {label: index_of(label) for label in sorted(set(labels) - {""})}
    if None not in indices.values():
        return [indices.get(label) for label in labels], []
    places = {name: place for place, name in enumerate(indices)}
    return [places.get(label) for label in labels], list(indices)


def to_texts(values: Sequence[Any]) -> Iterator[str | None]:
    """The captions that a row's columns hold, one or a list of them each, as `rows.to_text`."""
    for value in values:
        yield from map(to_text, value if isinstance(value, (list, tuple)) else [value])


def check_columns(path: Path, present: Sequence[str], wanted: Sequence[str]) -> None:
    """Raises a `UserError` if a table lacks a column, or has two of its name."""
    for column in wanted:
        if column not in present:
            raise UserError(
                f"no column {column!r} in {path}: it has {', '.join(map(repr, present))}; "
                "name the columns by --image-column and --caption-column, in a training by "
                "data.files.image_column and data.files.caption_columns"
            )
        if present.count(column) > 1:
            raise UserError(f"{path} has two columns {column!r}: rename one")


def _delimited(path: Path, columns: Sequence[str]) -> Iterator[list[Any]]:
    lines = read_lines(path)
    _, header = next(lines, (0, None))
    if header is None:
        raise UserError(f"{path} is empty: expected a line of columns' names and rows")
    check_columns(path, header, columns)
    positions = [header.index(column) for column in columns]
    delimiter = _delimiter_of(path)
    for number, line in lines:
        # A caption cut at its own comma would otherwise be trained on.
        if len(line) != len(header):
            raise UserError(
                f"{path} line {number} has {len(line)} fields, its header "
                f"{len(header)}: quote captions that hold the delimiter"
            )
        _check_quotes(path, number, line, delimiter, positions[0])
        yield [line[position] for position in positions]


def read_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a ``.csv`` or ``.tsv`` in UTF-8, each with the number of its last line.

    Most TSVs are written without quoting, and a quote in them is a character like any other: where
    all lines as they stand have as many fields as the first, each is a row. Blank lines are none.

    Raises:
        UserError: If the file cannot be read or its quotes do not match.
    """
    delimiter = _delimiter_of(path)
    csv.field_size_limit(_LONGEST_FIELD)
    is_plain = delimiter == "\t" and _has_plain_lines(path)
    with _open(path) as file:
        if is_plain:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, [_unquoted(field) for field in line.rstrip("\r\n").split("\t")]
            return
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num}: {error}; check its quotes") from error


def _delimiter_of(path: Path) -> str:
    """By its name; open_clip's tables have tabs and are named ``.csv``."""
    with _open(path) as file:
        header = file.readline()
    return "\t" if "\t" in header and "," not in header else _DELIMITERS[path.suffix.lower()]


def _has_plain_lines(path: Path) -> bool:
    with _open(path) as file:
        return len({line.count("\t") for line in file if line.strip()}) == 1


@contextmanager
def _open(path: Path) -> Iterator[IO[str]]:
    # A byte order mark, as spreadsheets write, would become part of the first column's name.
    with reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        try:
            yield file
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error


def _unquoted(field: str) -> str:
    inner = field[1:-1].replace('""', "")
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"' and '"' not in inner
    return field[1:-1].replace('""', '"') if is_quoted else field


def _check_quotes(path: Path, number: int, row: Sequence[str], delimiter: str, image: int) -> None:
    """A `UserError` if a field holds other rows: a stray quote swallows all up to the next."""
    for field in row:
        for line in field.split("\n")[1:]:
            cells = line.split(delimiter)
            name = cells[image].strip('" \r') if len(cells) > max(image, 1) else ""
            if name.lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)):
                raise UserError(
                    f"{path} line {number}: a field in quotes holds what looks like the row of "
                    f"{name[:60]}; check the quotes up to there"
                )


def _json_lines(path: Path, columns: Sequence[str]) -> Iterator[list[Any]]:
    present: dict[str, None] = {}
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
                present |= dict.fromkeys(values.keys())
            except (ValueError, AttributeError) as error:
                raise UserError(f"{path} line {number} is no JSON object: {error}") from error
            yield [values.get(column) for column in columns]
    # A column may be missing wherever it would be null.
    check_columns(path, list(present), columns)


def _arrow(path: Path, columns: Sequence[str]) -> Iterator[list[Any]]:
    table = ArrowFile(path)
    check_columns(path, table.columns, columns)
    if table.holds_bytes(columns[0]):
        raise UserError(f"{path} holds the images themselves: read it where shards are, as it is")
    for chunk in range(len(table.counts)):
        yield from (values() for values in table.rows(chunk, columns))
