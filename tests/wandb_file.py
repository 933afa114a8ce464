"""Reads the file of an offline wandb run: records of protobuf in blocks, as LevelDB logs them."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEAD = 32768, struct.Struct("<IHB")  # checksum, length, kind
_FULL, _FIRST, _LAST = 1, 2, 4


def read_records(path: Path) -> list[Record]:
    """All records of a ``.wandb`` file."""
    raw, at, found, parts = path.read_bytes(), 7, [], b""
    assert raw[:4] == b":W&B"
    while at + _HEAD.size <= len(raw):
        if _BLOCK - at % _BLOCK < _HEAD.size:  # the rest of a block is filled up
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _HEAD.unpack_from(raw, at)
        at += _HEAD.size
        if at + length > len(raw):  # still being written
            break
        parts = (b"" if kind in (_FULL, _FIRST) else parts) + raw[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
    return found


class OfflineRun:
    """What a run directory's offline wandb run holds.

    Attributes:
        history: Rows of values by key, keys within keys as ``a.b``.
        summary: The last state of each key.
        metrics: Definitions by name or pattern.
        alerts: Titles.
        config: Of the run.
        run: The record of the run itself.
    """

    def __init__(self, run_dir: Path) -> None:
        (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.alerts: list[str] = []
        self.config: dict[str, Any] = {}
        self.artifacts: list[str] = []
        records, patience = read_records(path), 100
        # The process that writes it may be a little later than the run.
        while records[-1].WhichOneof("record_type") != "exit" and patience:
            time.sleep(0.1)
            records, patience = read_records(path), patience - 1
        for record in records:
            kind = record.WhichOneof("record_type")
            if kind == "history":
                self.history.append(_items(record.history.item))
            elif kind == "summary":
                self.summary.update(_items(record.summary.update))
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "alert":
                self.alerts.append(record.alert.title)
            elif kind == "run":
                self.run = record.run
                self.config.update(_items(record.run.config.update))
            elif kind == "config":
                self.config.update(_items(record.config.update))
            elif kind == "artifact":
                self.artifacts.append(record.artifact.type)

    @property
    def keys(self) -> set[str]:
        """All that was logged, without wandb's own."""
        return {key for row in self.history for key in row if not key.startswith("_")}


def _items(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
