"""Reads a CSV, TSV or Parquet table of image paths and captions.

Rows that name the same image become one sample: many tables have one line per caption.
"""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from navit_clip.data.annotations.rows import ImageList, Row, merge_rows
from navit_clip.errors import UserError
from navit_clip.files import reading

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LONGEST_FIELD = 1 << 24  # the csv module gives up at 128 kB, and alternative texts can be longer


def open_table(
    path: Path, images: Path, image_column: str, caption_columns: Sequence[str]
) -> ImageList:
    """Rows of a table.

    Args:
        path: A file that ends in ``.csv`` or ``.tsv`` (UTF-8, first line the columns' names), or
            ``.parquet``.
        images: The folder that relative paths in the table begin at.
        image_column: Holds the path.
        caption_columns: Hold a caption each; in Parquet also a list of captions.

    Raises:
        UserError: If the file cannot be read, lacks a column or has no row.
    """
    columns = [image_column, *caption_columns]
    suffix = path.suffix.lower()
    if suffix in _DELIMITERS:
        lines = _delimited(path, _DELIMITERS[suffix], columns)
    elif suffix == ".parquet":
        lines = _parquet(path, columns)
    else:
        raise UserError(f"{path}: expected a name that ends in .csv, .tsv or .parquet")
    rows, nameless = [], 0
    try:
        with reading(path):
            for name, *values in lines:
                if name and str(name).strip():
                    captions = tuple(text for value in values for text in _texts(value))
                    rows.append(Row(os.path.normpath(str(name).strip()), captions))
                else:
                    nameless += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    if not rows and not nameless:
        raise UserError(f"{path} has no row below its columns' names")
    merged, notes = merge_rows(rows), []
    if len(merged) < len(rows):
        notes.append(
            f"{len(rows):,} rows name {len(merged):,} images: "
            "the captions of an image were put together"
        )
    # They become samples that are skipped, so that they are counted like all the others.
    return ImageList(images, merged + [Row("", ())] * nameless, notes=notes)


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [str(text) for text in values if text is not None]


def _check_columns(path: Path, present: Sequence[str], wanted: Sequence[str]) -> None:
    for column in wanted:
        if column not in present:
            raise UserError(
                f"no column {column!r} in {path}: it has {', '.join(map(repr, present))}; "
                "see --image-column and --caption-column"
            )


def _delimited(path: Path, delimiter: str, columns: Sequence[str]) -> Iterator[list[Any]]:
    csv.field_size_limit(_LONGEST_FIELD)
    # A byte order mark, as spreadsheets write, would become part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                raise UserError(f"{path} is empty: expected a line of columns' names and rows")
            _check_columns(path, header, columns)
            positions = [header.index(column) for column in columns]
            for line in reader:
                if not line:
                    continue
                # A caption cut at its own comma would otherwise be trained on.
                if len(line) != len(header):
                    raise UserError(
                        f"{path} line {reader.line_num} has {len(line)} fields, its header "
                        f"{len(header)}: quote captions that hold the delimiter"
                    )
                yield [line[position] for position in positions]
        except csv.Error as error:
            raise UserError(f"{path} line {reader.line_num}: {error}; check its quotes") from error


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[list[Any]]:
    try:
        # Not a dependency: large, and needed by this one kind of table.
        parquet = importlib.import_module("pyarrow.parquet")
        arrow = importlib.import_module("pyarrow")
    except ImportError as error:
        raise UserError("reading Parquet needs pyarrow: pip install pyarrow") from error
    with reading(path, arrow.ArrowException), parquet.ParquetFile(path) as table:
        _check_columns(path, table.schema_arrow.names, columns)
        for batch in table.iter_batches(columns=list(columns)):
            # By name: the file's own order of columns may differ.
            values = [batch.column(column).to_pylist() for column in columns]
            yield from map(list, zip(*values, strict=True))
