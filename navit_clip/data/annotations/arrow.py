"""Reads Parquet and Arrow files, as pandas, Hugging Face's `datasets` and img2dataset write them.

By chunks that can be read alone: a row group of Parquet, some rows of an Arrow file, which is
mapped into memory.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from navit_clip.errors import UserError

_FILE_MAGIC = b"ARROW1"  # of Arrow files that are no streams
_ROWS = 64  # of Parquet that are in memory at a time, which may be images


class ArrowFile:
    """A Parquet or Arrow file.

    Args:
        path: The file, ``.parquet`` or ``.arrow``.
        chunk: Rows in a chunk of an Arrow file; the last one has what is left.

    Attributes:
        columns: Names of the columns.
        counts: Rows in each chunk.

    Raises:
        UserError: If pyarrow is not installed.
        OSError: If the file cannot be read.
    """

    def __init__(self, path: Path, chunk: int = 1000) -> None:
        try:
            # Not a dependency: large, and needed by these files alone.
            self._arrow = importlib.import_module("pyarrow")
            self._parquet = importlib.import_module("pyarrow.parquet")
        except ImportError as error:
            raise UserError(
                f"reading {path} needs pyarrow: pip install 'navit-clip[parquet]'"
            ) from error
        self._chunk, self._file = chunk, None
        try:
            if path.suffix.lower() == ".parquet":
                self._file = self._parquet.ParquetFile(path)
                groups = self._file.metadata
                self._schema = self._file.schema_arrow
                self.counts = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
            else:
                self._table = self._read_arrow(path)
                self._schema, rows = self._table.schema, self._table.num_rows
                self.counts = [min(chunk, rows - start) for start in range(0, rows, chunk)]
        except self._arrow.ArrowException as error:
            raise OSError(str(error)) from error
        self.columns: list[str] = self._schema.names

    def _read_arrow(self, path: Path) -> Any:
        source = self._arrow.memory_map(str(path))
        is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        source.seek(0)
        ipc = self._arrow.ipc
        return (ipc.open_file if is_file else ipc.open_stream)(source).read_all()

    def holds_bytes(self, column: str) -> bool:
        """Whether a column has files' content: bytes, or as `datasets` has images with a path."""
        types = self._arrow.types
        kind = self._schema.field(column).type
        return types.is_struct(kind) or types.is_binary(kind) or types.is_large_binary(kind)

    def class_names(self, column: str) -> list[str]:
        """Names of the classes whose indices a column of `datasets` has, none if it has others."""
        # Whoever else writes such a note means something else by it.
        with suppress(ValueError, TypeError, KeyError):
            about = json.loads((self._schema.metadata or {})[b"huggingface"])
            return [str(name) for name in about["info"]["features"][column]["names"]]
        return []

    def rows(self, number: int, columns: Sequence[str]) -> Iterator[Callable[[], list[Any]]]:
        """What gives the values of each row of a chunk; they are made only when it is called.

        Raises:
            OSError: If the file is damaged.
        """
        try:
            for batch in self._batches(number, columns):
                # Offsets that are damaged would be followed out of the file's memory.
                batch.validate(full=True)
                # By name: the file's own order of columns may differ.
                found = [batch.column(name) for name in columns]
                yield from (partial(_values, found, index) for index in range(batch.num_rows))
        except self._arrow.ArrowException as error:
            raise OSError(str(error)) from error

    def _batches(self, number: int, columns: Sequence[str]) -> Iterator[Any]:
        if self._file is not None:
            return self._file.iter_batches(_ROWS, row_groups=[number], columns=list(columns))
        start = number * self._chunk
        return iter(self._table.select(list(columns)).slice(start, self._chunk).to_batches())


def _values(columns: Sequence[Any], index: int) -> list[Any]:
    try:
        return [column[index].as_py() for column in columns]
    except (ValueError, KeyError) as error:  # a text or the name of a field is damaged
        raise OSError(str(error)) from error
